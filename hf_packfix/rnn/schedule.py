"""The order in which a recurrent layer visits the rows of a packed sequence.

Shapes: B sequences, T steps in the longest one, N rows of ``data`` in all. The rank of a sequence is its place in the
sorted order, longest first: row n of ``data`` belongs to step t and rank r if it is row r of the ``batch_sizes[t]``
rows of step t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

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

    def steps(self, tensors: Sequence[Tensor], *, backwards: bool) -> Iterator[tuple[Any, ...]]:
        """Return for every step its size b and its rows ``[b, *]`` of each tensor ``[m, *]`` of the chunk.

        One call makes the views of a tensor for all steps; an index for each would take longer than a small step.
        """
        views: list[Sequence[Any]] = [self.sizes, *(torch.split_with_sizes(tensor, self.sizes) for tensor in tensors)]
        if backwards:
            views = [view[::-1] for view in views]
        return zip(*views, strict=True)


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
        self._kept: dict[str, Tensor] = {}

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

    def final_rows(self, reverse: bool) -> Tensor:
        """Return the row in which each rank's state is final: int64 ``[B]``."""
        return self._indices("_first_rows" if reverse else "_last_rows")

    def states_before(self, states: Tensor, start: Tensor, reverse: bool, chunk: Chunk | None = None) -> Tensor:
        """Return the state ``[m, H]`` that every row of a chunk began from.

        Args:
            states: the state after every row, ``[N, H]``.
            start: the initial state of every rank, ``[B, H]``.
            reverse: whether the layer runs from the last step to the first.
            chunk: the rows asked for; all by default.
        """
        before = self._indices("_rows_after" if reverse else "_rows_before")
        if chunk is None or chunk.stop - chunk.start == self.rows:
            return states.index_select(0, before).index_copy_(0, self.final_rows(not reverse), start)
        result = states.index_select(0, before[chunk.start : chunk.stop])
        first = self._last_rows if reverse else self._first_rows
        ranks = ((first >= chunk.start) & (first < chunk.stop)).nonzero()[0]
        if len(ranks):
            result.index_copy_(0, _indices(first[ranks] - chunk.start), start.index_select(0, _indices(ranks)))
        return result

    @cached_property
    def _first_rows(self) -> Any:
        """The row of every rank's first step."""
        return np.arange(self.sequences, dtype=np.int64)

    @cached_property
    def _last_rows(self) -> Any:
        """The row of every rank's last step."""
        found: list[int] = []
        start = self.rows
        # As many sequences end with a step as there are fewer in the next one; those with the highest rank end first.
        for size in reversed(self.sizes):
            start -= size
            if size > len(found):
                found.extend(range(start + len(found), start + size))
        return np.array(found, dtype=np.int64)

    @property
    def _rows_before(self) -> Any:
        """For every row the row of the same rank one step before; 0 for first steps."""
        rows, counts = np.arange(self.rows, dtype=np.int64), np.array(self.sizes, dtype=np.int64)
        rows[self.sequences :] -= counts[:-1].repeat(counts[1:])
        rows[: self.sequences] = 0
        return rows

    @property
    def _rows_after(self) -> Any:
        """For every row the row of the same rank one step after; 0 for last steps."""
        rows = np.arange(self.rows, dtype=np.int64) + np.array(self.sizes).repeat(self.sizes)
        rows[self._last_rows] = 0
        return rows

    def _indices(self, name: str) -> Tensor:
        if name not in self._kept:
            self._kept[name] = _indices(getattr(self, name))
        return self._kept[name]


def _indices(rows: Any) -> Tensor:
    # `Tensor.numpy` would not do: torch before 2.3 cannot share memory with numpy 2.
    return torch.frombuffer(rows, dtype=torch.int64)
