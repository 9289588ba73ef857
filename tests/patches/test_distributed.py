"""Streaming and several processes: every row reaches the process that the padded run gives it, whole.

Real processes, over gloo and the loopback interface; the padded run has the same number of processes.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.utils
from accelerate.utils import DistributedType, operations
from torch.nn.utils.rnn import pack_sequence
from transformers import Trainer

import hf_packfix
from hf_packfix.packing import jagged
from hf_packfix.packing import packed as packing
from tests.support import stuck
from tests.support.distributed_worker import FULLY_SHARDS, numbered, scenarios
from tests.support.installed import ROOT
from tests.support.layouts import LAYOUTS
from tests.support.oracle import (
    PlainTagger,
    Tagger,
    compiles,
    count_real_tokens,
    new_trainer,
    packed_batch,
    padded_batch,
    rows,
    stock,
)
from tests.support.patched import patch_of
from tests.support.reports import Stream, assert_same_report, report

NAMES = [name for name, _ in scenarios()]
DISPATCHED = [name for name in NAMES if name.startswith("dispatch")]
TRAINED = [name for name in NAMES if name.startswith(("map-style", "streaming"))]
WORLDS = [2, 3]

#: After how many seconds a launch is stuck; all scenarios take 15 to 60.
SECONDS = 200


def launch(processes: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    env = {k: v for k, v in os.environ.items() if k != "HF_PACKFIX"}
    env |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", **environment}
    return stuck.run([*command, *arguments], seconds=SECONDS, env=env, cwd=ROOT)


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} processes")
def results(request, tmp_path_factory) -> list[dict[str, Any]]:
    """The results of every scenario, by rank."""
    directory = tmp_path_factory.mktemp("results")
    result = launch(request.param, "-m", "tests.support.distributed_worker", str(directory))
    if stuck.MESSAGE in result.stderr:
        # Seen twice in some hundred launches, beside heavy load; why is not known. Once more, with a word of where.
        where = result.stderr[result.stderr.index(stuck.MESSAGE) :]
        warnings.warn(f"{request.param} processes were {where}", stacklevel=1)
        result = launch(request.param, "-m", "tests.support.distributed_worker", str(directory))
    assert result.returncode == 0, result.stderr[-5000:]
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("name", DISPATCHED)
def test_dispatched_rows(results, name):
    too_small = ["dispatch 4 split=False drop=True"] + ["dispatch 4 split=True drop=True"] * (len(results) == 3)
    for rank in results:
        assert rank[name]["packed"] == rank[name]["padded"]
        assert rank[name]["packed"].get("again", True)
        # A data set that ends before the first round is too much for stock, and nothing else is.
        assert ("error" in rank[name]["packed"]) == (name in too_small)


@pytest.mark.parametrize("name", [name for name in DISPATCHED if "drop=False" in name])
def test_no_row_is_lost_or_doubled_beyond_the_filling(results, name):
    count = int(name.split()[1])
    arrived = [row[-1] for rank in results for batch in rank[name]["packed"]["batches"] for row in batch]
    whole = dict(enumerate(numbered(count)))
    assert set(arrived) == set(whole)
    doubled = len(arrived) - count
    assert doubled < len(results)
    assert sorted({number for number in arrived if arrived.count(number) > 1}) == list(range(doubled))
    for rank in results:
        for batch in rank[name]["packed"]["batches"]:
            for ids, features, number in batch:
                assert ids == whole[number]["input_ids"].tolist()
                assert features == whole[number]["features"].tolist()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize("name", TRAINED)
def test_the_trainer_reports_what_the_padded_run_reports(results, name):
    for rank in results:
        packed, padded = rank[name]["packed"], rank[name]["padded"]
        assert packed["tokens"] == padded["tokens"]
        assert packed["samples"] == padded["samples"]
        # Without a length, stock counts what this process alone has seen.
        assert packed["samples"] == [13] or name.startswith("streaming")
        for key in ("losses", "grad_norms", "eval_loss", "accuracy"):
            close(packed[key], padded[key])
        for key in ("predictions", "label_ids"):
            close(packed[key], padded[key])
        assert len(packed["seen"]) == len(padded["seen"]) > 0
        for ours, theirs in zip(packed["seen"], padded["seen"], strict=True):
            close(ours[0], theirs[0])
            close(ours[1], theirs[1])
        assert len(packed["label_ids"]) == 13


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("language model")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_language_model_trains_alike_in_every_layout(results, name, layout):
    if "[..., 1:]" not in inspect.getsource(Trainer):
        pytest.skip("this release counts the first label of each padded sequence, too, which no model predicts")
    for rank in results:
        found, expected = rank[name]["packed"][layout], rank[name]["padded"]["right"]
        assert len(found["losses"]) == len(expected["losses"]) > 0
        for key in ("losses", "grad_norms", "eval_loss"):
            close(found[key], expected[key])


@pytest.mark.parametrize("name", ["gathering", "broadcasting"])
def test_operations_between_processes(results, name):
    for rank in results:
        assert rank[name]["packed"] == rank[name]["padded"]


@pytest.mark.skipif(not FULLY_SHARDS, reason="this torch has no fully_shard")
@pytest.mark.parametrize(("name", "tolerance"), [("sharded", 1e-5), ("sharded in bfloat16", 3e-2)])
def test_fully_sharded(results, name, tolerance):
    for rank in results:
        packed, whole = rank[name]["packed"], rank[name]["padded"]
        torch.testing.assert_close(packed, whole, rtol=tolerance, atol=tolerance)
        assert packed[-1] < packed[0]  # it learns


# --- a process that fails -------------------------------------------------------------------------------


def test_a_rank_that_fails_raises_its_own_error(tmp_path):
    (tmp_path / "fails.py").write_text("""
