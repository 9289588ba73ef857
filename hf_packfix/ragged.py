"""Rectangles that remember how long their rows are, and a store that keeps them flat.

The evaluation loop asks for rectangles and concatenates them batch by batch: it copies everything it has so far
each time, padding included, so that its cost grows with the square of the number of rows. A rectangle made of a
pack remembers its lengths. As long as nobody has changed it, its real steps and the lengths are all there is to
keep, and one rectangle is built at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_packfix.nested import rebuild

__all__ = ["Pieces", "Strip", "any_remembered", "is_remembered", "lengths_of", "remember"]

#: The attribute of a tensor that holds its lengths and its version counter at that time.
_ATTRIBUTE = "_hf_packfix_lengths"


def remember(rectangle: Tensor, lengths: Tensor) -> Tensor:
    """Note the lengths of the rows, int64 ``[B]`` on the CPU, of a rectangle ``[B, T, *]``; return it.

    A tensor of ``torch.inference_mode`` has no version counter, so nothing could tell whether it was changed since:
    nothing is noted.
    """
    if not rectangle.is_inference():
        setattr(rectangle, _ATTRIBUTE, (lengths, rectangle._version))
    return rectangle


def is_remembered(value: Any) -> bool:
    """Tell whether lengths were noted for this very object, even if it was changed since."""
    return isinstance(value, Tensor) and hasattr(value, _ATTRIBUTE)


def lengths_of(value: Any) -> Tensor | None:
    """Return the lengths noted for a rectangle, int64 ``[B]``; None where there are none, or it was changed since."""
    lengths, version = getattr(value, _ATTRIBUTE, (None, None))
    return lengths if lengths is not None and value._version == version else None


def any_remembered(tree: Any) -> bool:
    """Tell whether there is a rectangle with lengths anywhere in ``tree``."""
    if isinstance(tree, Tensor):
        return lengths_of(tree) is not None
    if isinstance(tree, Mapping):
        return any(map(any_remembered, tree.values()))
    return isinstance(tree, (tuple, list)) and any(map(any_remembered, tree))


@dataclass
class Strip:
    """The real steps of a rectangle ``[B, T, *]``.

    Attributes:
        flat: ``[N, *]``, the rows one after the other.
        lengths: int64 ``[B]`` on the CPU.
        width: T.
    """

    flat: Tensor
    lengths: Tensor
    width: int


class Pieces:
    """What a container of the evaluation loop has got so far: nested batches of strips and tensors.

    Args:
        padding: what stands behind the end of a row in the result.
    """

    def __init__(self, padding: float) -> None:
        self._padding = padding
        self._batches: list[Any] = []

    def add(self, tree: Any) -> None:
        """Keep a batch: the real steps of rectangles that know their lengths, the rest as it is."""
        self._batches.append(_strip(tree))

    def to_cpu(self) -> None:
        """Move everything to the CPU."""
        self._batches = [_to_cpu(tree) for tree in self._batches]

    def merge(self) -> Any:
        """Return one batch of CPU tensors: ``[sum of B, max of T, *]``, padded, as concatenating them would give.

        Nothing is kept afterwards; until then what was flat is held beside the rectangle.
        """
        batches, self._batches = self._batches, []
        return _merge(batches, self._padding)


def _strip(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        lengths = lengths_of(tree)
        if lengths is None:
            return tree
        real = torch.arange(tree.shape[1]) < lengths[:, None]
        return Strip(tree[real.to(tree.device)], lengths, tree.shape[1])
    if isinstance(tree, Mapping):
        return type(tree)({key: _strip(value) for key, value in tree.items()})  # type: ignore[call-arg]
    return rebuild(tree, [_strip(item) for item in tree]) if isinstance(tree, (tuple, list)) else tree


def _to_cpu(tree: Any) -> Any:
    if isinstance(tree, Strip):
        return Strip(tree.flat.cpu(), tree.lengths, tree.width)
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
        columns = zip(*trees, strict=True)
        return rebuild(first, [_merge(column, padding) for column in columns])
    return _rectangle(trees, padding)


def _rectangle(pieces: Sequence[Strip | Tensor], padding: float) -> Tensor:
    if not any(isinstance(piece, Strip) for piece in pieces):
        tensors = [torch.atleast_1d(piece).cpu() for piece in pieces]
        if tensors[0].dim() == 1 or len({tensor.shape[1] for tensor in tensors}) == 1:
            return torch.cat(tensors)
        pieces = tensors
    heights = [len(piece.lengths) if isinstance(piece, Strip) else len(piece) for piece in pieces]
    widths = [piece.width if isinstance(piece, Strip) else piece.shape[1] for piece in pieces]
    like = pieces[0].flat if isinstance(pieces[0], Strip) else pieces[0]
    trailing = like.shape[1:] if isinstance(pieces[0], Strip) else like.shape[2:]
    result = torch.full((sum(heights), max(widths), *trailing), padding, dtype=like.dtype)
    top = 0
    for piece, height, width in zip(pieces, heights, widths, strict=True):
        rows = result[top : top + height, :width]
        if isinstance(piece, Strip):
            rows[torch.arange(width) < piece.lengths[:, None]] = piece.flat.cpu().to(like.dtype)
        else:
            rows.copy_(piece)
        top += height
    return result
