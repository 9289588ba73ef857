"""What the three kinds of layers share: chunks of rows, states across steps, weight gradients.

Shapes: B sequences, N rows, m rows in a chunk, D inputs, H hidden units, K columns of the hidden product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_packfix.rnn.schedule import Chunk, Schedule

__all__ = [
    "WeightGradients",
    "buffer_rows",
    "chunk_rows",
    "final_rows",
    "project",
    "resized",
    "rolled",
    "started",
    "states_before",
    "steps_of",
]

#: Bytes of the widest buffer of a chunk, so that it stays in a cache; from 512 KiB to 16 MiB, times differ by noise.
_CHUNK_BYTES = 1 << 21
#: With fewer rows a matrix product for the weight gradients is no longer at full speed.
_FEWEST_ROWS = 256


def chunk_rows(like: Tensor, width: int) -> int:
    """Return how many rows of ``width`` values a chunk has."""
    return max(_FEWEST_ROWS, _CHUNK_BYTES // (width * like.element_size()))


def buffer_rows(schedule: Schedule, rows: int) -> int:
    """Return the rows of a buffer that holds any chunk of ``rows``: a chunk ends with the step that reaches it."""
    return min(schedule.rows, rows + schedule.sequences)


def steps_of(chunk: Chunk, tensors: Sequence[Tensor], *, backwards: bool) -> Iterator[tuple[Any, ...]]:
    """Return for every step of a chunk its size b and its rows ``[b, *]`` of each tensor ``[m, *]``.

    One call makes the views of a tensor for all steps; an index for each would take longer than a small step.
    """
    views: list[Sequence[Any]] = [chunk.sizes, *(torch.split_with_sizes(tensor, chunk.sizes) for tensor in tensors)]
    if backwards:
        views = [view[::-1] for view in views]
    return zip(*views, strict=True)


def project(data: Tensor, weight: Tensor, bias: Tensor | None, into: Tensor) -> None:
    """Write ``data @ weight + bias`` for the rows of a chunk, ``[m, *]``."""
    if bias is None:
        torch.mm(data, weight, out=into)
    else:
        torch.addmm(bias, data, weight, out=into)


def resized(state: Tensor, start: Tensor, found: int, size: int) -> Tensor:
    """Return the state ``[size, H]`` that a step begins from, from the one ``[found, H]`` that the step before left.

    Ranks from ``found`` on begin here, from ``start`` ``[B, H]``; those from ``size`` on have ended.
    """
    if found >= size:
        return state[:size]
    return torch.cat((state, start[found:size])) if found else start[:size]


def started(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Return the gradient of the final states, to be added to; zeros if there is none."""
    return torch.zeros_like(like) if gradient is None else gradient.clone(memory_format=torch.contiguous_format)


def rolled(weight: Tensor, hidden: int) -> Tensor:
    """Return the rows ``[K]`` or ``[K, *]`` with the last H of them first."""
    return torch.cat((weight[-hidden:], weight[:-hidden]))


def final_rows(schedule: Schedule, reverse: bool) -> Tensor:
    """Return the row in which each rank's state is final: int64 ``[B]``."""
    return schedule.first_rows if reverse else schedule.last_rows


def states_before(
    states: Tensor, start: Tensor, schedule: Schedule, reverse: bool, chunk: Chunk, buffer: Tensor
) -> Tensor:
    """Return the state ``[m, H]`` that every row of a chunk began from, in ``buffer``.

    Args:
        states: the state after every row, ``[N, H]``.
        start: the initial state of every rank, ``[B, H]``.
        schedule: the packing.
        reverse: whether the layer runs from the last step to the first.
        chunk: the rows asked for.
        buffer: ``[m or more, H]``.
    """
    before = schedule.rows_after if reverse else schedule.rows_before
    result = buffer[: chunk.stop - chunk.start]
    torch.index_select(states, 0, before[chunk.start : chunk.stop], out=result)
    rows = final_rows(schedule, not reverse)
    if result.shape[0] == schedule.rows:
        return result.index_copy_(0, rows, start)
    ranks = ((rows >= chunk.start) & (rows < chunk.stop)).nonzero().squeeze(1)
    return result.index_copy_(0, rows[ranks] - chunk.start, start.index_select(0, ranks))


class WeightGradients:
    """The gradients of the weights and biases of one layer and direction, summed over chunks.

    Attributes:
        ih: of ``weight_ih``, ``[*, D]``; None before the first chunk, and if not asked for. The same for the others.
        hh: of ``weight_hh``, ``[*, H]``.
        bias: the sum of the factors over all rows.
    """

    def __init__(self, needed: Sequence[bool]) -> None:
        self._ih, self._hh, *biases = needed
        self._bias = any(biases)
        self.ih: Tensor | None = None
        self.hh: Tensor | None = None
        self.bias: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.ih, self.hh, self.bias))

    def add(self, for_input: Tensor, for_hidden: Tensor, both: Tensor, data: Tensor, before: Tensor) -> None:
        """Add a chunk.

        Args:
            for_input: gradients of what the input's product was added to, ``[m, *]``.
            for_hidden: the same for the hidden product.
            both: gradients of all columns, for the biases.
            data: the inputs, ``[m, D]``.
            before: the states that the rows began from, ``[m, H]``.
        """
        if self._ih:
            self.ih = _add_product(self.ih, for_input, data)
        if self._hh:
            self.hh = _add_product(self.hh, for_hidden, before)
        if self._bias:
            total = both.sum(0)
            self.bias = total if self.bias is None else self.bias.add_(total)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return left.t() @ right if total is None else total.addmm_(left.t(), right)
