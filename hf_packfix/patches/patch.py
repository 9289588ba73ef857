"""What a patch is: a target upstream, a reason, when it applies; how it is put on and taken off."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

__all__ = ["Patch", "PatchStatus", "State", "patch"]

State = Literal["applied", "pending", "not-needed", "not-applicable", "refused", "off"]
Function = Callable[..., Any]

#: The attribute of a wrapper that holds its patch: how a second copy of this package finds the first one's.
_ATTRIBUTE = "_hf_packfix_patch"


@dataclass(frozen=True)
class PatchStatus:
    """One patch and where it stands.

    Attributes:
        target: ``module:path`` of what is wrapped.
        reason: why, in a line.
        state: ``applied``; ``pending`` (the module is not loaded yet, or torch is not); ``not-needed`` (upstream
            handles PackedSequence there); ``not-applicable`` (this version has no such place); ``refused`` (the
            target is not what it was when the patch was written); ``off`` (hf_packfix is not enabled).
        detail: more on the state, such as the reason of a refusal; may be empty.
    """

    target: str
    reason: str
    state: State
    detail: str = ""

    def __str__(self) -> str:
        tail = f" ({self.detail})" if self.detail else ""
        return f"{self.state:<14} {self.target}{tail}\n{'':<14}   {self.reason}"


class _Layer(NamedTuple):
    """A wrapper that was put on.

    Attributes:
        owner: the class or module of the target at that time; a reload makes another class.
        original: what was found there.
        wrapper: what was put in its place.
    """

    owner: Any
    original: Function
    wrapper: Function


class Patch:
    """A wrapper around one function or method upstream, in place and reversible.

    Wrappers are plain functions, not ``wrapt.FunctionWrapper`` objects: a Trainer keeps bound methods of
    its accelerator as attributes, and neither they nor a function that a data loader holds could be
    deep-copied or pickled through an object proxy.

    Attributes:
        target: ``module:path`` of what is wrapped.
        reason: why, in a line.
        parameters: the names that the target's parameters must start with.
        handled: tells whether a function as found upstream does what is right already; None where no probe can.
        since: the first release that has the target; None if all supported ones do.
        until: the first release that needs no patch there; None if all do.
        active: whether the wrapper acts. A wrapper that cannot be taken off, because somebody wrapped it
            in turn, stays where it is and hands over to the original while this is False.
    """

    def __init__(
        self,
        target: str,
        reason: str,
        make: Callable[[Function, Patch], Function],
        parameters: tuple[str, ...],
        handled: Callable[[Function], bool] | None,
        since: str | None = None,
        until: str | None = None,
    ) -> None:
        self.target = target
        self.module, self.path = target.split(":")
        self.reason = reason
        self.active = False
        self._make = make
        self.parameters = parameters
        self.handled = handled
        self.since = since
        self.until = until
        # All there ever were: after a reload the class before it lives on in its subclasses, and somebody may put
        # back a wrapper that he took away.
        self._layers: list[_Layer] = []
        self._verdict: tuple[State, str] = ("pending", "")
        self._judged: Function | None = None
        #: Parameters of the target that the wrapper does not know, and passes on.
        self.unknown: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Patch {self.target}>"

    def expected_on(self, version: str | None) -> bool:
        """Return whether a release of the target's package should have the target, as far as is known.

        Args:
            version: of the release; None or a string that is no version: nothing is known.
        """
        # Imported here: needed only where a target is missing.
        from packaging.version import InvalidVersion, Version

        try:
            release = Version(version or "")
        except InvalidVersion:
            return False
        begun = self.since is None or release >= Version(self.since)
        return begun and (self.until is None or release < Version(self.until))

    @property
    def pending(self) -> bool:
        """Whether the target was not looked at yet, since its module was not loaded."""
        return self._verdict[0] == "pending"

    def put_on(self) -> None:
        """Wrap the target, unless it is wrapped, absent, changed, or right as it is."""
        self._verdict = self._try_on()
        self.active = self._verdict[0] == "applied"

    def take_off(self) -> None:
        """Put the very same originals back; where somebody wrapped us, pass through and leave theirs."""
        self.active = False
        for layer in reversed(self._layers):
            self._swap(layer, layer.wrapper, layer.original)

    def status(self, enabled: bool) -> PatchStatus:
        """Return where the patch stands, read from the target as it is now."""
        if not enabled:
            return PatchStatus(self.target, self.reason, "off")
        state, detail = self._verdict
        current = self._current()
        if self.overwritten():
            state = "refused"
            detail = f"{_name(current)} replaced it after activation; hf_packfix.enable() wraps again"
        elif state == "applied" and not any(current is layer.wrapper for layer in self._layers):
            detail = f"wrapped in turn by {_name(current)}"
        return PatchStatus(self.target, self.reason, state, detail)

    def overwritten(self) -> bool:
        """Tell whether what was found at activation was replaced by something that fails on a PackedSequence."""
        state, current = self._verdict[0], self._current()
        if state == "applied":
            return current is None or not self._reached_from(current)
        if state == "not-needed" and current is not self._judged:
            return current is None or self.handled is None or not _succeeds(self.handled, current)
        return False

    def _try_on(self) -> tuple[State, str]:
        module = sys.modules.get(self.module)
        if module is None:
            if _does_not_exist(self.module):
                return "not-applicable", f"there is no module {self.module} here"
            return "pending", ""
        for other in self._other_copies(self._current()):
            other.take_off()
        owner, _, current = _resolve(module, self.path)
        if current is None:
            return "not-applicable", f"{self.module} has no {self.path} here"
        if not callable(current):
            return "refused", f"expected a function, found {type(current).__name__}"
        if not self._reached_from(current):
            layer = next((x for x in self._layers if x.owner is owner and x.original is current), None)
            if layer is None:
                if self.handled is not None and _succeeds(self.handled, current):
                    self._judged = current
                    return "not-needed", f"{_name(current)} handles PackedSequence"
                found = _parameters(current)
                if found[: len(self.parameters)] != self.parameters:
                    return (
                        "refused",
                        f"expected the parameters ({', '.join(self.parameters)}), found ({', '.join(found)})",
                    )
                wrapper = functools.wraps(current)(self._wrapper(current, found))
                setattr(wrapper, _ATTRIBUTE, self)
                self._layers.append(_Layer(owner, current, wrapper))
        # Before it is visible: another thread may call it at once.
        self.active = True
        for layer in self._layers:
            self._swap(layer, layer.original, layer.wrapper)
        return "applied", ""

    def _wrapper(self, original: Function, found: tuple[str, ...]) -> Function:
        """Return the wrapper of a function with these parameters, of which a later release may have added some."""
        wrapper = self._make(original, self)
        known = _parameters(wrapper)
        self.unknown = () if _takes_any(wrapper) else tuple(name for name in found if name not in known)
        if not self.unknown:
            return wrapper

        def with_unknown_parameters(*args: Any, **kwargs: Any) -> Any:
            added = args[len(known) :]
            named = {name: kwargs.pop(name) for name in set(kwargs) - set(known)}
            if not added and not named:
                return wrapper(*args, **kwargs)

            def passing_them_on(*args: Any, **kwargs: Any) -> Any:
                return original(*args, *added, **kwargs, **named)

            return self._make(passing_them_on, self)(*args[: len(known)], **kwargs)

        return with_unknown_parameters

    def _swap(self, layer: _Layer, old: Function, new: Function) -> None:
        name = self.path.rpartition(".")[2]
        for holder in list(_holders(layer.owner, name, old)):
            setattr(holder, name, new)

    def _current(self) -> Function | None:
        return _resolve(sys.modules.get(self.module), self.path)[2]

    def _reached_from(self, current: Function) -> bool:
        """Tell whether calling ``current`` ends up in our wrapper."""
        wrappers = [layer.wrapper for layer in self._layers]
        if any(function is wrapper for function in _chain(current) for wrapper in wrappers):
            return True
        # A foreign wrapper that does not say what it wraps: ask by behaviour, with ours acting.
        if not wrappers or self.handled is None or any(current is layer.original for layer in self._layers):
            return False
        # What does right without ours is somebody's own fix.
        if self._other_copies(current) or (not self.active and _succeeds(self.handled, current)):
            return False
        was, self.active = self.active, True
        try:
            return _succeeds(self.handled, current)
        finally:
            self.active = was

    def _other_copies(self, current: Function | None) -> list[Any]:
        """Return the acting patches of other copies of this package, loaded a second time, around the target.

        The last one that is enabled takes the others off: two would wrap twice, and neither could say that
        turning it off restores upstream.
        """
        patches = {id(p): p for f in _chain(current) if (p := getattr(f, _ATTRIBUTE, None)) is not None}
        return [patch for patch in patches.values() if patch is not self and patch.active]


def patch(
    target: str,
    *,
    reason: str,
    parameters: tuple[str, ...],
    handled: Callable[[Function], bool] | None = None,
    since: str | None = None,
    until: str | None = None,
) -> Callable[[Callable[[Function, Patch], Function]], Patch]:
    """Declare a patch; decorates the function that makes the wrapper from the original and the patch.

    Args:
        target: ``module:path`` of the function or method to wrap.
        reason: why, in a line; users read it in ``hf_packfix.status()``.
        parameters: the names that the target's parameters start with; anything else refuses the patch.
        handled: given the function as found upstream, tells whether it already does the right thing for a
            tiny PackedSequence on the CPU; an exception counts as no.
        since: the first release of the target's package that has the target; by default, all supported ones do.
        until: the first release that needs no patch there; by default, all do.
    """

    def declare(make: Callable[[Function, Patch], Function]) -> Patch:
        return Patch(target, reason, make, parameters, handled, since, until)

    return declare


def _resolve(module: types.ModuleType | None, path: str) -> tuple[Any, str, Function | None]:
    """Return who holds the target, its name there, and the target as it is now, None where absent."""
    import wrapt

    name = path.rpartition(".")[2]
    if module is None:
        return None, name, None
    try:
        owner, name, _ = wrapt.resolve_path(module, path)
    except AttributeError:
        return None, name, None
    # From the owner's own namespace: an inherited method is another patch's target, and `getattr` on a
    # class would bind descriptors.
    return owner, name, vars(owner).get(name)


def _holders(owner: Any, name: str, function: Function) -> Iterator[Any]:
    """Yield every object whose attribute ``name`` is this function.

    A method lives on its class alone. A module's function also lives in every module that imported it by
    name, such as ``transformers.trainer`` those of ``transformers.trainer_pt_utils``.
    """
    if not isinstance(owner, types.ModuleType):
        if owner is not None and vars(owner).get(name) is function:
            yield owner
        return
    for module in list(sys.modules.values()):
        # `vars`, not `getattr`: transformers' lazy modules import on attribute access.
        if getattr(module, "__dict__", {}).get(name) is function:
            yield module


def _chain(function: Function | None) -> Iterator[Function]:
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        yield function
        seen.add(id(function))
        function = getattr(function, "__wrapped__", None)


def _parameters(function: Function) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _takes_any(function: Function) -> bool:
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    return not kinds.isdisjoint({inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD})


def _does_not_exist(module: str) -> bool:
    """Return whether a module's package is loaded and has no such module."""
    package = sys.modules.get(module.rpartition(".")[0])
    if package is None or getattr(getattr(package, "__spec__", None), "_initializing", False):
        return False
    try:
        return importlib.util.find_spec(module) is None
    except (ImportError, AttributeError, ValueError):
        return False


def _name(function: Any) -> str:
    """Say which function this is, even where ``functools.wraps`` gave it another one's name."""
    code = getattr(function, "__code__", None)
    if code is None:
        return repr(function)
    return f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"


def _succeeds(handled: Callable[[Function], bool], function: Function) -> bool:
    # Whatever upstream raises on a PackedSequence, it does not handle it.
    try:
        return bool(handled(function))
    except Exception:
        return False
