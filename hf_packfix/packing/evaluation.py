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

from hf_packfix._warnings import warn_once
from hf_packfix.packing.packed import PackedSequence, batch_size
from hf_packfix.packing.trees import any_leaf, rebuild, sequences_of_keys

_LEAVE_OUT = (
    "leave it out with ignore_keys= of evaluate() and predict(), or keys_to_ignore_at_inference in the model's "
    "configuration"
)

#: The attribute of a tensor that holds its lengths and its version counter at that time.
_ATTRIBUTE = "_hf_packfix_lengths"


class _Loop:
    def __init__(self) -> None:
        self.packed = False
        #: The shape of the steps by name of the input or output: in the first batch that had it, and in this one.
        self.first: dict[str, list[int] | None] = {}
        self.now: dict[str, list[int] | None] = {}


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


def note_outputs(inputs: Mapping[str, Any], kept: Any, outputs: Any) -> None:
    """Note the shapes of a packed batch in an evaluation loop, for errors, and check what the model returned for it.

    Warns once if the first dimension of an output is not the number of rows while that of another one is, such as the
    state ``[L, B, H]`` of a layer beside logits.

    Args:
        inputs: the batch.
        kept: what the loop keeps of the outputs: a tuple, or the only one, or None.
        outputs: all that the model returned, if that is known.

    Raises:
        TypeError: an output holds something that the loop cannot keep, such as a cache.
    """
    loop = _loop.get()
    if loop is None or kept is None:
        return
    found = _by_name(kept, outputs)
    for name, leaves in found.items():
        other = next((leaf for leaf in leaves if not isinstance(leaf, (Tensor, PackedSequence))), leaves)
        if other is not leaves:
            kind = type(other).__name__
            raise TypeError(f"{name} holds a {kind}, which cannot be joined with those of other batches: {_LEAVE_OUT}")
    named = {repr(key): [value] for key, value in inputs.items()} | found
    loop.now = {name: _steps(leaves[0]) for name, leaves in named.items() if len(leaves) == 1}
    loop.first = {**loop.now, **loop.first}
    rows = set(sequences_of_keys(inputs).values())
    sizes = [(name, leaf, _rows(leaf)) for name, leaves in found.items() for leaf in leaves]
    if not any(size in rows for _, _, size in sizes):
        return
    for name, leaf, size in sizes:
        if size is not None and size not in rows and isinstance(leaf, Tensor):
            warn_once(
                f"{name} has shape {list(leaf.shape)} in a batch of {' and '.join(map(str, rows))} rows: the "
                f"evaluation joins batches along the first dimension, which mixes up the rows. Return the rows first, "
                f"as state.transpose(0, 1) does for a state [L, B, H], or {_LEAVE_OUT}",
                cause=f"no batch: {name}",
            )


def _by_name(kept: Any, outputs: Any) -> dict[str, list[Any]]:
    """Return the leaves of every output that is kept, by words for the output."""
    several = isinstance(kept, (tuple, list)) and not isinstance(kept, PackedSequence)
    # The loop keeps the values without their keys, detached.
    keys = {_memory(value): key for key, value in outputs.items()} if isinstance(outputs, Mapping) else {}
    result = {}
    for place, value in enumerate(kept if several else [kept]):
        key = keys.get(_memory(value))
        name = f"output {place if key is None else repr(key)} of the model"
        result[name if several or key is not None else "the output of the model"] = list(_leaves(value))
    return result


def _memory(value: Any) -> int:
    first = next(_leaves(value), None)
    return first.data.data_ptr() if isinstance(first, (Tensor, PackedSequence)) else id(first)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, PackedSequence) or not isinstance(tree, (Mapping, tuple, list)):
        yield tree
        return
    for item in tree.values() if isinstance(tree, Mapping) else tree:
        yield from _leaves(item)


def _rows(leaf: Tensor | PackedSequence) -> int | None:
    if isinstance(leaf, PackedSequence):
        return batch_size(leaf)
    return len(leaf) if leaf.dim() else None


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
            ValueError: steps have another shape than in the first batch.
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
    else:
        expected, found = _steps(first), _steps(batch)
        if found != expected:
            raise ValueError(
                f"{_names(found, expected) or name or 'what the model returns'} has steps of shape {found} in batch "
                f"{number} of the evaluation, but {expected} in batch 0: batches can be joined only if their steps "
                f"have one shape. If it is an output that no metric needs, {_LEAVE_OUT}; or keep the batches apart "
                f"with TrainingArguments(eval_do_concat_batches=False)"
            )


def _steps(leaf: Any) -> list[int] | None:
    """Return the dimensions that batches must share: all after rows and steps."""
    if isinstance(leaf, PackedSequence):
        return list(leaf.data.shape[1:])
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
    trailing = _steps(pieces[0]) or []
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
