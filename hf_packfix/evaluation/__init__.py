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
from torch import Tensor

from hf_packfix._warnings import warn_once
from hf_packfix.packing import PackedSequence, batch_size, leaves, map_leaves, rows_of_keys

_LEAVE_OUT = (
    "leave it out with ignore_keys= of evaluate() and predict(), or keys_to_ignore_at_inference in the model's "
    "configuration"
)


@dataclass
class Loop:
    """An evaluation loop that runs.

    Attributes:
        evaluates: whether it computes metrics of labels; False for ``predict``, whose rows may have none.
        packed: whether it has met a packed batch.
        steps: the shape of the steps of every input and output of the present batch, by name.
        first_steps: the same in the first batch that had the name.
    """

    evaluates: bool = False
    packed: bool = False
    steps: dict[str, list[int] | None] = field(default_factory=dict)
    first_steps: dict[str, list[int] | None] = field(default_factory=dict)

    def note_outputs(self, inputs: Mapping[str, Any], kept: Any, outputs: Any) -> None:
        """Note the shapes of a packed batch, for errors, and check what the model returned for it.

        Warns once if the first dimension of an output is not the number of rows while that of another one is, such as
        the state ``[L, B, H]`` of a layer beside logits.

        Args:
            inputs: the batch.
            kept: what the loop keeps of the outputs: a tuple, or the only one, or None.
            outputs: all that the model returned, if that is known.

        Raises:
            TypeError: an output holds something that the loop cannot keep, such as a cache.
        """
        self.packed = True
        if kept is None:
            return
        found = _by_name(kept, outputs)
        for name, values in found.items():
            for value in values:
                if not isinstance(value, (Tensor, PackedSequence)):
                    raise TypeError(
                        f"{name} holds a {type(value).__name__}, which cannot be joined with those of other batches: "
                        f"{_LEAVE_OUT}"
                    )
        named = {repr(key): [value] for key, value in inputs.items()} | found
        self.steps = {name: _steps(values[0]) for name, values in named.items() if len(values) == 1}
        self.first_steps = {**self.steps, **self.first_steps}
        rows = set(rows_of_keys(inputs).values())
        sizes = [(name, _rows(value), value) for name, values in found.items() for value in values]
        if not any(size in rows for _, size, _ in sizes):
            return
        for name, size, value in sizes:
            if size is not None and size not in rows and isinstance(value, Tensor):
                warn_once(
                    f"{name} has shape {list(value.shape)} in a batch of {' and '.join(map(str, rows))} rows: the "
                    f"evaluation joins batches along the first dimension, which mixes up the rows. Return the rows "
                    f"first, as state.transpose(0, 1) does for a state [L, B, H], or {_LEAVE_OUT}",
                    cause=f"no batch: {name}",
                )


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


def _by_name(kept: Any, outputs: Any) -> dict[str, list[Any]]:
    """Return the leaves of every output that is kept, by words for the output."""
    several = isinstance(kept, (tuple, list)) and not isinstance(kept, PackedSequence)
    # The loop keeps the values without their keys, detached.
    keys = {_memory(value): key for key, value in outputs.items()} if isinstance(outputs, Mapping) else {}
    result = {}
    for place, value in enumerate(kept if several else [kept]):
        key = keys.get(_memory(value))
        name = f"output {place if key is None else repr(key)} of the model"
        result[name if several or key is not None else "the output of the model"] = leaves(value)
    return result


def _memory(value: Any) -> int:
    first = next(iter(leaves(value)), None)
    return first.data.data_ptr() if isinstance(first, (Tensor, PackedSequence)) else id(first)


def _rows(leaf: Any) -> int | None:
    if isinstance(leaf, PackedSequence):
        return batch_size(leaf)
    return len(leaf) if leaf.dim() else None


def _steps(leaf: Any) -> list[int] | None:
    """Return the dimensions that batches must share, all after rows and steps; None if there are no steps."""
    shape = [1, *leaf.data.shape] if isinstance(leaf, PackedSequence) else getattr(leaf, "shape", ())
    return list(shape[2:]) if len(shape) > 1 else None


def check_same_shapes(first: Any, batch: Any, number: int) -> None:
    """Check that batches of an evaluation can be joined, before the rest of the data set is evaluated.

    Args:
        first: what is kept of the first batch, tensors or arrays ``[B, T, *]`` or ``[B]``.
        batch: the same of a later one.
        number: of that batch.

    Raises:
        ValueError: the numbers of tensors differ, or the shapes ``*``: NumPy and torch would repeat a one.
    """
    expected, shapes = ([_steps(leaf) for leaf in leaves(kept)] for kept in (first, batch))
    if len(shapes) != len(expected):
        raise ValueError(
            f"the model returns {len(shapes)} tensors in batch {number} of the evaluation, but {len(expected)} in "
            f"batch 0: batches can be joined only if all have the same outputs"
        )
    for place, (wanted, found) in enumerate(zip(expected, shapes, strict=True)):
        if found != wanted:
            loop = _loop.get() or Loop()
            names = [n for n, now in loop.steps.items() if (now, loop.first_steps[n]) == (found, wanted)]
            raise ValueError(
                f"{' and '.join(names) or f'number {place} of what the model returns'} has steps of shape {found} in "
                f"batch {number} of the evaluation, but {wanted} in batch 0: batches can be joined only if their "
                f"steps have one shape. If it is an output that no metric needs, {_LEAVE_OUT}; or keep the batches "
                f"apart with TrainingArguments(eval_do_concat_batches=False)"
            )


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
