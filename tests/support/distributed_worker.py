"""What each process of the distributed tests runs: every scenario, packed and padded, results to a file.

All scenarios share one launch, since starting the processes costs more than what they do.

    torchrun --nproc-per-node N -m tests.support.distributed_worker DIRECTORY

With ``ACCELERATE_USE_CPU=true`` over gloo; otherwise over nccl, with a GPU for each process.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.state import GradientState
from accelerate.utils import operations
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence
from torch.utils.data import DataLoader

import hf_packfix
from hf_packfix.models import RecurrentConfig, RecurrentForCausalLM
from hf_packfix.packing import jagged
from hf_packfix.packing import packed as packing
from tests.support import oracle, stuck
from tests.support.layouts import LAYOUTS, arrange
from tests.support.oracle import Row, rows
from tests.support.reports import Stream

LONGEST = 9
ON_CPU = os.environ.get("ACCELERATE_USE_CPU") == "true"


def padded_to_longest(features: list[Row]) -> dict[str, Any]:
    """Collate to padded tensors of one width for all batches: stock can dispatch no others."""
    batch = oracle.padded_batch(features)
    for key, value in batch.items():
        if value.dim() > 1:
            filling = -100 if "label" in key else 0
            wider = value.new_full((len(value), LONGEST, *value.shape[2:]), filling)
            wider[:, : value.shape[1]] = value
            batch[key] = wider
    return batch


def listed(value: Any) -> Any:
    """Turn arrays and tensors into lists."""
    if isinstance(value, (tuple, list)):
        return [listed(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


# --- batches that are dispatched ------------------------------------------------------------------------


def numbered(count: int) -> list[Row]:
    """Return rows that say who they are: token ids, features, a number and nothing that repeats."""
    data = rows(count, longest=LONGEST, seed=count)
    return [
        {
            "input_ids": row["input_ids"],
            "features": torch.rand(len(row["input_ids"]), 2, generator=torch.Generator().manual_seed(number)),
            "number": torch.tensor(number),
        }
        for number, row in enumerate(data)
    ]


def received(batch: dict[str, Any]) -> list[Any]:
    """Return the rows of a batch, packed or padded, as lists of their real steps."""
    if isinstance(batch["input_ids"], PackedSequence):
        assert batch["input_ids"].batch_sizes.device.type == "cpu"
        columns = [jagged.to_jagged(batch[key])[0].split(packing.lengths(batch[key]).tolist()) for key in KEYS]
    else:
        sizes = batch["attention_mask"].sum(1).tolist()
        columns = [[row[:size] for row, size in zip(batch[key], sizes, strict=True)] for key in KEYS]
    return [[*map(listed, steps), int(number)] for *steps, number in zip(*columns, batch["number"], strict=True)]


KEYS = ("input_ids", "features")


def dispatched(packed: bool, count: int, *, split: bool = False, drop: bool = False, ordered: bool = False) -> Any:
    collate = oracle.packed_batch if packed else padded_to_longest
    if ordered:
        collate = oracle.by_length(oracle.sorted_packed_batch if packed else collate)
    size = 2 * PartialState().num_processes if split else 3
    loader = DataLoader(Stream(numbered(count)), batch_size=size, collate_fn=collate, drop_last=drop)
    prepared = prepare_data_loader(loader, split_batches=split, dispatch_batches=True, put_on_device=True)
    try:
        epochs = [[received(batch) for batch in prepared] for _ in range(2)]
    except TypeError as error:  # stock, too, cannot dispatch a data set that gives no batch at all
        return {"error": str(error)}
    return {"batches": epochs[0], "again": epochs[1] == epochs[0], "remainder": prepared.remainder}


def dispatch_grid() -> Iterator[tuple[str, Callable[[bool], Any]]]:
    for count, split, drop in itertools.product((12, 13, 14, 4), (False, True), (False, True)):
        yield f"dispatch {count} split={split} drop={drop}", partial(dispatched, count=count, split=split, drop=drop)
    yield "dispatch sorted", partial(dispatched, count=13, ordered=True)


# --- the Trainer ----------------------------------------------------------------------------------------


# Up to 4.46, stock asks the counts that it gathered of all processes for `item()`: it counts in one process alone.
COUNTS_TOKENS = (
    {}
    if "gather(input_tokens).cpu().item()" in inspect.getsource(transformers.trainer)
    else {"include_num_input_tokens_seen": "non_padding"}
)


def report(packed: bool, streaming: bool = False, **changes: Any) -> dict[str, Any]:
    """Train, evaluate and predict; return all that is reported."""
    data = rows(13, longest=LONGEST)
    collate = oracle.packed_batch if packed else (padded_to_longest if streaming else oracle.padded_batch)
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append([listed(prediction.label_ids), listed(prediction.predictions)])
        return oracle.accuracy(prediction)

    with tempfile.TemporaryDirectory() as directory:
        options = {"options": {"compute_metrics": metrics}, "use_cpu": ON_CPU} | COUNTS_TOKENS | changes
        options |= {"max_steps": 4} if streaming else {}
        trainer = oracle.new_trainer(Path(directory), oracle.Tagger, data, collate, **options)
        if streaming:
            trainer.train_dataset = trainer.eval_dataset = Stream(data)
        if COUNTS_TOKENS and not packed:
            oracle.count_real_tokens(trainer)
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        with oracle.counted_samples() as samples:
            evaluated = trainer.evaluate()
        predicted = trainer.predict(Stream(data) if streaming else data)
    return {
        "losses": [step["loss"] for step in steps],
        "grad_norms": [float(step["grad_norm"]) for step in steps],
        "tokens": trainer.state.num_input_tokens_seen,
        "eval_loss": evaluated["eval_loss"],
        "accuracy": evaluated["eval_accuracy"],
        "samples": samples,
        "seen": seen,
        "predictions": listed(predicted.predictions),
        "label_ids": listed(predicted.label_ids),
    }


def in_layout(layout: str, fill: int) -> Callable[[list[Row]], dict[str, Any]]:
    """Return a collator for language models, with ``fill`` at the padding of labels."""

    def collate(features: list[Row]) -> dict[str, Any]:
        ids = [feature["input_ids"] for feature in features]
        inputs, mask = arrange(layout, ids)
        batch = {"input_ids": inputs, "labels": arrange(layout, ids, fill=fill)[0]}
        return batch if mask is None else {**batch, "attention_mask": mask}

    return collate


def language_model(packed: bool, **changes: Any) -> dict[str, Any]:
    """Train and evaluate a recurrent language model; return what is reported by layout.

    Labels repeat the inputs, padding included, which the model and not the Trainer tells from labels that count.
    Without the plugin, the layout that stock counts right is that of the padding on the right, with labels of -100.
    """
    data = [{"input_ids": row["input_ids"]} for row in rows(13, longest=LONGEST)]
    config = RecurrentConfig("gru", vocab_size=oracle.VOCABULARY, hidden_size=oracle.HIDDEN)
    reports = {}
    for layout, fill in [(layout, 0) for layout in LAYOUTS] if packed else [("right", -100)]:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as directory:
            model = RecurrentForCausalLM(config)
            run = oracle.train(Path(directory), model, data, in_layout(layout, fill), use_cpu=ON_CPU, **changes)
            evaluated = run.trainer.evaluate()
        reports[layout] = {"losses": run.losses, "grad_norms": run.grad_norms, "eval_loss": evaluated["eval_loss"]}
    return reports


# --- operations on packed values ------------------------------------------------------------------------


def of_rank(rank: int) -> list[torch.Tensor]:
    """Return two sequences, whose lengths differ between processes, on this process's device."""
    sequences = [torch.arange(2 + 3 * rank) + 10 * rank, torch.arange(1 + rank) + 100 * rank]
    return [sequence.to(PartialState().device) for sequence in sequences]


