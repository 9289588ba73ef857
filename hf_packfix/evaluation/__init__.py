"""What an evaluation loop knows about packed batches, and how it joins what it has kept of them.

The Trainer's loop concatenates padded batches one by one: each time it copies all earlier batches, so its cost grows
with the square of the number of rows. Once the loop has met a packed batch, its containers keep the batches apart, and
:func:`join` makes one array of them at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_packfix.packing import leaves, map_leaves


@dataclass
class Loop:
    """An evaluation loop that runs.

    Attributes:
        evaluates: whether it computes metrics of labels; False for ``predict``, whose rows may have none.
        packed: whether it has met a packed batch.
        steps: the shape of the steps of what is packed in the present batch, or made of it, by name.
        first_steps: the same in the first batch that had the name.
    """

    evaluates: bool = False
    packed: bool = False
    steps: dict[str, list[int]] = field(default_factory=dict)
    first_steps: dict[str, list[int]] = field(default_factory=dict)

    def note(self, steps: Mapping[str, list[int]]) -> None:
        """Note the shapes of the steps of a packed batch."""
        self.packed = True
        self.steps = dict(steps)
        self.first_steps = {**steps, **self.first_steps}


_loop: ContextVar[Loop | None] = ContextVar("hf_packfix_evaluation_loop", default=None)


@contextmanager
def running(loop: Loop) -> Iterator[Loop]:
    """Let :func:`current` return this loop."""
    token = _loop.set(loop)
    try:
        yield loop
    finally:
        _loop.reset(token)


def current() -> Loop | None:
    """Return the evaluation loop that runs; None outside of one."""
    return _loop.get()


def is_packed() -> bool:
    """Return whether an evaluation loop runs that has met a packed batch."""
    loop = _loop.get()
    return loop is not None and loop.packed


class SameShapes:
    """A check that the batches of an evaluation can be joined, before the rest of the data set is evaluated.

    Args:
        batches: what is kept of batches so far.
    """

    def __init__(self, batches: list[Any]) -> None:
        self._expected: list[list[int] | None] | None = None
        self._number = 0
        for batch in batches:
            self(batch)

    def __call__(self, batch: Any) -> None:
        """Compare the shapes ``*`` of what is kept of a batch, tensors ``[B, T, *]`` or ``[B]``, with the first one's.

        Raises:
            ValueError: the numbers of tensors differ, or the shapes, of which NumPy and torch would repeat a one.
        """
        shapes = [list(leaf.shape[2:]) if len(leaf.shape) > 1 else None for leaf in leaves(batch)]
        expected = self._expected = shapes if self._expected is None else self._expected
        if len(shapes) != len(expected):
            raise ValueError(
                f"the model returns {len(shapes)} tensors in batch {self._number} of the evaluation, but "
                f"{len(expected)} in batch 0: batches can be joined only if all have the same outputs"
            )
        for place, (first, found) in enumerate(zip(expected, shapes, strict=True)):
            if found != first:
                loop = _loop.get() or Loop()
                names = [n for n, now in loop.steps.items() if (now, loop.first_steps[n]) == (found, first)]
                raise ValueError(
                    f"{' and '.join(names) or f'number {place} of what the model returns'} has steps of shape "
                    f"{found} in batch {self._number} of the evaluation, but {first} in batch 0: batches can be "
                    f"joined only if their steps have one shape. Let the model or preprocess_logits_for_metrics "
                    f"return the same features in every batch, or pass "
                    f"TrainingArguments(eval_do_concat_batches=False)"
                )
        self._number += 1


def join(batches: list[Any], padding: float) -> Any:
    """Return one batch of arrays ``[sum of B, max of T, *]``, as concatenating the batches one by one would give it.

    Args:
        batches: nested batches of arrays, all of one structure. The list is emptied: a piece is freed as soon as it is
            copied, so that the peak is little more than the result.
        padding: what stands behind the end of a row.
    """
    first = batches[0]
    columns = [list(column) for column in zip(*map(leaves, batches), strict=True)]
    batches.clear()
    joined = iter([_join(column, padding) for column in columns])
    return map_leaves(lambda _: next(joined), first)


def _join(pieces: list[Any], padding: float) -> Any:
    if len(pieces) == 1:
        return pieces[0]  # a scalar stays one: only what is concatenated gets a dimension
    pieces = [np.atleast_1d(piece) for piece in pieces]
    width = [max(piece.shape[1] for piece in pieces)] if pieces[0].ndim > 1 else []
    shape = [sum(map(len, pieces)), *width, *pieces[0].shape[2:]]
    # Empty: pages of memory that are not written yet do not count.
    result = np.empty(shape, np.result_type(*pieces))
    top = 0
    for number, piece in enumerate(pieces):
        rows = result[top : top + len(piece)]
        top += len(piece)
        if width:
            rows[:, piece.shape[1] :] = padding
            rows = rows[:, : piece.shape[1]]
        rows[...] = piece
        pieces[number] = piece = None
    return result
