"""The functions and methods of other packages: finding one, what it wraps, and replacing it wherever it is held."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Function = Callable[..., Any]


def is_complete(module: str) -> bool:
    """Return whether a module is loaded to its last line."""
    loaded = sys.modules.get(module)
    return loaded is not None and not getattr(getattr(loaded, "__spec__", None), "_initializing", False)


def loaded_without(module: str) -> bool:
    """Return whether a module's package is loaded to its last line and has no such module."""
    return is_complete(module.rpartition(".")[0]) and not _exists(module, if_unknown=True)


def _exists(module: str, *, if_unknown: bool = False) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, AttributeError, ValueError):
        return if_unknown


def resolve(module: str, path: str) -> tuple[Any, Function | None]:
    """Return the class or module that holds a target, and the target as it is now; None for what is missing."""
    import wrapt

    loaded = sys.modules.get(module)
    if loaded is None:
        return None, None
    try:
        owner, name, _ = wrapt.resolve_path(loaded, path)
    except AttributeError:
        return None, None
    # From the owner's own namespace: an inherited method is another patch's target, and `getattr` on a class would
    # bind descriptors.
    return owner, vars(owner).get(name)


def has(module: str, name: str) -> bool:
    """Return whether upstream has a name that a patch uses.

    Args:
        module: of the target.
        name: as in ``Patch.uses``.
    """
    where, _, path = name.rpartition(":")
    owner: Any = sys.modules.get(where or module)
    if owner is None:  # not loaded, and not to be loaded for this
        return _exists(where)
    *outer, last = path.split(".")
    for part in outer:
        owner = getattr(owner, "__dict__", {}).get(part)
    return last in (_names_in(owner) if isinstance(owner, type) else getattr(owner, "__dict__", {}))


@functools.lru_cache(maxsize=32)
def _names_in(cls: type) -> frozenset[str]:
    """Return the attributes of a class, and every name in the code of its methods."""
    names: set[str] = set()
    for base in cls.__mro__[:-1]:
        names |= vars(base).keys() | vars(base).get("__annotations__", {}).keys()
        for value in vars(base).values():
            for function in (value, *(getattr(value, part, None) for part in ("__func__", "fget", "fset"))):
                names |= names_in(function)
    return frozenset(names)


def names_in(function: Any) -> set[str]:
    """Return the global names and attributes in the code of a function, for a wrapper of the innermost function.

    Our own wrappers name what they use. Empty for what is no function.
    """
    names: set[str] = set()
    *_, innermost = [None, *chain(function)]
    codes = [getattr(innermost, "__code__", None)]
    while codes:
        code = codes.pop()
        if isinstance(code, types.CodeType):
            names.update(code.co_names)
            codes += code.co_consts
    return names


def exchange(changes: Iterable[tuple[Any, str, Function, Function]]) -> None:
    """Replace functions wherever they are held, if they still are.

    A method is replaced only on its class. A function of a module is also replaced in every module that imported it,
    under any name: ``transformers.trainer`` has imported those of ``transformers.trainer_pt_utils``.

    Args:
        changes: the class or module that owns the function, its path in the module, the function, and its replacement.
    """
    functions: dict[int, Function] = {}
    for owner, path, old, new in changes:
        name = path.rpartition(".")[2]
        if isinstance(owner, types.ModuleType):
            functions.setdefault(id(old), new)
        elif owner is not None and vars(owner).get(name) is old:
            setattr(owner, name, new)
    if not functions:
        return
    # One pass for all of them. `vars`, not `getattr`: the lazy modules of transformers import on attribute access.
    for module in list(sys.modules.values()):
        namespace = getattr(module, "__dict__", {})
        if functions.keys().isdisjoint(map(id, list(namespace.values()))):
            continue
        for name, value in list(namespace.items()):
            if id(value) in functions:
                setattr(module, name, functions[id(value)])


def chain(function: Function | None) -> Iterator[Function]:
    """Yield a function, what it wraps, and so on."""
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        yield function
        seen.add(id(function))
        function = getattr(function, "__wrapped__", None)


def parameters_of(function: Function) -> tuple[str, ...]:
    """Return the names of a function's parameters; empty if Python does not know them."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def location(function: Any) -> str:
    """Return the name, file and line of a function, even if ``functools.wraps`` gave it another one's name."""
    code = getattr(function, "__code__", None)
    if code is None:
        return repr(function)
    return f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"