def gathering(packed: bool) -> dict[str, Any]:
    GradientState._reset_state()  # up to accelerate 0.34 the last evaluation's number of rows stays in it
    accelerator = Accelerator()
    own = of_rank(accelerator.process_index)
    value: Any = pack_sequence(own, enforce_sorted=False)
    if not packed:  # what stock makes of the same rows, once padded to one width by hand
        everyone = [sequence for rank in range(accelerator.num_processes) for sequence in of_rank(rank)]
        return dict.fromkeys(
            ("gather", "nested", "metrics", "padded", "bytes"),
            listed(pad_sequence(everyone, True, padding_value=-100)),
        )
    padded = accelerator.pad_across_processes({"x": value}, dim=1, pad_index=-100)["x"]
    return {
        "gather": listed(accelerator.gather(value)),
        "nested": listed(accelerator.gather([{"x": (value,)}])[0]["x"][0]),
        "metrics": listed(accelerator.gather_for_metrics(value)),
        "padded": listed(accelerator.gather(padded)),
        "bytes": listed(accelerator.gather(value._replace(data=value.data.byte()))),
    }


def broadcasting(packed: bool) -> Any:
    state = PartialState()
    expected = [of_rank(1), [sequence.float() for sequence in of_rank(1)]]
    if not packed:
        return [listed(pad_sequence(sequences, True)) for sequences in expected] + [7]
    mine = [pack_sequence(sequences, enforce_sorted=False) for sequences in expected]
    if state.process_index != 0:
        # Receivers have packed sequences of the same sizes; what they hold is overwritten.
        structure = operations.get_data_structure(mine)
        mine = operations.initialize_tensors(structure)
    flag = torch.tensor([7 * (state.process_index == 0)], device=state.device)
    tree = operations.broadcast({"a": mine[0], "b": [mine[1], flag]})
    return [listed(packing.pad(tree["a"])), listed(packing.pad(tree["b"][0])), int(tree["b"][1])]


