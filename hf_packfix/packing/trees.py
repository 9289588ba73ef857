"""Finding the PackedSequences in a nested batch, and replacing them.

A batch is any nesting of mappings, lists and tuples, as ``Trainer._prepare_input`` walks it. A
PackedSequence is a leaf: nothing here looks into its fields.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from numpy import ndarray
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from hf_packfix.packing.packed import batch_size, check

__all__ = [
    "LEAVES",
    "any_leaf",
    "check_alike",
    "check_batch",
    "contains",
    "contains_namedtuple",
    "is_namedtuple",
    "map_packed",
    "merge_packed",
    "packed_in",
    "rebuild",
    "sequences_of_keys",
]

#: What a batch mostly holds. Asked for first, since whether something is a ``Mapping``, an abstract class, takes
#: several times as long to find out; subclasses of these take that way.
LEAVES = frozenset({Tensor, ndarray, str, int, float, bool, type(None)})


def check_batch(batch: Any) -> bool:
    """Check every PackedSequence in a batch; return whether the batch is a mapping with one in it.

    What makes one inconsistent is in :func:`~hf_packfix.packing.packed.check`. Index tensors on another device than
    the CPU are not validated, to avoid a device sync in every step.

    Args:
        batch: a mapping, or any nesting of lists, tuples and mappings.

    Raises:
        ValueError: naming the key, or the position in a list or tuple, and the fields.
    """
    is_mapping = type(batch) is dict or isinstance(batch, Mapping)
    found = False
    for name, value in batch.items() if is_mapping else _named_items(batch):
        # The first half says no more than the second, without a call: everybody's every batch comes through here.
        if type(value) not in LEAVES and contains(value):
            found = True
            try:
                for packed in packed_in(value):
                    check(packed, wait=False)
            except ValueError as error:
                raise ValueError(f"{repr(name) if is_mapping else name} in the batch: {error}") from None
    return found and is_mapping


def check_alike(batches: Sequence[Any]) -> None:
    """Check every PackedSequence in batches that are to be concatenated, and that those of one key have like steps.

    Raises:
        ValueError: naming the key, or the position in a list or tuple, and the batch.
    """
    for batch in batches:
        check_batch(batch)
    for number, batch in enumerate(batches):
        for (name, first), (_, other) in zip(_named_items(batches[0]), _named_items(batch), strict=False):
            for one, another in zip(packed_in(first), packed_in(other), strict=False):
                expected, found = list(one.data.shape[1:]), list(another.data.shape[1:])
                if found != expected:
                    raise ValueError(
                        f"{name} has steps of shape {found} in batch {number}, but {expected} in batch 0: batches "
                        f"can be concatenated only if the steps of a key have one shape"
                    )


def _named_items(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a batch holds, with the words for its place in an error."""
    if isinstance(tree, Mapping):
        yield from ((repr(key), value) for key, value in tree.items())
    elif isinstance(tree, (tuple, list)) and not isinstance(tree, PackedSequence):
        fields = getattr(tree, "_fields", None)
        names = map(repr, fields) if fields else (f"position {place}" for place in range(len(tree)))
        yield from zip(names, tree, strict=True)


def sequences_of_keys(batch: Mapping[str, Any]) -> dict[str, int]:
    """Return for each key with a PackedSequence the number of sequences of its first one.

    Raises:
        ValueError: the fields of a PackedSequence contradict each other.
    """
    firsts = {key: next(packed_in(value), None) for key, value in batch.items()}
    return {key: batch_size(packed) for key, packed in firsts.items() if packed is not None}


def packed_in(tree: Any) -> Iterator[PackedSequence]:
    """Yield every PackedSequence in ``tree``, in the order in which :func:`map_packed` meets them."""
    if type(tree) in LEAVES:
        return
    if isinstance(tree, PackedSequence):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from packed_in(item)
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from packed_in(value)


