"""Finding the PackedSequences in a nested batch, and replacing them.

A batch is any nesting of mappings, lists and tuples, as ``Trainer._prepare_input`` walks it. A PackedSequence is a
leaf: nothing here looks into its fields. :func:`contains` and :func:`map_leaves` are the two walks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from numpy import ndarray
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from hf_packfix.packing.packed import batch_size, check, with_data

#: What a batch mostly holds. Looked up first, since whether something is a ``Mapping``, an abstract class, takes
#: several times as long to find out; subclasses of these take that way.
LEAVES = frozenset({Tensor, ndarray, str, int, float, bool, type(None)})


def is_packed(value: Any) -> bool:
    """Return whether this is a PackedSequence."""
    return isinstance(value, PackedSequence)


def is_namedtuple(value: Any) -> bool:
    """Return whether this is a named tuple, whose constructor takes its fields and not one iterable."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def contains(tree: Any, chosen: Callable[[Any], bool] = is_packed) -> bool:
    """Return whether ``chosen``, by default "is a PackedSequence", is true of anything in ``tree``.

    Tensors, arrays, strings and numbers (:data:`LEAVES`) are not looked at.
    """
    if type(tree) in LEAVES:
        return False
    if chosen(tree):
        return True
    if type(tree) is dict or isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return False
    # Inlined copy of the first check; a loop, because `any()` would add a generator.
    for item in tree:  # noqa: SIM110
        if type(item) not in LEAVES and contains(item, chosen):
            return True
    return False


def map_leaves(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Return ``tree`` with ``function(leaf, *leaves of the others at its place)`` in the place of every leaf.

    Containers are rebuilt in the type that the last tree has there. If no item of one changes, the very same object
    of the last tree comes back.

    Args:
        function: gets what is no mapping, list or tuple, or is a PackedSequence.
        tree: decides what is a leaf.
        others: of the same structure, with anything at the places of the leaves.
    """
    if type(tree) in LEAVES or isinstance(tree, PackedSequence):
        return function(tree, *others)
    like = others[-1] if others else tree
    if isinstance(tree, (tuple, list)):
        items = [map_leaves(function, *column) for column in zip(tree, *others, strict=True)]
        return like if all(new is old for new, old in zip(items, like, strict=True)) else rebuild(like, items)
    if isinstance(tree, Mapping):
        values = {key: map_leaves(function, value, *(other[key] for other in others)) for key, value in tree.items()}
        return like if all(values[key] is like[key] for key in values) else type(like)(values)
    return function(tree, *others)


def rebuild(like: Any, items: list[Any]) -> Any:
    """Return a list, tuple or named tuple of the type of ``like`` that holds ``items``."""
    # `_make` takes any number of fields past a `__new__` of the class's own, as `_replace` does.
    return type(like)._make(items) if is_namedtuple(like) else type(like)(items)


def leaves(tree: Any) -> list[Any]:
    """Return every leaf of ``tree``, in the order of :func:`map_leaves`."""
    found: list[Any] = []

    def keep(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    map_leaves(keep, tree)
    return found


def packed_in(tree: Any) -> list[PackedSequence]:
    """Return every PackedSequence in ``tree``."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, PackedSequence)]


def map_packed(function: Callable[[PackedSequence], Any], tree: Any) -> Any:
    """Return ``tree`` with every PackedSequence ``p`` replaced by ``function(p)``; the same object if it has none."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, PackedSequence) else leaf, tree)


def merge_packed(function: Callable[[PackedSequence], Any], tree: Any, original: Callable[[Any], Any]) -> Any:
    """Return ``original(tree)`` with ``function(p)`` at the place of every PackedSequence ``p`` of ``tree``.

    For functions upstream that treat everything else right, and keep the structure of ``tree``: they get an empty
    tuple at these places.
    """
    rest = original(map_packed(lambda packed: (), tree))
    return map_leaves(lambda leaf, value: function(leaf) if is_packed(leaf) else value, tree, rest)


def map_data(function: Callable[[Any], Any], batch: Any, tree: Any) -> Any:
    """Return ``tree``, the ``data`` of a batch, with other leaves, and other ``data`` in every PackedSequence.

    Args:
        function: gets a copy of the batch with a flat ``data``, which has the ``data`` in the place of a
            PackedSequence, and returns it changed; what it leaves out stays as it is.
        batch: an object that holds a nested batch as its ``data``.
        tree: this nested batch.
    """
    flat = copy.copy(batch)
    values = [leaf.data if is_packed(leaf) else leaf for leaf in leaves(tree)]
    flat.data = {str(place): value for place, value in enumerate(values)}
    changed = function(flat).data
    new = iter([changed.get(str(place), value) for place, value in enumerate(values)])
    return map_leaves(lambda leaf: with_data(leaf, next(new)) if is_packed(leaf) else next(new), tree)


def check_batch(batch: Any) -> bool:
    """Check every PackedSequence in a batch; return whether the batch is a mapping with one in it.

    What makes one inconsistent is in :func:`~hf_packfix.packing.packed.check`. Index tensors on another device than
    the CPU are not validated, to avoid a device sync in every step.

    Args:
        batch: a mapping, or any nesting of lists, tuples and mappings.

    Raises:
        ValueError: naming the key, or the position in a list or tuple, and the fields.
    """
    if not contains(batch):
        return False
    for name, value in named_items(batch):
        try:
            for packed in packed_in(value):
                check(packed, wait=False)
        except ValueError as error:
            raise ValueError(f"{name} in the batch: {error}") from None
    return isinstance(batch, Mapping)


def check_alike(batches: Sequence[Any]) -> None:
    """Check every PackedSequence in batches that are to be concatenated, and that those of one key have like steps.

    Raises:
        ValueError: naming the key, or the position in a list or tuple, and the batch.
    """
    for batch in batches:
        check_batch(batch)
    for number, batch in enumerate(batches):
        for (name, first), (_, other) in zip(named_items(batches[0]), named_items(batch), strict=False):
            for one, another in zip(packed_in(first), packed_in(other), strict=False):
                expected, found = list(one.data.shape[1:]), list(another.data.shape[1:])
                if found != expected:
                    raise ValueError(
                        f"{name} has steps of shape {found} in batch {number}, but {expected} in batch 0: batches "
                        f"can be concatenated only if the steps of a key have one shape"
                    )


def named_items(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a batch holds, with the words for its place in an error."""
    if isinstance(tree, Mapping):
        yield from ((repr(key), value) for key, value in tree.items())
    elif isinstance(tree, (tuple, list)) and not isinstance(tree, PackedSequence):
        fields = getattr(tree, "_fields", None)
        names = map(repr, fields) if fields else (f"position {place}" for place in range(len(tree)))
        yield from zip(names, tree, strict=True)


def rows_of_keys(batch: Mapping[str, Any], kinds: Any = PackedSequence) -> dict[str, int]:
    """Return for each key the number of rows B of its first PackedSequence, or of what else is asked for.

    Args:
        batch: a mapping.
        kinds: PackedSequence, or with Tensor; a tensor without a dimension has no rows.

    Raises:
        ValueError: the fields of a PackedSequence contradict each other.
    """
    found: dict[str, int] = {}
    for key, value in batch.items():
        for leaf in leaves(value):
            if is_packed(leaf):
                found.setdefault(key, batch_size(leaf))
            elif isinstance(leaf, kinds) and leaf.dim():
                found.setdefault(key, len(leaf))
    return found