import sys
import hf_packfix
from accelerate import PartialState
from tests.support import oracle
from tests.support.patched import patch_of

def collate(features):
    if PartialState().process_index == 1:
        raise LookupError("this is rank 1's own error")
    return oracle.packed_batch(features)

oracle.new_trainer(sys.argv[1], oracle.Tagger, oracle.rows(), collate).train()
""")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = launch(2, str(tmp_path / "fails.py"), str(tmp_path), PYTHONPATH=path)
    assert result.returncode != 0
    assert "LookupError: this is rank 1's own error" in result.stderr


# --- one process ----------------------------------------------------------------------------------------


def test_streaming_in_one_process(tmp_path):
    data = rows()

    def run(collate, directory):
        trainer = new_trainer(
            directory, Tagger, Stream(data), collate, max_steps=8, include_num_input_tokens_seen="non_padding"
        )
        if collate is padded_batch:
            count_real_tokens(trainer)
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        return [(step["loss"], float(step["grad_norm"]), step["num_input_tokens_seen"]) for step in steps]

    packed = run(packed_batch, tmp_path)
    reported = report(tmp_path, Tagger, packed_batch, Stream(data), max_steps=1)
    with stock():
        padded = run(padded_batch, tmp_path)
        expected = report(tmp_path, Tagger, padded_batch, Stream(data), max_steps=1)
    torch.testing.assert_close(torch.tensor(packed), torch.tensor(padded), rtol=2e-4, atol=2e-5)
    assert_same_report(reported, expected)


def test_a_streaming_data_set_of_datasets(tmp_path):
    import datasets

    data = rows()
    columns = {key: [row[key].tolist() for row in data] for key in data[0]}
    stream = datasets.Dataset.from_dict(columns).to_iterable_dataset()
    collate = hf_packfix.DataCollatorForPackedSequence()
    found = report(tmp_path, Tagger, collate, stream, max_steps=1)
    with stock():
        expected = report(tmp_path, Tagger, padded_batch, Stream(data), max_steps=1)
    assert_same_report(found, expected)


def test_stock_dies_on_a_stream_in_one_process(tmp_path):
    with stock(), pytest.raises((AttributeError, AssertionError)):
        new_trainer(tmp_path, Tagger, Stream(rows()), packed_batch, max_steps=1).train()


# --- accelerate's operations, alone and nested ----------------------------------------------------------


def two_packed():
    first = [torch.arange(4), torch.arange(1) + 10, torch.arange(2) + 20]
    second = [torch.arange(3) + 30, torch.arange(5) + 40]
    return first, second, pack_sequence(first, enforce_sorted=False), pack_sequence(second, enforce_sorted=False)


def sequences(packed):
    """Return the sequences as lists; unlike torch's own function, raises where the fields contradict each other."""
    return [sequence.tolist() for sequence in jagged.to_jagged(packed)[0].split(packing.lengths(packed).tolist())]


