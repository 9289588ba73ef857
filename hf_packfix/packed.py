"""One PackedSequence is one leaf that stands for B sequences.

Everything the patches do rests on the pure functions of this module. "Original order" is the order in
which the rows were handed to ``pack_sequence``; a packed ``data`` tensor holds them sorted by length and
interleaved by step, so neither its rows nor its order mean anything to a caller.

Shapes: B sequences, T steps in the longest one, N steps in all (the sum of the lengths), ``*`` any
trailing dimensions. ``batch_sizes`` is an int64 CPU tensor ``[T]`` and the index tensors are int64 ``[B]``
on the device of ``data`` (``torch/nn/utils/rnn.py``, class ``PackedSequence``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = [
    "Countable",
    "PackedSequence",
    "batch_size",
    "check",
    "concatenate",
    "dtype_with",
    "from_flat",
    "group_and_place",
    "lengths",
    "lengths_by_rank",
    "num_tokens",
    "pad",
    "pad_left",
    "same_packing",
    "take",
    "to_flat",
    "with_data",
]


class Countable(PackedSequence):
    """A PackedSequence that answers what the training loop up to transformers 5.2 asks a main input or a mask.

    The loop asks ``input.numel()``, ``mask.sum()`` or, under "non_padding" with a tokenizer,
    ``(input != pad_token_id).sum()``, in the middle of ``Trainer._inner_training_loop``. Each is the number of
    real tokens N.
    """

    def numel(self) -> int:
        """Return N."""
        return num_tokens(self)

    def sum(self) -> Tensor:
        """Return N as an int64 scalar."""
        return torch.tensor(num_tokens(self), device="cpu")

    def __ne__(self, other: object) -> Any:
        # A pack holds no padding, so no step of it is the padding token.
        if not isinstance(other, int):
            return super().__ne__(other)
        return torch.ones(num_tokens(self), dtype=torch.bool, device="cpu")

    def plain(self) -> PackedSequence:
        """Return the same fields as an ordinary PackedSequence."""
        return PackedSequence._make(self)


def batch_size(packed: PackedSequence) -> int:
    """Return B, the number of sequences.

    Raises:
        TypeError: ``packed`` is not a PackedSequence.
        ValueError: the fields of ``packed`` contradict each other.
    """
    check(packed, wait=False)
    return _batch_size(packed)


def num_tokens(packed: PackedSequence) -> int:
    """Return N, the number of real steps over all sequences; trailing dimensions do not count.

    Raises:
        TypeError: ``packed`` is not a PackedSequence.
        ValueError: the fields of ``packed`` contradict each other.
    """
    check(packed, wait=False)
    return packed.data.shape[0]


def lengths(packed: PackedSequence) -> Tensor:
    """Return the length of every sequence in original order: int64 ``[B]`` on the CPU."""
    check(packed)
    by_rank = lengths_by_rank(packed.batch_sizes)
    return by_rank if packed.unsorted_indices is None else by_rank[packed.unsorted_indices.cpu()]


def pad(
    packed: PackedSequence, padding_value: float = 0.0, total_length: int | None = None, *, promote: bool = False
) -> Tensor:
    """Return the padded tensor ``[B, T, *]``: batch first, original order, dtype and device of ``data``.

    Args:
        packed: the sequences.
        padding_value: what stands behind the end of a sequence.
        total_length: the second dimension of the result, at least T; T by default.
        promote: if the dtype of ``data`` does not hold ``padding_value``, return the smallest one that holds both,
            instead of raising; see :func:`dtype_with`.

    Raises:
        ValueError: ``total_length`` is smaller than T, the dtype of ``data`` does not hold ``padding_value``, or the
            fields of ``packed`` contradict each other.
    """
    check(packed)
    dtype = dtype_with(packed.data.dtype, padding_value)
    if dtype != packed.data.dtype:
        if not promote:
            raise ValueError(
                f"{packed.data.dtype} does not hold the padding_value {padding_value}: choose another one, or convert "
                f"the data first: pad(packed._replace(data=packed.data.to({dtype})), {padding_value})"
            )
        packed = with_data(packed, packed.data.to(dtype))
    steps = packed.batch_sizes.numel()
    if total_length is not None and total_length < steps:
        raise ValueError(f"total_length is {total_length}, but the longest sequence has {steps} steps")
    shape = (_batch_size(packed), steps if total_length is None else total_length, *packed.data.shape[1:])
    rectangle = packed.data.new_full(shape, padding_value)
    if packed.data.shape[0] == 0:
        return rectangle
    # Written by index rather than with `pad_packed_sequence`: it keeps every dtype, bool included, goes
    # through autograd, and takes the same path for a `total_length`.
    rows, steps_of = _positions(packed)
    return rectangle.index_put_((rows.to(packed.data.device), steps_of.to(packed.data.device)), packed.data)


def dtype_with(dtype: torch.dtype, value: float) -> torch.dtype:
    """Return the smallest dtype that holds all values of ``dtype`` and also ``value``, such as -100 beside bytes.

    Args:
        dtype: of tensors.
        value: to hold; a floating-point dtype holds what it can round to a finite number, and NaN and infinity.

    Returns:
        ``dtype`` itself if it holds the value; for bool and integers otherwise a signed integer dtype, or float64 if
        there is none; for floating-point numbers a wider one.
    """
    if _holds(dtype, value):
        return dtype
    wider = [torch.int8, torch.int16, torch.int32, torch.int64]
    if dtype.is_floating_point:
        wider = [torch.float16, torch.float32]
    span = (0, 1) if dtype is torch.bool else (_info(dtype).min, _info(dtype).max)
    return next((one for one in wider if all(_holds(one, bound) for bound in (*span, value))), torch.float64)


def _holds(dtype: torch.dtype, value: float) -> bool:
    if dtype.is_floating_point or dtype.is_complex:
        return not math.isfinite(value) or abs(value) <= _info(dtype).max
    if not math.isfinite(value) or value != int(value):
        return False
    return value in (0, 1) if dtype is torch.bool else _info(dtype).min <= value <= _info(dtype).max


def _info(dtype: torch.dtype) -> torch.finfo | torch.iinfo:
    return torch.finfo(dtype) if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype)


def pad_left(packed: PackedSequence, padding_value: float = 0.0) -> Tensor:
    """Return the rectangle ``[B, T, *]`` with the padding in front of each sequence, as a prompt to continue."""
    rectangle = pad(packed, padding_value)
    width = rectangle.shape[1]
    shift = (width - lengths(packed)).to(rectangle.device)
    # Step t of the result is step t - shift of the sequence; where that is negative, a step of the padding.
    source = (torch.arange(width, device=rectangle.device) - shift[:, None]) % width
    rows = torch.arange(len(rectangle), device=rectangle.device)[:, None]
    return rectangle[rows, source]


def with_data(packed: PackedSequence, data: Tensor) -> PackedSequence:
    """Return the same packing around other ``data`` ``[N, *]``; index tensors follow its device.

    Every field that must move is moved once, ``batch_sizes`` stays where it is, and the very same object
    comes back when nothing changes.
    """
    device = data.device
    old, batch_sizes, sorted_indices, unsorted_indices = packed
    stays = data is old
    # Written out for both, and with no field read twice: every packed batch of every step comes through here.
    if sorted_indices is not None and sorted_indices.device != device:
        sorted_indices, stays = sorted_indices.to(device), False
    if unsorted_indices is not None and unsorted_indices.device != device:
        unsorted_indices, stays = unsorted_indices.to(device), False
    return packed if stays else type(packed)(data, batch_sizes, sorted_indices, unsorted_indices)


def same_packing(first: PackedSequence, second: PackedSequence) -> bool:
    """Tell whether row i of both ``data`` tensors is the same step of the same sequence."""
    check(first, wait=False)
    check(second, wait=False)
    if not torch.equal(first.batch_sizes, second.batch_sizes):
        return False
    if first.sorted_indices is None or second.sorted_indices is None:
        return torch.equal(_rank(first), _rank(second))
    return torch.equal(first.sorted_indices, second.sorted_indices.to(first.sorted_indices.device))


def to_flat(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """Return the sequences one after the other, in original order, and their lengths.

    Returns:
        ``flat`` ``[N, *]`` on the device of ``data``, and ``lengths`` int64 ``[B]`` on the CPU.
    """
    check(packed)
    return _gather(packed, _rank(packed))


def from_flat(flat: Tensor, lengths: Tensor, *, keep_order: bool = False) -> PackedSequence:
    """Pack sequences that stand one after the other; the inverse of :func:`to_flat`.

    The result equals ``pack_sequence(sequences, enforce_sorted=False)`` field by field, without the
    rectangle that torch builds on the way.

    Args:
        flat: ``[N, *]``, the sequences one after the other.
        lengths: int64 ``[B]`` on the CPU, summing to N, each at least 1.
        keep_order: where the lengths do not increase, leave both index tensors ``None``, as
            ``enforce_sorted=True`` does.

    Raises:
        ValueError: a length is below 1, or the lengths do not sum to N.
    """
    if int(lengths.sum()) != flat.shape[0] or (lengths.numel() and int(lengths.min()) < 1):
        raise ValueError(
            f"lengths must be at least 1 and sum to the {flat.shape[0]} rows of flat, found {lengths.tolist()}"
        )
    starts = lengths.cumsum(0) - lengths
    if keep_order and bool((lengths[:-1] >= lengths[1:]).all()):
        sorted_indices = None
    else:
        sorted_indices = torch.sort(lengths, descending=True).indices
        starts = starts[sorted_indices]
    # At step t, all sequences are alive but those of at most t steps.
    batch_sizes = lengths.numel() - torch.bincount(lengths).cumsum(0)[:-1]
    step, rank = group_and_place(batch_sizes)
    source = starts.index_select(0, rank) + step
    return PackedSequence(
        flat.index_select(0, source.to(flat.device)),
        batch_sizes,
        None if sorted_indices is None else sorted_indices.to(flat.device),
    )


def take(packed: PackedSequence, which: slice | Sequence[int]) -> PackedSequence:
    """Return some of the sequences, whole, chosen by their place in the original order.

    Args:
        packed: the sequences.
        which: a slice, or places; as with a tensor, a slice may reach past the end and may be empty.
    """
    check(packed)
    sequences = _batch_size(packed)
    if isinstance(which, slice) and which.indices(sequences) == (0, sequences, 1):
        return packed
    rank = _rank(packed)
    chosen = rank[which] if isinstance(which, slice) else rank[torch.tensor(which, dtype=torch.int64, device="cpu")]
    return from_flat(*_gather(packed, chosen), keep_order=packed.sorted_indices is None)


def concatenate(pieces: Sequence[PackedSequence]) -> PackedSequence:
    """Return one PackedSequence with the sequences of all pieces, in their original orders.

    Raises:
        TypeError: ``pieces`` holds something else, or is itself a PackedSequence.
        ValueError: there is no piece, or pieces differ in the shape ``*`` of their steps.
    """
    if isinstance(pieces, PackedSequence):
        raise TypeError("expected a list of PackedSequences, found a single one: put it into a list")
    if not pieces:
        raise ValueError("there is nothing to concatenate: expected at least one PackedSequence")
    if len(pieces) == 1:
        check(pieces[0], wait=False)
        return pieces[0]
    flats, all_lengths = zip(*map(to_flat, pieces), strict=True)
    steps = [list(flat.shape[1:]) for flat in flats]
    for number, shape in enumerate(steps):
        if shape != steps[0]:
            raise ValueError(
                f"PackedSequences can be concatenated only if their steps have one shape: those of number 0 have "
                f"{steps[0]}, those of number {number} have {shape}"
            )
    return from_flat(
        torch.cat(flats),
        torch.cat(all_lengths),
        keep_order=all(piece.sorted_indices is None for piece in pieces),
    )


def check(packed: PackedSequence, *, wait: bool = True) -> None:
    """Raise where the fields contradict each other, before they turn into wrong numbers.

    torch's own constructor and its recurrent layers look at none of this: they leave out the last rows of ``data``
    where ``batch_sizes`` do not reach them, and give a row the state of another one.

    Args:
        packed: the sequences.
        wait: look at index tensors that are not on the CPU, too, which waits for their device.

    Raises:
        TypeError: ``packed`` is not a PackedSequence.
        ValueError: ``batch_sizes`` are not int64 ``[T]``, do not sum to the rows of ``data``, increase, or fall below
            1; there is one index tensor without the other, they are not int64 ``[B]``, or not the inverse
            permutations of each other.
    """
    if not isinstance(packed, PackedSequence):
        raise _not_packed(packed)
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1:
        raise _inconsistent(f"its batch_sizes must be int64 [T], found {batch_sizes.dtype} {list(batch_sizes.shape)}")
    # As lists, on which the few comparisons below take a fraction of what as many calls of torch would.
    sizes: list[int] = batch_sizes.tolist()
    rows = data.shape[0] if data.dim() else "no"
    if sum(sizes) != rows:
        raise _inconsistent(f"its batch_sizes sum to {sum(sizes)}, but its data has {rows} rows")
    if sizes and (sizes[-1] < 1 or sizes != sorted(sizes, reverse=True)):
        raise _inconsistent(f"its batch_sizes must not increase or fall below 1, found {sizes}")
    if sorted_indices is None or unsorted_indices is None:
        if sorted_indices is not unsorted_indices:
            missing = "sorted_indices" if sorted_indices is None else "unsorted_indices"
            raise _inconsistent(f"it has index tensors, but its {missing} are None")
        return
    sequences = sizes[0] if sizes else 0
    for name, indices in (("sorted_indices", sorted_indices), ("unsorted_indices", unsorted_indices)):
        if indices.dtype != torch.int64 or indices.shape != (sequences,):
            found = f"{indices.dtype} {list(indices.shape)}"
            raise _inconsistent(f"its {name} must be int64 [{sequences}], one a sequence, found {found}")
    if wait or (sorted_indices.is_cpu and unsorted_indices.is_cpu):
        there, back = sorted_indices.tolist(), unsorted_indices.tolist()
        places = list(range(sequences))
        if sorted(back) != places or [there[rank] for rank in back] != places:
            raise _inconsistent(
                f"its sorted_indices and unsorted_indices must be inverse permutations of each other, found "
                f"{there} and {back}"
            )


def _not_packed(value: Any) -> TypeError:
    if isinstance(value, Tensor):
        cure = (
            "pack a padded tensor [B, T, *] with torch.nn.utils.rnn.pack_padded_sequence(tensor, lengths, "
            "batch_first=True, enforce_sorted=False)"
        )
    elif isinstance(value, tuple) and value and isinstance(value[0], PackedSequence):
        cure = "it is the first item of this tuple, as recurrent layers return (output, state)"
    elif isinstance(value, Mapping):
        cure = "pass one of the values"
    else:
        cure = (
            "pack a list of tensors [T, *] with torch.nn.utils.rnn.pack_sequence(tensors, enforce_sorted=False), or "
            "let DataCollatorForPackedSequence pack the rows of a data set"
        )
    return TypeError(f"expected a PackedSequence, found {type(value).__name__}: {cure}")


def _inconsistent(what: str) -> ValueError:
    return ValueError(f"this PackedSequence is inconsistent: {what}; build it with torch.nn.utils.rnn.pack_sequence")


def _batch_size(packed: PackedSequence) -> int:
    batch_sizes = packed.batch_sizes
    return int(batch_sizes[0]) if batch_sizes.numel() else 0


def _rank(packed: PackedSequence) -> Tensor:
    """Return, in original order, the place of every sequence in the sorted order: int64 ``[B]``, CPU."""
    if packed.unsorted_indices is None:
        return torch.arange(_batch_size(packed), device="cpu")
    return packed.unsorted_indices.cpu()


def lengths_by_rank(batch_sizes: Tensor) -> Tensor:
    """Return the lengths from the longest sequence down: int64 ``[B]``, CPU."""
    # Sequence r is alive at step t while batch_sizes[t] > r, and batch_sizes never increase.
    ranks = torch.arange(int(batch_sizes[0]) if batch_sizes.numel() else 0, device="cpu")
    return batch_sizes.numel() - torch.searchsorted(batch_sizes.flip(0), ranks, right=True)


def _gather(packed: PackedSequence, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sequences of these ranks one after the other, and their lengths."""
    chosen = lengths_by_rank(packed.batch_sizes)[ranks]
    sequence, step = group_and_place(chosen)
    first_rows = packed.batch_sizes.cumsum(0) - packed.batch_sizes
    source = first_rows.index_select(0, step) + ranks.index_select(0, sequence)
    return packed.data.index_select(0, source.to(packed.data.device)), chosen


def _positions(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """Return for every row of ``data`` its sequence in original order and its step: int64 ``[N]``, CPU."""
    step, rank = group_and_place(packed.batch_sizes)
    return (rank if packed.sorted_indices is None else packed.sorted_indices.cpu()[rank]), step


def group_and_place(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return for groups of these sizes, one after the other, every element's group and its place there.

    Of ``batch_sizes`` these are the steps and the ranks of the rows of ``data``, of lengths the sequences and the
    steps. No mask ``[T, B]`` is built, of which few places are real where lengths have a long tail.
    """
    group = torch.repeat_interleave(sizes)
    starts = sizes.cumsum(0) - sizes
    return group, torch.arange(group.numel(), device=group.device) - starts.index_select(0, group)
