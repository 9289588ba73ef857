"""The tiny PackedSequence that probes send through upstream's functions to see whether they handle it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn.utils.rnn import PackedSequence


def packed() -> PackedSequence:
    """Return two sequences, ``[1]`` and ``[2, 3]``: int64, CPU, not in sorted order."""
    import torch
    from torch.nn.utils.rnn import pack_sequence

    return pack_sequence([torch.tensor([1]), torch.tensor([2, 3])], enforce_sorted=False)