@pytest.mark.needs_patch(
    "accelerate.utils.operations:find_batch_size",
    "accelerate.utils.operations:slice_tensors",
    "accelerate.utils.operations:concatenate",
    "accelerate.utils.operations:get_data_structure",
    "accelerate.utils.operations:initialize_tensors",
    "accelerate.utils.operations:gather",
    "accelerate.utils.operations:get_shape",
)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"x": [x, {"y": (x,)}]}], ids=["alone", "nested"])
def test_operations(wrap):
    first, second, packed, other = two_packed()

    def leaves(tree):
        return [tree["x"][0], tree["x"][1]["y"][0]] if isinstance(tree, dict) else [tree]

    assert operations.find_batch_size(wrap(packed)) == 3
    for part in leaves(operations.slice_tensors(wrap(packed), slice(1, 3))):
        assert sequences(part) == [[10], [20, 21]]
    for whole in leaves(operations.concatenate([wrap(packed), wrap(other)])):
        assert sequences(whole) == [sequence.tolist() for sequence in first + second]
    structure = operations.get_data_structure(wrap(packed))
    for empty in leaves(operations.initialize_tensors(structure)):
        assert empty.data.shape == packed.data.shape
        assert empty.data.dtype == packed.data.dtype
        assert empty.batch_sizes.shape == packed.batch_sizes.shape
        assert empty.sorted_indices.shape == packed.sorted_indices.shape
    assert leaves(operations.get_shape(wrap(packed)))[0] == [3, 4]
    for same in leaves(operations.broadcast(wrap(packed))):
        assert torch.equal(packing.pad(same), packing.pad(packed))
    for padded in leaves(operations.gather(wrap(packed))):
        assert padded.tolist() == [[0, 1, 2, 3], [10, -100, -100, -100], [20, 21, -100, -100]]
    for padded in leaves(operations.pad_across_processes(wrap(packed), dim=1, pad_index=7)):
        assert padded.tolist() == [[0, 1, 2, 3], [10, 7, 7, 7], [20, 21, 7, 7]]


@pytest.mark.parametrize("trailing", [(), (5,), (5, 6)])
def test_the_shape_of_a_packed_sequence_is_that_of_its_padded_tensor(trailing):
    packed = pack_sequence([torch.zeros(length, *trailing) for length in (2, 4, 1)], enforce_sorted=False)
    with stock():
        expected = operations.get_shape([packing.pad(packed)])
    assert operations.get_shape([packed]) == expected == [[3, 4, *trailing]]


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("pad_first", [False, True])
def test_what_is_padded_across_processes(monkeypatch, dim, pad_first):
    # What a process alone leaves as it is: by how the original is called, first for the steps, then as asked.
    patch = patch_of("accelerate.utils.operations:pad_across_processes")
    monkeypatch.setattr(patch, "active", True)
    calls = []

    def original(tree, **options):
        calls.append((tree, options))
        return tree

    packed = two_packed()[2]
    found = patch.make(original, patch)([packed], dim=dim, pad_index=-100, pad_first=pad_first)
    expected = packing.pad(packed, -100)
    assert torch.equal(found[0], expected)
    options = {"pad_index": -100, "pad_first": pad_first}
    *steps, (tree, whole) = calls
    assert isinstance(tree, list)
    assert whole == {"dim": dim, **options}
    assert [each for _, each in steps] == ([] if dim == 1 else [{"dim": 1, **options}])


