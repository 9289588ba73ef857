"""What every other patch adds to a step, or to an evaluation batch, without a PackedSequence."""

from __future__ import annotations

from importlib import import_module
from statistics import median
from typing import Any

import torch

import hf_packfix
from hf_packfix import evaluation
from hf_packfix.patches import PATCHES
from tests.benchmarks.measure import Row, Table, interleave, per_call, summary

BATCH = {
    name: torch.zeros(8, 16, dtype=torch.int64) for name in ("input_ids", "attention_mask", "position_ids", "labels")
}
LOGITS = torch.zeros(8, 16, 4)

#: What a wrapper is given by an ordinary batch, by the name of its parameter; anything else is a batch.
GIVEN = {
    "self": object(),
    "model": object(),
    "batch_samples": [BATCH],
    "dataloader": object(),
    "description": "Evaluation",
    "tensors": LOGITS,
    "new_tensors": LOGITS,
    "model_output": {"logits": LOGITS},
    "labels": BATCH["labels"],
    "dim": 0,
    "fn": torch.Tensor.half,
}


def nothing(*args: Any, **kwargs: Any) -> Any:
    """Stand in for the original, whose own time would drown what a wrapper adds to it."""
    return args[0]


def run(quick: bool) -> Table:
    """Time every wrapper around a function that does nothing, less that function."""
    number, repeats = (500, 20) if quick else (1000, 100)
    hf_packfix.enable()
    rows: list[Row] = []
    notes: list[str] = []
    for patch in PATCHES:
        if patch.path == "Trainer._prepare_input":
            continue
        import_module(patch.module)
        if not patch.active:
            notes.append(f"not measured: {patch.status(True)}")
            continue
        names = {f"x{place}": GIVEN.get(name, BATCH) for place, name in enumerate(patch.parameters)}
        with evaluation.running(evaluation.Loop(evaluates=True)):
            samples = interleave(
                {
                    label: per_call(f"call({', '.join(names)})", number, call=function, **names)
                    for label, function in (("with", patch.make(nothing, patch)), ("without", nothing))
                },
                repeats,
            )
        added = [1e6 * (ours - nothings) for ours, nothings in zip(*samples.values(), strict=True)]
        seconds = (median(samples["with"]), median(samples["without"]))
        rows.append(summary(patch.path, "without", added, unit="µs", seconds=seconds, bar=2.0))
    return Table("Cold patches: what each adds to a call without a PackedSequence", rows, notes)
