"""What goes from one process to another when a batch is dispatched: packed, and as a padded tensor.

Bytes of the tensors that would be sent, computed: of a packed batch the real steps and one length a row, from which
the receiver packs them again; of the padded tensor its elements, without an attention mask.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.utils.rnn import pack_sequence, pad_sequence

from hf_packfix.packing.jagged import to_jagged
from tests.benchmarks import long_tailed
from tests.benchmarks.measure import Table, summary

__all__ = ["run"]

BATCH, FEATURES = 64, 16


def run(quick: bool) -> Table:
    """Compare the bytes of many batches, as int64 ids ``[N]`` and as float32 features ``[N, D]``."""
    generator = torch.Generator().manual_seed(0)
    batches = [long_tailed.lengths(BATCH, generator) for _ in range(20 if quick else 200)]
    rows = []
    for kind, make in (
        ("int64 ids [N]", partial(torch.zeros, dtype=torch.int64)),
        (f"float32 features [N, {FEATURES}]", lambda length: torch.zeros(length, FEATURES)),
    ):
        ratios = []
        for lengths in batches:
            sequences = [make(length) for length in lengths]
            sent = to_jagged(pack_sequence(sequences, enforce_sorted=False))
            ratios.append(sum(tensor.nbytes for tensor in sent) / pad_sequence(sequences).nbytes)
        rows.append(summary(f"{kind}: packed", "the padded tensor", ratios))
    return Table(f"Dispatch: bytes of a batch of {BATCH} rows of long-tailed lengths", rows)