@pytest.mark.parametrize("use", ["gather", "gather_for_metrics"])
def test_gathering_asks_for_padded_tensors_of_one_width(monkeypatch, use):
    from accelerate import Accelerator

    calls = []
    original = operations.pad_across_processes
    monkeypatch.setattr(operations, "pad_across_processes", lambda x, **o: calls.append(o) or original(x, **o))
    if use == "gather":
        operations.gather([two_packed()[2]])
    else:
        Accelerator(cpu=True).gather_for_metrics([two_packed()[2]])
    assert calls == [{"dim": 1, "pad_index": -100}]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda p: operations.slice_tensors([p], 1), "cut by a slice of its sequences, found int"),
        (lambda p: operations.concatenate([p, p], dim=1), "along the batch .dim 0. alone, found dim 1"),
        (lambda p: operations.concatenate([p, p], dim=-1), "along the batch .dim 0. alone, found dim -1"),
        (lambda p: operations.concatenate([p, p.data]), "with its like, found Tensor"),
        (lambda p: operations.concatenate([p.data, p]), "with its like, found Tensor"),
    ],
)
def test_what_has_no_meaning_says_so(use, message):
    with pytest.raises(TypeError, match=message):
        use(two_packed()[2])


@pytest.mark.needs_patch("accelerate.accelerator:Accelerator.gather_for_metrics")
def test_gather_for_metrics_cuts_the_last_batch_by_sequence():
    from accelerate import Accelerator

    packed = two_packed()[2]
    accelerator = SimpleNamespace(
        gather=lambda data: data, gradient_state=SimpleNamespace(end_of_dataloader=True, remainder=2)
    )
    found = Accelerator.gather_for_metrics(accelerator, packed)
    assert found.tolist() == [[0, 1, 2, 3], [10, -100, -100, -100]]


@pytest.mark.skipif(not hasattr(torch.distributed.utils, "_apply_to_tensors"), reason="torch 2.0 has no such function")
@pytest.mark.needs_patch("torch.distributed.utils:_apply_to_tensors")
def test_mixed_precision_of_fsdp_casts_the_data():
    from torch.distributed.utils import _apply_to_tensors

    packed = two_packed()[2]
    features = packed._replace(data=packed.data.float())
    cast, again = _apply_to_tensors(lambda data: data.half(), [features, {"x": features.data}])
    assert torch.equal(cast.data, again["x"])
    assert cast.data.dtype == torch.float16


@pytest.mark.needs_patch("accelerate.utils.operations:broadcast")
def test_a_sorted_packed_sequence_is_sent_as_data_and_batch_sizes():
    sent = []
    state = mock.Mock(distributed_type=DistributedType.MULTI_CPU, debug=False)
    packed = pack_sequence([torch.arange(4), torch.arange(3), torch.arange(3)])
    with (
        mock.patch.object(operations, "PartialState", return_value=state),
        mock.patch("torch.distributed.broadcast", lambda tensor, src: sent.append(tensor.clone())),
    ):
        same = operations.broadcast({"x": packed})["x"]
    assert [len(tensor) for tensor in sent] == [len(packed.data), len(packed.batch_sizes)]  # no missing index tensors
    assert torch.equal(same.data, packed.data)


# --- nn.DataParallel, torch.compile ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ["train", "evaluate", "predict"])
def test_data_parallel_names_the_two_ways_out(tmp_path, method):
    forwards = []

    class Counting(PlainTagger):
        def forward(self, *args, **kwargs):
            forwards.append(1)
            return super().forward(*args, **kwargs)

    data = rows()
    trainer = new_trainer(tmp_path, Counting, data, packed_batch, remove_unused_columns=False)
    trainer.args._n_gpu = 2  # what the Trainer finds on a machine with two GPUs and no launcher
    assert trainer.args.n_gpu == 2
    with pytest.raises(ValueError, match=r"torchrun --nproc-per-node 2 .*accelerate launch --num_processes 2"):
        getattr(trainer, method)(*([data] if method == "predict" else []))
    assert not forwards
    with stock():
        padded = new_trainer(tmp_path, Counting, data, padded_batch, remove_unused_columns=False)
        padded.args._n_gpu = 2
        padded.evaluate()  # the count alone stops nothing
    assert forwards


@pytest.mark.skipif(not compiles(), reason="this torch does not compile here")
def test_torch_compile(tmp_path):
    # The backend does not matter here: torch leaves the graph around every RNN.
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    # transformers 4 asks for it with variables, which would have every later Trainer compile its model.
    with mock.patch.dict(os.environ):
        compiled = report(tmp_path, Tagger, packed_batch, rows(), **options)
    with stock():
        expected = report(tmp_path, Tagger, padded_batch, rows())
    assert_same_report(compiled, expected)
