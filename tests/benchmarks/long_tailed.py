"""Sequences whose lengths have a long tail: most are short, and one long one sets the width of a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHORTEST, LONGEST = 4, 300


def lengths(count: int, generator: torch.Generator) -> list[int]:
    """Return lengths of 4 to 300 with a median of about 30: log-normal, cut at both ends."""
    normal = torch.randn(count, generator=generator)
    return (math.log(30) + 0.9 * normal).exp().round().clamp(SHORTEST, LONGEST).long().tolist()


def rows(count: int, vocabulary: int, labels: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Return rows of token ids, and a label below ``labels`` for every token: int64 ``[T]`` each.

    Id 0 is left to padding.
    """
    generator = torch.Generator().manual_seed(seed)
    result = []
    for length in lengths(count, generator):
        ids = torch.randint(1, vocabulary, (length,), generator=generator)
        result.append({"input_ids": ids, "labels": ids % labels})
    return result
