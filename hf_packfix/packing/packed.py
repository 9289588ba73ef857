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
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def batch_size(packed: PackedSequence) -> int:
    """Return B, the number of sequences.

    Raises:
        TypeError: ``packed`` is not a PackedSequence.
        ValueError: the fields of ``packed`` contradict each other.

    Example:
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> batch_size(pack_sequence([torch.zeros(2, 5), torch.zeros(3, 5)], enforce_sorted=False))
        2
    """
    check(packed, wait=False)
    return _batch_size(packed)


def num_tokens(packed: PackedSequence) -> int:
    """Return N, the number of real steps over all sequences; trailing dimensions do not count.

    Raises:
        TypeError: ``packed`` is not a PackedSequence.
        ValueError: the fields of ``packed`` contradict each other.

    Example:
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> num_tokens(pack_sequence([torch.zeros(2, 5), torch.zeros(3, 5)], enforce_sorted=False))
        5
    """
    check(packed, wait=False)
    return packed.data.shape[0]


def lengths(packed: PackedSequence) -> Tensor:
    """Return the length of every sequence in original order: int64 ``[B]`` on the CPU.

    Raises:
        TypeError: ``packed`` is not a PackedSequence.
        ValueError: the fields of ``packed`` contradict each other.

    Example:
        The mean of each sequence, for pooling:

        >>> from torch.nn.utils.rnn import pack_sequence
        >>> x = pack_sequence([torch.tensor([1.0, 3.0]), torch.tensor([4.0, 4.0, 1.0])], enforce_sorted=False)
        >>> lengths(x)
        tensor([2, 3])
        >>> pad(x).sum(1) / lengths(x)
        tensor([2., 3.])
    """
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

    Example:
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> pad(pack_sequence([torch.tensor([1]), torch.tensor([2, 3])], enforce_sorted=False), -100)
        tensor([[   1, -100],
                [   2,    3]])
    """
    check(packed)
    dtype = dtype_with(packed.data.dtype, padding_value)
    if dtype != packed.data.dtype:
        if not promote:
            raise ValueError(
                f"{packed.data.dtype} does not hold the padding_value {padding_value}: choose another one, or convert "
                f"the data first: pad(with_data(x, x.data.to({dtype})), {padding_value})"
            )
        packed = with_data(packed, packed.data.to(dtype))
    steps = packed.batch_sizes.numel()
    if total_length is not None and total_length < steps:
        raise ValueError(f"total_length is {total_length}, but the longest sequence has {steps} steps")
    shape = (_batch_size(packed), steps if total_length is None else total_length, *packed.data.shape[1:])
    padded = packed.data.new_full(shape, padding_value)
    # Written by index rather than with `pad_packed_sequence`: it keeps every dtype, bool included, goes
    # through autograd, and takes the same path for a `total_length`.
    step, rows = group_and_place(packed.batch_sizes)
    if packed.sorted_indices is not None:
        rows = packed.sorted_indices.cpu()[rows]
    places = tuple(move_without_waiting(index, packed.data.device) for index in (rows, step))
    return padded.index_put_(places, packed.data)


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
    """Return the padded tensor ``[B, T, *]`` with the padding in front of each sequence, as a prompt to continue."""
    padded = pad(packed, padding_value)
    width = padded.shape[1]
    shift = (width - lengths(packed)).to(padded.device)
    # Step t of the result is step t - shift of the sequence; if that is negative, a step of the padding.
    source = (torch.arange(width, device=padded.device) - shift[:, None]) % width
    rows = torch.arange(len(padded), device=padded.device)[:, None]
    return padded[rows, source]


def with_data(packed: PackedSequence, data: Tensor) -> PackedSequence:
    """Return the same packing around other ``data`` ``[N, *]``, such as a layer's output for every step.

    Index tensors follow the device of ``data``, from the CPU in one copy, which a GPU does not wait for;
    ``batch_sizes`` stays on the CPU. The very same object comes back if nothing changes. Works in eager and in
    compiled code on every supported torch; ``packed._replace(data=...)`` does not compile on torch 2.15.

    Raises:
        ValueError: ``data`` does not have a row for each of the N steps.

    Example:
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> x = pack_sequence([torch.randn(2, 5), torch.randn(3, 5)], enforce_sorted=False)
        >>> with_data(x, torch.nn.Linear(5, 7)(x.data)).data.shape
        torch.Size([5, 7])
    """
    device = data.device
    old, batch_sizes, sorted_indices, unsorted_indices = packed
    stays = data is old
    if not stays and data.shape[:1] != old.shape[:1]:
        raise ValueError(
            f"data must have a row for each of the {len(old)} steps of the PackedSequence, found the shape "
            f"{list(data.shape)}"
        )
    # Written out for both, and with no field read twice: every packed batch of every step comes through here.
    if sorted_indices is not None and sorted_indices.device != device:
        stays = False
        if unsorted_indices is not None and unsorted_indices.device != device:
            sorted_indices, unsorted_indices = _move_indices(sorted_indices, unsorted_indices, device)
        else:
            sorted_indices = sorted_indices.to(device)
    elif unsorted_indices is not None and unsorted_indices.device != device:
        unsorted_indices, stays = unsorted_indices.to(device), False
    return packed if stays else type(packed)(data, batch_sizes, sorted_indices, unsorted_indices)


#: Where index tensors were moved last, both of them on the CPU, and what they are there.
_last_moved: tuple[Any, Any, Any] | None = None


def _move_indices(there: Tensor, back: Tensor, device: torch.device) -> Any:
    """Return both index tensors on another device; those of the last call if they have the same values.

    So the keys of a batch share their index tensors if they have the same lengths, wherever they were on the way here,
    and :func:`same_packing` sees it without waiting for the device.
    """
    global _last_moved
    ordinary = type(there) is type(back) is Tensor and there.is_cpu and back.is_cpu and there.shape == back.shape
    if not ordinary or not there.dtype == back.dtype == torch.int64 or torch.is_inference_mode_enabled():
        return there.to(device), back.to(device)
    where = device, torch.cuda.current_stream(device) if device.type == "cuda" else None
    last = _last_moved
    if last is not None and last[0] == where:
        _, values, moved = last
        if moved[0]._version == 0 and torch.equal(values[0], there) and torch.equal(values[1], back):
            return moved
    both = torch.stack([there, back])
    moved = move_without_waiting(both, device).unbind()
    if type(moved[0]) is Tensor:  # not a fake one
        _last_moved = where, both.unbind(), moved
    return moved


def move_without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; a GPU copies it from pinned memory, while the program goes on."""
    if device.type == "cuda" and tensor.is_cpu:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def same_packing(first: PackedSequence, second: PackedSequence) -> bool:
    """Return whether row i of both ``data`` tensors is the same step of the same sequence.

    Waits for the device only if the index tensors are on one and are not the same objects, as those that
    :func:`with_data` moved are.
    """
    check(first, wait=False)
    check(second, wait=False)
    if not torch.equal(first.batch_sizes, second.batch_sizes):
        return False
    if first.sorted_indices is second.sorted_indices:
        return True
    if first.sorted_indices is None or second.sorted_indices is None:
        return torch.equal(ranks(first), ranks(second))
    return torch.equal(first.sorted_indices, second.sorted_indices.to(first.sorted_indices.device))


