"""Windows of steps, for truncated backpropagation through time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hf_packfix.packing.packed import PackedSequence, batch_size, check

State = TypeVar("State", Tensor, tuple[Tensor, ...], None)


@dataclass(frozen=True)
class Window:
    """Some steps of the sequences of a batch; those that have ended before are not in it.

    Attributes:
        packed: the steps, ``[N', *]`` of B' sequences; their order is that of the batch.
        rows: int64 ``[B']``, the place of each sequence in the batch.
        carried: int64 ``[B']``, the place of each sequence in the window before; in the batch for the first window.
    """

    packed: PackedSequence
    rows: Tensor
    carried: Tensor

    def carry(self, state: State) -> State:
        """Return the state in which this window begins, detached.

        Args:
            state: the final state of the window before, ``[L, B, H]``, for an LSTM a tuple of two; None, as before the
                first window, stays None.

        Returns:
            The same for the sequences of this window, ``[L, B', H]``.
        """
        if state is None or isinstance(state, Tensor):
            return None if state is None else state.detach().index_select(1, self.carried)
        return tuple(part.detach().index_select(1, self.carried) for part in state)


def windows(packed: PackedSequence, steps: int) -> Iterator[Window]:
    """Cut a PackedSequence into windows of so many steps, with the sequences that go on.

    The windows share their memory with ``packed``: nothing is copied.

    Args:
        packed: the sequences.
        steps: of a window, at least 1; the last one may have fewer.

    Yields:
        The windows, from the first steps to the last.

    Raises:
        TypeError: ``packed`` is not a PackedSequence.
        ValueError: ``steps`` is below 1, or the fields of ``packed`` contradict each other.

    Example:
        >>> import torch
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> x = pack_sequence([torch.randn(2, 3), torch.randn(5, 3), torch.randn(4, 3)], enforce_sorted=False)
        >>> lstm, state = torch.nn.LSTM(3, 8), None
        >>> for window in windows(x, 2):
        ...     output, state = lstm(window.packed, window.carry(state))
        ...     output.data.mean().backward()  # goes back two steps
        ...     print(window.rows.tolist(), window.packed.batch_sizes.tolist())
        [0, 1, 2] [3, 3]
        [1, 2] [2, 2]
        [1] [1]
    """
    check(packed)
    if steps < 1:
        raise ValueError(f"a window must have at least one step, found steps={steps}")
    return _windows(packed, steps)


def _windows(packed: PackedSequence, steps: int) -> Iterator[Window]:
    data, batch_sizes, sorted_indices, _ = packed
    before = torch.arange(batch_size(packed), device="cpu" if sorted_indices is None else sorted_indices.device)
    start = 0
    for sizes in batch_sizes.split(steps):
        stop = start + int(sizes.sum())
        if sorted_indices is None:
            rows = before[: int(sizes[0])]
            piece = PackedSequence(data[start:stop], sizes)
        else:
            # The longest sequences come first; `place` is the place of each one, in the order of the batch.
            rows, place = sorted_indices[: int(sizes[0])].sort()
            piece = PackedSequence(data[start:stop], sizes, place.argsort(), place)
        yield Window(piece, rows, torch.searchsorted(before, rows))
        before, start = rows, stop
