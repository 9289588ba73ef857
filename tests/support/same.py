"""That two packed sequences are the same."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence


def assert_same_packed(found, sequences):
    """Compare with torch's own packing of the sequences, field by field."""
    expected = pack_sequence(sequences, enforce_sorted=False)
    assert isinstance(found, PackedSequence)
    for mine, torchs in zip(found, expected, strict=True):
        assert mine.dtype == torchs.dtype
        assert torch.equal(mine, torchs)
