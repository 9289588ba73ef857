"""``Trainer.predict`` over many rows of long-tailed lengths: packed, and padded on a stock Trainer.

The model does next to nothing, so that what is left is the Trainer's own cost. Every run is a process of its
own, or two that share the rows, each of which knows how much memory it took at most:

    python -m tests.benchmarks.evaluation packed 5000
    torchrun --standalone --nproc-per-node 2 -m tests.benchmarks.evaluation packed 5000
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from tests.benchmarks import long_tailed
from tests.benchmarks.measure import Row, Table, clock, interleave, ratio, summary

VOCABULARY, LOGITS = 50, 10
PACKED, PADDED = "packed", "padded"
NO_LOSS = torch.zeros(())
Batch = dict[str, Any]


class PackedModel(nn.Module):
    """Ten logits a token, looked up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.logits = nn.Embedding(VOCABULARY, LOGITS)

    def forward(self, input_ids: Any, labels: Any = None) -> Batch:
        return {"loss": NO_LOSS, "logits": input_ids._replace(data=self.logits(input_ids.data))}


class PaddedModel(PackedModel):
    """The same on a padded tensor, with -100 behind the end of a row, as the Trainer fills rows."""

    def forward(self, input_ids: Tensor, labels: Any = None, attention_mask: Any = None) -> Batch:
        logits = self.logits(input_ids).masked_fill(attention_mask.eq(0).unsqueeze(-1), -100)
        return {"loss": NO_LOSS, "logits": logits}


def padded(features: list[Batch]) -> Batch:
    """Collate to right-padded tensors."""
    values: Batch = {key: [feature[key] for feature in features] for key in features[0]}
    return {
        "input_ids": pad_sequence(values["input_ids"], batch_first=True),
        "labels": pad_sequence(values["labels"], batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in values["input_ids"]], batch_first=True),
    }


def peak_memory() -> int:
    """Return how many KiB this process had resident at most.

    From Linux's own account of it: ``ru_maxrss`` also counts what the process held that started this one.
    """
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM:")))


def predict(kind: str, count: int) -> dict[str, Any]:
    """Predict ``count`` rows with default arguments; return the time, the memory, and what came out, hashed."""
    torch.set_num_threads(1)
    if kind == PACKED:
        from hf_packfix import DataCollatorForPackedSequence  # the import activates

        model, collate = PackedModel(), DataCollatorForPackedSequence()
    else:
        model, collate = PaddedModel(), padded
    rows = long_tailed.rows(count, VOCABULARY, LOGITS)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(directory, report_to=[], use_cpu=True, disable_tqdm=True)
        trainer = Trainer(model, arguments, data_collator=collate)
        trainer.predict(rows[:16])  # what is done once, is done
        began = clock()
        result = trainer.predict(rows)
        seconds = clock() - began
        peak = peak_memory()  # before the arrays are hashed, which copies them
    digest = hashlib.sha256()
    for array in (result.predictions, result.label_ids):
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return {"seconds": seconds, "peak": peak, "shape": list(result.predictions.shape), "digest": digest.hexdigest()}


def in_processes(kind: str, count: int, processes: int) -> dict[str, Any]:
    """Call :func:`predict` in one process of its own, or in several; return what the slowest and largest took."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "tests.benchmarks.evaluation"]
    result = subprocess.run([*command, kind, str(count)], stdout=subprocess.PIPE, text=True, check=True)
    ranks = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    if len(ranks) != processes or len({rank["digest"] for rank in ranks}) != 1:
        raise RuntimeError(f"expected the same arrays of {processes} processes, found {ranks}")
    return {**ranks[0], **{key: max(rank[key] for rank in ranks) for key in ("seconds", "peak")}}


def compare(counts: tuple[int, int, int], repeats: int, processes: int) -> tuple[list[Row], list[str]]:
    """Return rows and notes on predicting ``counts`` rows in both ways, in so many processes."""
    where = "" if processes == 1 else f", {processes} processes"
    few, _, many = counts
    results: dict[str, list[dict[str, Any]]] = {}

    def named(kind: str, count: int) -> str:
        return f"{kind}, {count} rows{where}"

    def seconds(kind: str, count: int) -> float:
        result = in_processes(kind, count, processes)
        results.setdefault(named(kind, count), []).append(result)
        return float(result["seconds"])

    ways = [(kind, count) for count in counts for kind in (PACKED, PADDED)]
    # Every run is a process that has just begun.
    samples = interleave({named(*way): partial(seconds, *way) for way in ways}, repeats, warm_up=False)
    rows: list[Row] = [ratio(samples, named(PADDED, many), named(PADDED, few))]
    notes = []
    for count in counts:
        ours, theirs = named(PACKED, count), named(PADDED, count)
        rows.append(ratio(samples, ours, theirs, bar=0.5 if count == many else None))
        peaks = [a["peak"] / b["peak"] for a, b in zip(results[ours], results[theirs], strict=True)]
        rows.append(summary(f"peak memory: {ours}", theirs, peaks, bar=1.0))
        same = len({result["digest"] for name in (ours, theirs) for result in results[name]}) == 1
        memory = " and ".join(
            f"{statistics.median(result['peak'] for result in results[name]) / 1024:.0f} MiB"
            for name in (ours, theirs)
        )
        shape = results[ours][0]["shape"]
        notes.append(
            f"{count} rows{where}, logits {shape}: {'identical' if same else 'NOT identical'} bits; {memory} at most"
        )
    # Of its own, and more often: seconds, not minutes.
    growth = interleave({named(PACKED, count): partial(seconds, PACKED, count) for count in (many, few)}, 5)
    return [ratio(growth, named(PACKED, many), named(PACKED, few), bar=4.4), *rows], notes


def run(quick: bool) -> Table:
    """Predict 5,000, 10,000 and 20,000 rows in both ways, in one process and in two."""
    counts, repeats = ((500, 1000, 2000), 2) if quick else ((5000, 10000, 20000), 2)
    rows: list[Row] = []
    notes: list[str] = []
    for processes in (1, 2):
        # What grows with the square of the rows takes minutes: in two processes, once.
        more_rows, more_notes = compare(counts, repeats if processes == 1 else 1, processes)
        rows += more_rows
        notes += more_notes
    return Table(f"Evaluation: predict over {counts[0]} to {counts[-1]} rows", rows, notes)


if __name__ == "__main__":
    # In one piece: several processes share the pipe.
    sys.stdout.write(json.dumps(predict(sys.argv[1], int(sys.argv[2]))) + "\n")
