"""Values and lengths, the jagged form of a PackedSequence, and what is easier in it: choosing and joining sequences.

The values are the steps of all sequences, one sequence after the other in original order: ``[N, *]``. The lengths are
int64 ``[B]`` on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_packfix.packing.packed import (
    PackedSequence,
    check,
    group_and_place,
    lengths_by_rank,
    move_without_waiting,
    ranks,
    with_data,
)


def to_jagged(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """Return the sequences one after the other, in original order, and their lengths.

    Returns:
        ``values`` ``[N, *]`` on the device of ``data``, and ``lengths`` int64 ``[B]`` on the CPU.

    Raises:
        TypeError: ``packed`` is not a PackedSequence.
        ValueError: the fields of ``packed`` contradict each other.

    Example:
        Targets for ``torch.nn.CTCLoss`` are values and lengths:

        >>> from torch.nn.utils.rnn import pack_sequence
        >>> to_jagged(pack_sequence([torch.tensor([7]), torch.tensor([8, 9])], enforce_sorted=False))
        (tensor([7, 8, 9]), tensor([1, 2]))
    """
    check(packed)
    return _gather(packed, ranks(packed))


def from_jagged(values: Tensor, lengths: Tensor, *, keep_order: bool = False) -> PackedSequence:
    """Pack sequences that stand one after the other; the inverse of :func:`to_jagged`.

    The result equals ``pack_sequence(sequences, enforce_sorted=False)`` field by field, without the padded tensor
    that torch builds on the way.

    Args:
        values: ``[N, *]``, the sequences one after the other.
        lengths: int64 ``[B]`` on the CPU, summing to N, each at least 1.
        keep_order: if the lengths do not increase, leave both index tensors ``None``, as
            ``enforce_sorted=True`` does.

    Raises:
        ValueError: a length is below 1, or the lengths do not sum to N.

    Example:
        >>> pieces = from_jagged(torch.tensor([7, 8, 9]), torch.tensor([1, 2]))
        >>> torch.nn.utils.rnn.unpack_sequence(pieces)
        [tensor([7]), tensor([8, 9])]
    """
    if int(lengths.sum()) != values.shape[0] or (lengths.numel() and int(lengths.min()) < 1):
        raise ValueError(
            f"lengths must be at least 1 and sum to the {values.shape[0]} rows of values, found {lengths.tolist()}"
        )
    return packed_like(packing_of(lengths, keep_order=keep_order), values)


def packing_of(lengths: Tensor, *, keep_order: bool = False) -> PackedSequence:
    """Return how :func:`from_jagged` packs sequences of these lengths; ``data`` has the place of every step."""
    starts = lengths.cumsum(0) - lengths
    if keep_order and bool((lengths[:-1] >= lengths[1:]).all()):
        sorted_indices = None
    else:
        sorted_indices = torch.sort(lengths, descending=True).indices
        starts = starts[sorted_indices]
    # At step t, all sequences are alive but those of at most t steps.
    batch_sizes = lengths.numel() - torch.bincount(lengths).cumsum(0)[:-1]
    step, rank = group_and_place(batch_sizes)
    return PackedSequence(starts.index_select(0, rank) + step, batch_sizes, sorted_indices)


def packed_like(packing: PackedSequence, values: Tensor) -> PackedSequence:
    """Return sequences that stand one after the other, packed as :func:`packing_of` says, on their own device."""
    return with_data(packing, values.index_select(0, move_without_waiting(packing.data, values.device)))


def take(packed: PackedSequence, which: slice | Sequence[int]) -> PackedSequence:
    """Return some of the sequences, whole, chosen by their place in the original order.

    Args:
        packed: the sequences.
        which: a slice, or places; as with a tensor, a slice may reach past the end and may be empty.

    Raises:
        TypeError: ``packed`` is not a PackedSequence.
        ValueError: the fields of ``packed`` contradict each other.
        IndexError: there is no sequence at a place.

    Example:
        >>> x = from_jagged(torch.tensor([7, 8, 9]), torch.tensor([1, 2]))
        >>> torch.nn.utils.rnn.unpack_sequence(take(x, [1]))
        [tensor([8, 9])]
    """
    check(packed)
    by_place = ranks(packed)
    sequences = len(by_place)
    if isinstance(which, slice) and which.indices(sequences) == (0, sequences, 1):
        return packed
    places = which if isinstance(which, slice) else torch.tensor(which, dtype=torch.int64, device="cpu")
    chosen = by_place[places]
    return from_jagged(*_gather(packed, chosen), keep_order=packed.sorted_indices is None)


def concatenate(pieces: Sequence[PackedSequence]) -> PackedSequence:
    """Return one PackedSequence with the sequences of all pieces, in their original orders.

    Raises:
        TypeError: ``pieces`` holds something else, or is itself a PackedSequence.
        ValueError: there is no piece, or pieces differ in the shape ``*`` of their steps.

    Example:
        >>> x = from_jagged(torch.tensor([7, 8, 9]), torch.tensor([1, 2]))
        >>> torch.nn.utils.rnn.unpack_sequence(concatenate([x, x]))
        [tensor([7]), tensor([8, 9]), tensor([7]), tensor([8, 9])]
    """
    if isinstance(pieces, PackedSequence):
        raise TypeError("expected a list of PackedSequences, found a single one: put it into a list")
    if not pieces:
        raise ValueError("there is nothing to concatenate: expected at least one PackedSequence")
    if len(pieces) == 1:
        check(pieces[0], wait=False)
        return pieces[0]
    all_values, all_lengths = zip(*map(to_jagged, pieces), strict=True)
    steps = [list(values.shape[1:]) for values in all_values]
    for number, shape in enumerate(steps):
        if shape != steps[0]:
            raise ValueError(
                f"PackedSequences can be concatenated only if their steps have one shape: those of number 0 have "
                f"{steps[0]}, those of number {number} have {shape}"
            )
    return from_jagged(
        torch.cat(all_values), torch.cat(all_lengths), keep_order=all(piece.sorted_indices is None for piece in pieces)
    )


def _gather(packed: PackedSequence, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sequences of these ranks one after the other, and their lengths."""
    lengths = lengths_by_rank(packed.batch_sizes)[chosen]
    sequence, step = group_and_place(lengths)
    first_rows = packed.batch_sizes.cumsum(0) - packed.batch_sizes
    source = first_rows.index_select(0, step) + chosen.index_select(0, sequence)
    return packed.data.index_select(0, move_without_waiting(source, packed.data.device)), lengths
