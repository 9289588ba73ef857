"""The order in which a recurrent layer visits the rows of a packed sequence.

Shapes: B sequences, T steps in the longest one, N rows of ``data`` in all. The rank of a sequence is its place in the
sorted order, longest first: row n of ``data`` belongs to step t and rank r if it is row r of the ``batch_sizes[t]``
rows of step t.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Schedule"]


class Schedule:
    """Which row follows which in one packing; shared by all layers and directions of a call.

    The indices are computed with numpy: torch would wake its other threads for them.

    Attributes:
        batch_sizes: int64 ``[T]``, CPU.
        sizes: the same as a list.
        sequences: B.
        rows: N.
    """

    def __init__(self, batch_sizes: Tensor, sizes: list[int]) -> None:
        self.batch_sizes = batch_sizes
        self.sizes = sizes
        self.sequences = sizes[0]
        self.rows = sum(sizes)

    def steps(self, tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        """Return for every step its size b and its rows ``[b, *]`` of each tensor ``[N, *]``.

        One call makes the views of a tensor for all steps; an index for each would take longer than a small step.
        """
        views = [torch.unsafe_split_with_sizes(tensor, self.sizes) for tensor in tensors]
        return list(zip(self.sizes, *views, strict=True))

    def states_before(self, states: Tensor, start: Tensor) -> Tensor:
        """Return the state ``[N, *]`` that every row began from, where ``states`` are those after it.

        ``start`` is the initial state of every rank, ``[B, *]``.
        """
        before = states.index_select(0, self._rows_before)
        before[: self.sequences] = start
        return before

    @cached_property
    def last_rows(self) -> Tensor:
        """The row of every rank's last step: int64 ``[B]``."""
        return _indices(self._first_row_of[self._lengths - 1] + np.arange(self.sequences))

    @cached_property
    def reversed_rows(self) -> Tensor:
        """For every row, the one in its place when the steps of each sequence are reversed: int64 ``[N]``."""
        steps = np.arange(len(self.sizes)).repeat(self.sizes)
        ranks = np.arange(self.rows) - self._first_row_of[steps]
        return _indices(self._first_row_of[self._lengths[ranks] - 1 - steps] + ranks)

    @cached_property
    def _rows_before(self) -> Tensor:
        """For every row the row of the same rank one step before; 0 for first steps."""
        rows, counts = np.arange(self.rows), np.array(self.sizes)
        rows[self.sequences :] -= counts[:-1].repeat(counts[1:])
        rows[: self.sequences] = 0
        return _indices(rows)

    @cached_property
    def _first_row_of(self) -> Any:
        """The first row of every step."""
        return np.cumsum([0, *self.sizes[:-1]])

    @cached_property
    def _lengths(self) -> Any:
        """The number of steps of every rank: of rank r, the steps that have more than r rows."""
        return len(self.sizes) - np.searchsorted(self.sizes[::-1], np.arange(self.sequences), side="right")


def _indices(rows: Any) -> Tensor:
    # `Tensor.numpy` would not do: torch before 2.3 cannot share memory with numpy 2.
    return torch.frombuffer(rows.astype(np.int64), dtype=torch.int64)