def contains(tree: Any, kind: type = PackedSequence, leaves: Collection[type] = LEAVES) -> bool:
    """Return whether there is a PackedSequence anywhere in ``tree``.

    Args:
        tree: a nested batch, or what describes one.
        kind: what to look for instead of a PackedSequence.
        leaves: types that are not to be looked into.
    """
    if type(tree) in leaves:
        return False
    if isinstance(tree, kind):
        return True
    if type(tree) is dict or isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return False
    # The question at the top, asked without a call, and a loop, since `any` would take a generator as well.
    for item in tree:  # noqa: SIM110
        if type(item) not in leaves and contains(item, kind, leaves):
            return True
    return False


def any_leaf(tree: Any, chosen: Callable[[Any], bool]) -> bool:
    """Return whether ``chosen`` is true of anything in ``tree`` that is no mapping, list or tuple."""
    if type(tree) is dict or isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return chosen(tree)
    return any(chosen(item) if type(item) in LEAVES else any_leaf(item, chosen) for item in tree)


def contains_namedtuple(tree: Any) -> bool:
    """Return whether there is a named tuple, a PackedSequence or another, in ``tree``."""
    if type(tree) in LEAVES:
        return False
    if isinstance(tree, tuple) and is_namedtuple(tree):
        return True
    if isinstance(tree, (tuple, list)):
        return any(map(contains_namedtuple, tree))
    if isinstance(tree, Mapping):
        return any(map(contains_namedtuple, tree.values()))
    return False


def map_packed(function: Callable[[PackedSequence], Any], tree: Any) -> Any:
    """Return ``tree`` with every PackedSequence ``p`` replaced by ``function(p)``.

    Containers on the way to one are rebuilt in their own type; everything else, and a tree without a
    PackedSequence, comes back as the same object.
    """
    if type(tree) in LEAVES:
        return tree
    if isinstance(tree, PackedSequence):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        items = [map_packed(function, item) for item in tree]
        return tree if all(new is old for new, old in zip(items, tree, strict=True)) else rebuild(tree, items)
    if isinstance(tree, Mapping):
        values = {key: map_packed(function, value) for key, value in tree.items()}
        unchanged = all(values[key] is value for key, value in tree.items())
        return tree if unchanged else type(tree)(values)  # type: ignore[call-arg]
    return tree


def merge_packed(
    function: Callable[[Any, Any], Any],
    tree: Any,
    other: Any,
    chosen: Callable[[Any], bool] = lambda leaf: isinstance(leaf, PackedSequence),
) -> Any:
    """Return ``other`` with ``function(leaf, value)`` at the place of every chosen leaf of ``tree``.

    For functions upstream that treat everything else right: ``other`` is what they made of ``tree``, perhaps with
    a stand-in at these places, and has its structure.

    Args:
        function: given the leaf of ``tree`` and what stands in its place in ``other``.
        tree: a nested batch.
        other: of the same structure.
        chosen: tells the leaves to replace, every PackedSequence by default.
    """
    if chosen(tree):
        return function(tree, other)
    if isinstance(tree, Mapping):
        values = {key: merge_packed(function, value, other[key], chosen) for key, value in tree.items()}
        unchanged = all(values[key] is other[key] for key in values)
        return other if unchanged else type(other)(values)
    if isinstance(tree, (tuple, list)):
        items = [merge_packed(function, *pair, chosen) for pair in zip(tree, other, strict=True)]
        return other if all(new is old for new, old in zip(items, other, strict=True)) else rebuild(other, items)
    return other


def is_namedtuple(value: tuple[Any, ...]) -> bool:
    """Tell a named tuple, whose constructor takes its fields, from a tuple, whose takes an iterable."""
    return hasattr(value, "_fields")


def rebuild(like: Any, items: list[Any]) -> Any:
    """Return a list, tuple or named tuple of the type of ``like`` that holds ``items``."""
    # `_make` takes any number of fields past a `__new__` of the class's own, as `_replace` does.
    return type(like)._make(items) if is_namedtuple(like) else type(like)(items)
