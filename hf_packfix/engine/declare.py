"""How a patch is declared: a decorator on the function that does the work.

``@around`` calls the function instead of the original, if there is a PackedSequence in the arguments; ``@on_leaf`` for
one PackedSequence, if the original calls itself by its global name for what is nested. ``@hand_made`` is for the
hottest ones.

The function gets the original first, then the arguments of the call. It runs only while the patch is active. All three
decorators return the function as it is and take the same keywords, the fields of
:class:`hf_packfix.engine.patch.Patch`, of which ``parameters``, ``problem`` and ``fix`` are required.

A call without a PackedSequence reads nothing of upstream before it reaches the original: no change of upstream can
break it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from hf_packfix.engine.lazily import packing
from hf_packfix.engine.patch import Group, Patch
from hf_packfix.engine.targets import Function

F = TypeVar("F", bound=Function)

#: Keywords that several patches share.
Declaration = dict[str, Any]

_declared: dict[str, Patch] = {}

#: The modules that declare a patch.
files: set[str] = set()


def declared(group: Group) -> tuple[Patch, ...]:
    """Return the patches of a group, in the order in which they were declared."""
    return tuple(patch for patch in _declared.values() if patch.group == group)


def is_active(target: str) -> bool:
    """Return whether the patch of a target acts."""
    return _declared[target].active


#: Types of arguments that hold nothing, such as those of Trainers and models: found out once, since whether something
#: is a `Mapping`, an abstract class, takes longer than the rest.
_opaque: set[type] = set()


def holds_packed(*args: Any, **kwargs: Any) -> bool:
    """Return whether there is a PackedSequence in the arguments of a call."""
    for value in (*args, *kwargs.values()) if kwargs else args:
        if type(value) not in _opaque:
            if packing.contains(value):
                return True
            if not isinstance(value, (tuple, list, Mapping)):
                _opaque.add(type(value))
    return False


def with_our_models(*args: Any, **kwargs: Any) -> bool:
    """Return whether a model may be one of ours, whose padded batches need a patch as well, or a batch is packed."""
    return "hf_packfix.models" in sys.modules or holds_packed(*args, **kwargs)


def always(*args: Any, **kwargs: Any) -> bool:
    """Return True: for functions that only note that they are called."""
    return True


def around(target: str, *, when: Callable[..., bool] = holds_packed, **declaration: Any) -> Callable[[F], F]:
    """Declare a patch whose function is called instead of the original, ``function(original, *arguments)``.

    Args:
        target: ``module:path`` of the function.
        when: given the arguments of a call, returns whether the function is called. It may look at their types and at
            what is ours, at nothing of upstream.
    """
    return lambda function: _declare(target, partial(_around, function, when), function, declaration)


def on_leaf(target: str, *, rebuilds_named_tuples: bool = False, **declaration: Any) -> Callable[[F], F]:
    """Declare a patch whose function handles one PackedSequence, ``function(original, packed, *other_arguments)``.

    Args:
        target: ``module:path`` of the function.
        rebuilds_named_tuples: whether the original rebuilds tuples from a generator, which named tuples refuse: they
            are then rebuilt here, item by item.
    """
    return lambda function: _declare(target, partial(_on_leaf, function, rebuilds_named_tuples), function, declaration)


def hand_made(target: str, **declaration: Any) -> Callable[[F], F]:
    """Declare a patch whose function makes the wrapper, ``function(original, patch)``; it must look at ``active``.

    The wrapper has exactly the ``parameters`` of the declaration.
    """
    return lambda make: _register(Patch(target, make, knows=declaration["parameters"], **declaration), make)


def _declare(
    target: str, make: Callable[[Function, Patch], Function], function: F, declaration: Mapping[str, Any]
) -> F:
    arguments = list(inspect.signature(function).parameters.values())[1:]
    open_ended = any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in arguments)
    # The first one may have a name of its own, such as `packed`.
    names = (declaration["parameters"][0], *(parameter.name for parameter in arguments[1:]))
    return _register(Patch(target, make, knows=None if open_ended else names, **declaration), function)


def _register(patch: Patch, function: F) -> F:
    _declared[patch.target] = patch
    files.add(function.__module__)
    return function


def _around(function: Function, when: Callable[..., bool], original: Function, patch: Patch) -> Function:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if patch.active and when(*args, **kwargs):
            return function(original, *args, **kwargs)
        return original(*args, **kwargs)

    return wrapper


def _on_leaf(function: Function, rebuilds_named_tuples: bool, original: Function, patch: Patch) -> Function:
    name = patch.parameters[0]

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        leaf = args[0] if args else kwargs.get(name)
        if not (isinstance(leaf, tuple) and patch.active):
            return original(*args, **kwargs)
        others = args[1:]
        kwargs.pop(name, None)
        if packing.is_packed(leaf):
            return function(original, leaf, *others, **kwargs)
        if rebuilds_named_tuples and packing.is_namedtuple(leaf):
            return packing.rebuild(leaf, [wrapper(item, *others, **kwargs) for item in leaf])
        return original(leaf, *others, **kwargs)

    return wrapper