def check(packed: PackedSequence, *, wait: bool = True) -> None:
    """Raise if the fields contradict each other, before they turn into wrong numbers.

    torch's own constructor and its recurrent layers check none of this: they leave out the last rows of ``data`` if
    ``batch_sizes`` do not reach them, and give a row the state of another one.

    Args:
        packed: the sequences.
        wait: also check index tensors that are not on the CPU, which waits for their device.

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


def ranks(packed: PackedSequence) -> Tensor:
    """Return, in original order, the place of every sequence in the sorted order: int64 ``[B]``, CPU."""
    if packed.unsorted_indices is None:
        return torch.arange(_batch_size(packed), device="cpu")
    return packed.unsorted_indices.cpu()


def lengths_by_rank(batch_sizes: Tensor) -> Tensor:
    """Return the lengths from the longest sequence down: int64 ``[B]``, CPU."""
    # Sequence r is alive at step t while batch_sizes[t] > r, and batch_sizes never increase.
    ranks = torch.arange(int(batch_sizes[0]) if batch_sizes.numel() else 0, device="cpu")
    return batch_sizes.numel() - torch.searchsorted(batch_sizes.flip(0), ranks, right=True)


def group_and_place(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return for groups of these sizes, one after the other, every element's group and its place there.

    Of ``batch_sizes`` these are the steps and the ranks of the rows of ``data``, of lengths the sequences and the
    steps. No mask ``[T, B]`` is built: if lengths have a long tail, few of its places would be real.
    """
    group = torch.repeat_interleave(sizes)
    starts = sizes.cumsum(0) - sizes
    return group, torch.arange(group.numel(), device=group.device) - starts.index_select(0, group)