#: Whether this torch has `fully_shard`.
FULLY_SHARDS = find_spec("torch.distributed.device_mesh") is not None


def sharded(packed: bool, dtype: torch.dtype | None = None) -> Any:
    """Train a sharded model; on padded batches, the same model whole, on the same rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = PartialState().device
    torch.manual_seed(0)
    model = nn.ModuleDict({"gru": nn.GRU(2, 8), "head": nn.Linear(8, 3)})

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: PackedSequence, labels: PackedSequence) -> torch.Tensor:
            states = self.parts["gru"](x)[0]
            return nn.functional.cross_entropy(self.parts["head"](states.data).float(), labels.data)

    whole: Any = Whole().to(device)
    if packed:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        fully_shard(whole, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.5)
    pieces = [torch.rand(n, 2, generator=torch.Generator().manual_seed(n)).to(device) for n in (2, 5, 3)]
    x = pack_sequence(pieces, enforce_sorted=False)
    labels = pack_sequence([(piece[:, 0] * 3).long() for piece in pieces], enforce_sorted=False)
    losses = []
    for _ in range(8):
        loss = whole(x=x, labels=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def scenarios() -> Iterator[tuple[str, Callable[[bool], Any]]]:
    yield from dispatch_grid()
    yield "map-style", report
    yield "map-style, tokens averaged per device", partial(report, average_tokens_across_devices=False)
    yield "map-style, accumulated", partial(report, gradient_accumulation_steps=2, dataloader_num_workers=1)
    yield "streaming", partial(report, streaming=True)
    # The sizes of whole batches, to be split evenly between two or three processes.
    sizes = {"per_device_train_batch_size": 6, "per_device_eval_batch_size": 6}
    yield "streaming, split", partial(report, streaming=True, **sizes, accelerator_config={"split_batches": True})
    yield "language model", language_model
    yield "language model, accumulated", partial(language_model, gradient_accumulation_steps=2)
    yield "gathering", gathering
    yield "broadcasting", broadcasting
    if FULLY_SHARDS:
        yield "sharded", sharded
        yield "sharded in bfloat16", partial(sharded, dtype=torch.bfloat16)


def main(directory: Path) -> None:
    stuck.answer()
    torch.set_num_threads(1)
    # accelerate before 0.30 prepares no data loader without one.
    assert Accelerator(cpu=ON_CPU).num_processes > 1
    results: dict[str, Any] = {}
    for name, scenario in scenarios():
        hf_packfix.enable()
        found = scenario(True)
        # The sharded model needs the plugin on; its peer is a model that is not sharded at all.
        hf_packfix.disable()
        results[name] = {"packed": found, "padded": scenario(False)}
    rank = PartialState().process_index
    (directory / f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
