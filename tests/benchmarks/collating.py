"""Packing a batch of rows: ours, torch's ``pack_sequence``, and ``pad_sequence`` of the same rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence

from hf_packfix import DataCollatorForPackedSequence
from hf_packfix.packing.jagged import from_jagged
from tests.benchmarks import long_tailed
from tests.benchmarks.measure import Row, Table, interleave, per_call, ratio

BATCH, FEATURES = 64, 16
theirs = partial(pack_sequence, enforce_sorted=False)


def ours(rows: list[Tensor]) -> PackedSequence:
    """Pack rows without the padded tensor that ``pack_sequence`` builds on the way."""
    return from_jagged(torch.cat(rows), torch.tensor([len(row) for row in rows]))


def equal(first: PackedSequence, second: PackedSequence) -> bool:
    """Tell whether two packed sequences are the same in every field, bit for bit."""
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True))


def run(quick: bool) -> Table:
    """Measure token ids ``[T]`` and features ``[T, D]`` of long-tailed lengths."""
    number, repeats = (5, 20) if quick else (10, 200)
    generator = torch.Generator().manual_seed(0)
    lengths = long_tailed.lengths(BATCH, generator)
    collator = DataCollatorForPackedSequence()
    rows: list[Row] = []
    notes = []
    for kind, values in (
        ("ids [T]", [torch.randint(1, 1000, (length,), generator=generator) for length in lengths]),
        (f"features [T, {FEATURES}]", [torch.randn(length, FEATURES, generator=generator) for length in lengths]),
    ):
        features = [{"x": value} for value in values]
        cases: dict[str, tuple[Callable[[Any], Any], Any]] = {
            "from_jagged": (ours, values),
            "DataCollatorForPackedSequence": (collator, features),
            "pack_sequence": (theirs, values),
            "pad_sequence": (partial(pad_sequence, batch_first=True), values),
        }
        samples = interleave(
            {name: per_call("make(x)", number, make=make, x=x) for name, (make, x) in cases.items()}, repeats
        )
        for name in ("from_jagged", "DataCollatorForPackedSequence"):
            rows.append(ratio(samples, name, "pack_sequence", label=f"{kind}: {name}"))
            rows.append(ratio(samples, name, "pad_sequence", label=f"{kind}: {name}"))
        same = equal(ours(values), theirs(values)) and equal(collator(features)["x"], theirs(values))
        notes.append(f"{kind}: the batches are {'equal' if same else 'NOT equal'}, bit for bit")
    return Table(f"Collating: {BATCH} rows of {min(lengths)} to {max(lengths)} steps", rows, notes)
