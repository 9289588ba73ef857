"""Finding the PackedSequences in a nested batch, and replacing them.

A batch is any nesting of mappings, lists and tuples, as ``Trainer._prepare_input`` walks it. A
PackedSequence is a leaf: nothing here looks into its fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy import ndarray
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["contains", "contains_namedtuple", "graft", "is_namedtuple", "rebuild", "replace"]

# What a batch mostly holds. Asked for first, since whether something is a `Mapping`, an abstract class, takes
# several times as long to find out; subclasses of these take that way.
_LEAVES = frozenset({Tensor, ndarray, str, int, float, bool, type(None)})


def contains(tree: Any) -> bool:
    """Tell whether there is a PackedSequence anywhere in ``tree``."""
    if type(tree) in _LEAVES:
        return False
    if isinstance(tree, (tuple, list)):
        return isinstance(tree, PackedSequence) or any(map(contains, tree))
    if isinstance(tree, Mapping):
        return any(map(contains, tree.values()))
    return False


def contains_namedtuple(tree: Any) -> bool:
    """Tell whether there is a named tuple, a PackedSequence or another, in ``tree``."""
    if isinstance(tree, tuple) and is_namedtuple(tree):
        return True
    if isinstance(tree, (tuple, list)):
        return any(map(contains_namedtuple, tree))
    if isinstance(tree, Mapping):
        return any(map(contains_namedtuple, tree.values()))
    return False


def replace(function: Callable[[PackedSequence], Any], tree: Any) -> Any:
    """Return ``tree`` with every PackedSequence ``p`` replaced by ``function(p)``.

    Containers on the way to one are rebuilt in their own type; everything else, and a tree without a
    PackedSequence, comes back as the same object.
    """
    if type(tree) in _LEAVES:
        return tree
    if isinstance(tree, PackedSequence):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        items = [replace(function, item) for item in tree]
        return tree if all(new is old for new, old in zip(items, tree, strict=True)) else rebuild(tree, items)
    if isinstance(tree, Mapping):
        values = {key: replace(function, value) for key, value in tree.items()}
        unchanged = all(values[key] is value for key, value in tree.items())
        return tree if unchanged else type(tree)(values)  # type: ignore[call-arg]
    return tree


def graft(function: Callable[[PackedSequence, Any], Any], tree: Any, other: Any) -> Any:
    """Return ``other`` with ``function(p, value)`` at the place of every PackedSequence ``p`` of ``tree``.

    For functions upstream that treat everything else right: ``other`` is what they made of ``tree`` with a
    stand-in at these places, and has its structure.
    """
    if isinstance(tree, PackedSequence):
        return function(tree, other)
    if not contains(tree):
        return other
    if isinstance(tree, Mapping):
        values = {key: graft(function, value, other[key]) for key, value in tree.items()}
        return type(other)(values)
    return rebuild(other, [graft(function, *pair) for pair in zip(tree, other, strict=True)])


def is_namedtuple(value: tuple[Any, ...]) -> bool:
    """Tell a named tuple, whose constructor takes its fields, from a tuple, whose takes an iterable."""
    return hasattr(value, "_fields")


def rebuild(like: Any, items: list[Any]) -> Any:
    """Return a list, tuple or named tuple of the type of ``like`` that holds ``items``."""
    # `_make` takes any number of fields past a `__new__` of the class's own, as `_replace` does.
    return type(like)._make(items) if is_namedtuple(like) else type(like)(items)
