"""Padded tensors that remember their lengths, and the buffer that keeps an evaluation without padding.

The evaluation loop pads the batches, and concatenates them one by one: each time it copies all earlier batches,
padding included, so its cost grows with the square of the number of rows. A padded tensor made of a PackedSequence
remembers its lengths. As long as it is not changed, its real steps and the lengths are enough to keep, and one padded
tensor is built at the end. What else the loop adds, such as class numbers that ``preprocess_logits_for_metrics`` made
of the logits, is kept batch by batch and joined once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_packfix.packing.trees import any_leaf, rebuild

__all__ = [
    "EvaluationBuffer",
    "Jagged",
    "any_has_lengths",
    "evaluation_loop",
    "has_lengths",
    "lengths_of",
    "loop_is_packed",
    "note_packed",
    "note_steps",
    "with_lengths",
]

#: The attribute of a tensor that holds its lengths and its version counter at that time.
_ATTRIBUTE = "_hf_packfix_lengths"


class _Loop:
    def __init__(self) -> None:
        self.packed = False
        #: The shape of the steps of what is packed, by name: in the first batch that had the name, and in this one.
        self.first: dict[str, list[int]] = {}
        self.now: dict[str, list[int]] = {}


_loop: ContextVar[_Loop | None] = ContextVar("hf_packfix_evaluation_loop", default=None)


@contextmanager
def evaluation_loop() -> Iterator[None]:
    """Let :func:`note_packed` and :func:`loop_is_packed` mean the evaluation loop that runs inside."""
    token = _loop.set(_Loop())
    try:
        yield
    finally:
        _loop.reset(token)


def note_packed() -> None:
    """Note that the evaluation loop has met a packed batch; does nothing outside of a loop."""
    loop = _loop.get()
    if loop is not None:
        loop.packed = True


def note_steps(steps: Mapping[str, list[int]]) -> None:
    """Note the shape of the steps of what is packed in a batch, by name, for the error about shapes that differ."""
    loop = _loop.get()
    if loop is not None:
        loop.now = dict(steps)
        loop.first = {**steps, **loop.first}


def loop_is_packed() -> bool:
    """Return whether the evaluation loop has met a packed batch."""
    loop = _loop.get()
    return loop is not None and loop.packed


def with_lengths(padded: Tensor, lengths: Tensor) -> Tensor:
    """Note the lengths of the rows, int64 ``[B]`` on the CPU, of a padded tensor ``[B, T, *]``; return it.

    A tensor of ``torch.inference_mode`` has no version counter that would show a later change: nothing is noted.
    """
    if not padded.is_inference():
        setattr(padded, _ATTRIBUTE, (lengths, padded._version))
    return padded


def has_lengths(value: Any) -> bool:
    """Return whether lengths were noted for this very object, even if it was changed since."""
    return isinstance(value, Tensor) and hasattr(value, _ATTRIBUTE)


def lengths_of(value: Any) -> Tensor | None:
    """Return the lengths noted for a padded tensor, int64 ``[B]``; None if there are none, or it was changed since."""
    lengths, version = getattr(value, _ATTRIBUTE, (None, None))
    return lengths if lengths is not None and value._version == version else None


def any_has_lengths(tree: Any) -> bool:
    """Return whether there is a padded tensor with lengths anywhere in ``tree``."""
    return any_leaf(tree, lambda leaf: lengths_of(leaf) is not None)


@dataclass
class Jagged:
    """The real steps of a padded tensor ``[B, T, *]``.

    Attributes:
        values: ``[N, *]``, the rows one after the other.
        lengths: int64 ``[B]`` on the CPU.
        width: T.
    """

    values: Tensor
    lengths: Tensor
    width: int


class EvaluationBuffer:
    """What a container of the evaluation loop has got so far: nested batches of strips and tensors.

    Args:
        padding: what stands behind the end of a row in the result.
    """

    def __init__(self, padding: float) -> None:
        self._padding = padding
        self._batches: list[Any] = []
        self._on_cpu = 0  # how many of them, from the first on

    def add(self, tree: Any) -> None:
        """Keep a batch: the real steps of padded tensors that know their lengths, the rest as it is.

        Raises:
            ValueError: the steps of a PackedSequence have another shape than in the first batch.
        """
        batch = _to_jagged(tree, self._padding)
        if self._batches:
            _check_steps(self._batches[0], batch, len(self._batches))
        self._batches.append(batch)

    def to_cpu(self) -> None:
        """Move everything to the CPU."""
        self._batches[self._on_cpu :] = map(_to_cpu, self._batches[self._on_cpu :])
        self._on_cpu = len(self._batches)

    def merge(self) -> Any:
        """Return one batch of CPU tensors: ``[sum of B, max of T, *]``, padded, as concatenating them would give.

        Nothing is kept afterwards; until then the buffer holds the real steps beside the padded tensor.
        """
        batches, self._batches = self._batches, []
        return _merge(batches, self._padding)


def _to_jagged(tree: Any, padding: float) -> Any:
    if isinstance(tree, Tensor):
        lengths = lengths_of(tree)
        if lengths is None:
            return tree.clone()  # whoever made it may use its memory again for the next batch
        real = (torch.arange(tree.shape[1], device="cpu") < lengths[:, None]).to(tree.device)
        # What was written through `.data` or `.numpy()` does not count as a version: stock keeps it, so look.
        if bool((tree[~real] != padding).any()):
            return tree.clone()
        return Jagged(tree[real], lengths, tree.shape[1])
    if isinstance(tree, Mapping):
        return type(tree)({key: _to_jagged(value, padding) for key, value in tree.items()})  # type: ignore[call-arg]
    return rebuild(tree, [_to_jagged(item, padding) for item in tree]) if isinstance(tree, (tuple, list)) else tree


def _check_steps(first: Any, batch: Any, number: int, name: str = "") -> None:
    """Raise if the steps of a batch would not fit into the result; a trailing dimension of one would be repeated."""
    if isinstance(first, Mapping) and isinstance(batch, Mapping):
        for key in first.keys() & batch.keys():
            _check_steps(first[key], batch[key], number, repr(key))
    elif isinstance(first, (tuple, list)) and isinstance(batch, (tuple, list)):
        for place, pair in enumerate(zip(first, batch, strict=False)):
            _check_steps(*pair, number, f"position {place}")
    elif isinstance(first, Jagged) or isinstance(batch, Jagged):
        expected, found = _steps(first), _steps(batch)
        if found != expected:
            raise ValueError(
                f"{_names(found, expected) or name or 'what the model returns'} has steps of shape {found} in batch "
                f"{number} of the evaluation, but {expected} in batch 0: batches can be joined only if their steps "
                f"have one shape"
            )


def _steps(leaf: Any) -> list[int] | None:
    if isinstance(leaf, Jagged):
        return list(leaf.values.shape[1:])
    return list(leaf.shape[2:]) if isinstance(leaf, Tensor) else None


def _names(found: list[int] | None, expected: list[int] | None) -> str:
    """Return the names in the batch of what changed from one shape to the other."""
    loop = _loop.get() or _Loop()
    return " and ".join(name for name, now in loop.now.items() if (now, loop.first[name]) == (found, expected))


def _to_cpu(tree: Any) -> Any:
    if isinstance(tree, Jagged):
        return Jagged(tree.values.cpu(), tree.lengths, tree.width)
    if isinstance(tree, Tensor):
        return tree.cpu()
    if isinstance(tree, Mapping):
        return type(tree)({key: _to_cpu(value) for key, value in tree.items()})  # type: ignore[call-arg]
    return rebuild(tree, [_to_cpu(item) for item in tree]) if isinstance(tree, (tuple, list)) else tree


def _merge(trees: Sequence[Any], padding: float) -> Any:
    first = trees[0]
    if isinstance(first, Mapping):
        return type(first)({key: _merge([tree[key] for tree in trees], padding) for key in first})  # type: ignore[call-arg]
    if isinstance(first, (tuple, list)):
        # Not strict: upstream's `nested_concat` also stops at the shortest.
        return rebuild(first, [_merge(column, padding) for column in zip(*trees, strict=False)])
    if len(trees) == 1 and not isinstance(first, Jagged):
        return _to_cpu(first)  # a scalar stays one: only what is concatenated gets a dimension
    return _padded([_as_piece(tree) for tree in trees], padding)


def _as_piece(leaf: Any) -> Jagged | Tensor:
    if isinstance(leaf, Jagged):
        return leaf
    if not isinstance(leaf, Tensor):
        raise TypeError(f"Unsupported type for concatenation: got {type(leaf)}")  # upstream's words
    piece: Tensor = torch.atleast_1d(leaf).cpu()
    return piece


def _common_dtype(pieces: Sequence[Jagged | Tensor]) -> torch.dtype:
    """Return the dtype of the result: as upstream's pairs give it, promoted between pieces of the same width."""
    dtypes = [piece.values.dtype if isinstance(piece, Jagged) else piece.dtype for piece in pieces]
    dtype, width = dtypes[0], _width(pieces[0])
    for piece, other in zip(pieces, dtypes, strict=True):
        if _width(piece) == width:
            dtype = torch.promote_types(dtype, other)
        width = max(width, _width(piece))
    return dtype


