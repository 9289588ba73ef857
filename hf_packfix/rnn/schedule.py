"""The order in which a recurrent layer visits the rows of a packed sequence.

Shapes: B sequences, T steps in the longest one, N rows of ``data`` in all. The rank of a sequence is its place in the
sorted order, longest first: row n of ``data`` belongs to step t and rank r if it is row r of the ``batch_sizes[t]``
rows of step t.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from hf_packfix.packing.packed import group_and_place, lengths_by_rank

__all__ = ["Chunk", "Schedule"]


class Chunk(NamedTuple):
    """Consecutive steps, and the rows of ``data`` that they have.

    Attributes:
        start: the first row.
        stop: one past the last row.
        sizes: the number of rows of each step, in the order of ``data``.
    """

    start: int
    stop: int
    sizes: list[int]


class Schedule:
    """Which row follows which in one packing; shared by all layers and directions of a call.

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

    def chunks(self, rows: int, *, backwards: bool) -> Iterator[Chunk]:
        """Yield all steps in chunks of about so many rows, from the last step to the first if ``backwards``.

        A chunk ends with the step that reaches ``rows``; every chunk has at least one step.
        """
        bounds = [0]
        starts = [0]
        total = counted = 0
        for step, size in enumerate(self.sizes, 1):
            total += size
            counted += size
            if counted >= rows or step == len(self.sizes):
                bounds.append(step)
                starts.append(total)
                counted = 0
        order = range(len(bounds) - 1)
        for index in reversed(order) if backwards else order:
            yield Chunk(starts[index], starts[index + 1], self.sizes[bounds[index] : bounds[index + 1]])

    @cached_property
    def first_rows(self) -> Tensor:
        """The row of every rank's first step: int64 ``[B]``."""
        return torch.arange(self.sequences, device="cpu")

    @cached_property
    def last_rows(self) -> Tensor:
        """The row of every rank's last step: int64 ``[B]``."""
        return self._offsets[self._lengths - 1] + self.first_rows

    @cached_property
    def rows_before(self) -> Tensor:
        """For every row the row of the same rank one step before; 0 for first steps: int64 ``[N]``."""
        rows = torch.arange(self.rows, device="cpu")
        sizes = self.batch_sizes
        rows[self.sequences :] -= sizes[:-1].repeat_interleave(sizes[1:])
        rows[: self.sequences] = 0
        return rows

    @cached_property
    def rows_after(self) -> Tensor:
        """For every row the row of the same rank one step after; 0 for last steps: int64 ``[N]``."""
        rows = torch.arange(self.rows, device="cpu") + self.batch_sizes.repeat_interleave(self.batch_sizes)
        rows[self.last_rows] = 0
        return rows

    @cached_property
    def reversal(self) -> Tensor:
        """For every row the row at the same distance from the other end of its sequence: int64 ``[N]``."""
        steps, ranks = group_and_place(self.batch_sizes)
        return self._offsets[self._lengths[ranks] - 1 - steps] + ranks

    @cached_property
    def _offsets(self) -> Tensor:
        return self.batch_sizes.cumsum(0) - self.batch_sizes

    @cached_property
    def _lengths(self) -> Tensor:
        return lengths_by_rank(self.batch_sizes)