def _width(piece: Jagged | Tensor) -> int:
    return piece.width if isinstance(piece, Jagged) else piece.shape[1]


def _padded(pieces: Sequence[Jagged | Tensor], padding: float) -> Tensor:
    tensors = [piece for piece in pieces if isinstance(piece, Tensor)]
    if len(tensors) == len(pieces) and (tensors[0].dim() == 1 or len({tensor.shape[1] for tensor in tensors}) == 1):
        return torch.cat(tensors)
    heights = [len(piece.lengths) if isinstance(piece, Jagged) else len(piece) for piece in pieces]
    widths = list(map(_width, pieces))
    trailing, *others = {piece.values.shape[1:] if isinstance(piece, Jagged) else piece.shape[2:] for piece in pieces}
    if others:  # torch would broadcast some of them
        found = ", ".join(sorted(str(list(shape)) for shape in (trailing, *others)))
        raise ValueError(
            f"batches can be joined only if their steps have one shape, found {found}: let the model or "
            f"preprocess_logits_for_metrics return the same features in every batch, or pass "
            f"TrainingArguments(eval_do_concat_batches=False)"
        )
    result = torch.full((sum(heights), max(widths), *trailing), padding, dtype=_common_dtype(pieces), device="cpu")
    top = 0
    for piece, height, width in zip(pieces, heights, widths, strict=True):
        rows = result[top : top + height, :width]
        if isinstance(piece, Jagged):
            rows[torch.arange(width, device="cpu") < piece.lengths[:, None]] = piece.values.cpu().to(result.dtype)
        else:
            rows.copy_(piece)
        top += height
    return result
