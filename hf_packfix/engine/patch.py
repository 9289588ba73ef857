"""What a patch is: one function of another package, what is wrong with it, and how it is wrapped and restored."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from hf_packfix.engine.targets import Function, chain, exchange, has, loaded_without, location, parameters_of, resolve

#: When a patch is applied: by every ``enable()``, if its keyword or variable asks for it, or while another is pending.
Group = Literal["default", "fast_rnn", "first_use"]
State = Literal["applied", "pending", "not-needed", "not-applicable", "refused", "off"]

#: The attribute of a wrapper that holds its patch: how a second copy of this package finds the first one's.
_ATTRIBUTE = "_hf_packfix_patch"

#: By target, the patches that are missing and without which a Trainer computes wrong numbers silently.
unsafe: dict[str, Patch] = {}


@dataclass(frozen=True)
class PatchStatus:
    """One patch and its state.

    Attributes:
        target: ``module:path`` of what is wrapped.
        problem: what upstream does there.
        fix: what the patch does instead.
        state: ``applied``; ``pending`` (the module is not loaded yet, or torch is not); ``not-needed`` (upstream
            supports PackedSequence there); ``not-applicable`` (this version has no such function); ``refused`` (the
            function, or a name that the patch uses, is not what it was when the patch was written); ``off``
            (hf_packfix is not enabled).
        detail: more on the state, such as why a patch was refused; may be empty.
    """

    target: str
    problem: str
    fix: str
    state: State
    detail: str = ""

    def __str__(self) -> str:
        tail = f" ({self.detail})" if self.detail else ""
        return f"{self.state:<14} {self.target}{tail}\n{'':<14}   {self.problem}. With the patch: {self.fix}."


class _Layer(NamedTuple):
    """A wrapper that was applied.

    Attributes:
        owner: the class or module of the target at that time; a reload makes another class.
        original: what was found there.
        wrapper: what replaced it.
    """

    owner: Any
    original: Function
    wrapper: Function


@dataclass(eq=False, repr=False)
class Patch:
    """A wrapper around one function or method of another package, applied in place and reversible.

    Wrappers are plain functions, not ``wrapt.FunctionWrapper`` objects: a Trainer keeps bound methods of its
    accelerator as attributes, and neither they nor a function that a data loader holds could be deep-copied or pickled
    through an object proxy.

    Attributes:
        target: ``module:path`` of what is wrapped.
        make: makes the wrapper from the original and the patch.
        problem: what upstream does there, in a line.
        fix: what the patch does instead, in a line.
        parameters: the names that the target's parameters must start with.
        knows: the parameters that the wrapper knows; None if it passes on any others itself.
        uses: every other name of upstream that the wrapper reads, as ``module:path`` or a path in the target's module.
            The last part of a path in a class may be an attribute of its instances, or anything else that the code of
            its methods names. If one is missing, the patch is refused.
        upstream_supports: given the function as found upstream, returns whether it supports PackedSequence already, by
            a call on a tiny one on the CPU; an exception counts as no. None if no call can tell.
        silent: when a Trainer without the patch computes wrong numbers from packed batches, and raises no error. If
            the patch is missing, packed batches raise then.
        since: the first release of the target's package that has the target; None if all supported ones do.
        until: the first release that needs no patch there; None if all do.
        issue: the upstream issue or pull request about the problem; None if there is none.
        group: when it is applied.
        active: whether the wrapper acts. A wrapper that cannot be removed, because third-party code has wrapped it,
            stays and calls the original while this is False.
        unknown: parameters of the target that the wrapper does not know, and passes on.
    """

    target: str
    make: Callable[[Function, Patch], Function]
    problem: str
    fix: str
    parameters: tuple[str, ...]
    knows: tuple[str, ...] | None = None
    uses: tuple[str, ...] = ()
    upstream_supports: Callable[[Function], bool] | None = None
    silent: Literal["training", "evaluation", "always"] | None = None
    since: str | None = None
    until: str | None = None
    issue: str | None = None
    group: Group = "default"
    active: bool = field(default=False, init=False)
    unknown: tuple[str, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        self.module, self.path = self.target.split(":")
        # All that were ever applied: after a reload the old class lives on in its subclasses, and third-party code may
        # put back a wrapper that it removed.
        self._layers: list[_Layer] = []
        self._verdict: tuple[State, str] = ("pending", "")
        self._judged: Function | None = None

    def __repr__(self) -> str:
        return f"<Patch {self.target}>"

    def expected_on(self, version: str | None) -> bool:
        """Return whether a release of the target's package should have the target, as far as is known.

        Args:
            version: of the release; None or a string that is no version: nothing is known.
        """
        # Imported here: needed only if a target is missing.
        from packaging.version import InvalidVersion, Version

        try:
            release = Version(version or "")
        except InvalidVersion:
            return False
        begun = self.since is None or release >= Version(self.since)
        return begun and (self.until is None or release < Version(self.until))

    @property
    def pending(self) -> bool:
        """Whether the target was not examined yet, since its module was not loaded."""
        return self._verdict[0] == "pending"

    def deviation(self, status: PatchStatus | None = None) -> str:
        """Return how upstream differs from what the patch expects, and what that means; empty if it does not.

        Args:
            status: of the patch; by default, what was found when it was applied.
        """
        state, detail = (status.state, status.detail) if status else self._verdict
        version = getattr(sys.modules.get(self.module.partition(".")[0]), "__version__", None)
        if state == "refused" or (state == "not-applicable" and self.expected_on(version)):
            return f"hf_packfix does not patch {self.target}: {detail}. Without the patch, it {self.problem}"
        if state == "applied" and self.unknown:
            return (
                f"hf_packfix patches {self.target}, which has parameters that it does not know: expected "
                f"({', '.join(self.parameters)}), found ({', '.join(self.unknown)}) as well. They are passed on, but "
                f"have no effect on a PackedSequence"
            )
        return ""

    def status(self, enabled: bool) -> PatchStatus:
        """Return the state of the patch, read from the target as it is now."""
        if not enabled:
            return self._status("off")
        state, detail = self._verdict
        current = self._current()
        if self.overwritten():
            found = location(current)
            return self._status("refused", f"{found} replaced it after activation; hf_packfix.enable() wraps again")
        if state == "applied" and not any(current is layer.wrapper for layer in self._layers):
            detail = f"wrapped in turn by {location(current)}"
        return self._status(state, detail)

    def overwritten(self) -> bool:
        """Return whether what was found at activation was replaced by something that fails on a PackedSequence."""
        state, current = self._verdict[0], self._current()
        if state == "applied":
            return current is None or not self._reached_from(current)
        if state == "not-needed" and current is not self._judged:
            return current is None or not self.supported_by(current)
        return False

    def _status(self, state: State, detail: str = "") -> PatchStatus:
        return PatchStatus(self.target, self.problem, self.fix, state, detail)

    def examine(self) -> None:
        """Find the state that applying the patch leads to; if "applied", its wrapper is the newest layer."""
        self._verdict = self._examined()
        unsafe.pop(self.target, None)
        if self.silent and self._verdict[0] != "applied" and self.deviation():
            unsafe[self.target] = self

    def _examined(self) -> tuple[State, str]:
        if sys.modules.get(self.module) is None:
            if loaded_without(self.module):
                return "not-applicable", f"there is no module {self.module} here"
            return "pending", ""
        revert(self._other_copies(self._current()))
        owner, current = resolve(self.module, self.path)
        if current is None:
            return "not-applicable", f"{self.module} has no {self.path} here"
        if not callable(current):
            return "refused", f"expected a function, found {type(current).__name__}"
        known_original = any(layer.owner is owner and layer.original is current for layer in self._layers)
        if self._reached_from(current) or known_original:
            return "applied", ""
        if self.supported_by(current):
            self._judged = current
            return "not-needed", f"{location(current)} handles PackedSequence"
        found = parameters_of(current)
        if found[: len(self.parameters)] != self.parameters:
            return "refused", f"expected the parameters ({', '.join(self.parameters)}), found ({', '.join(found)})"
        missing = [name for name in self.uses if not has(self.module, name)]
        if missing:
            return "refused", f"it needs {' and '.join(missing)}, not found here"
        wrapper = functools.wraps(current)(self._passing_on_unknown(current, found))
        setattr(wrapper, _ATTRIBUTE, self)
        self._layers.append(_Layer(owner, current, wrapper))
        return "applied", ""

    def _passing_on_unknown(self, original: Function, found: tuple[str, ...]) -> Function:
        """Return the wrapper of a function with these parameters, some of which a later release may have added."""
        wrapper, known = self.make(original, self), self.knows
        self.unknown = () if known is None else tuple(name for name in found if name not in known)
        if known is None or not self.unknown:
            return wrapper

        def with_unknown_parameters(*args: Any, **kwargs: Any) -> Any:
            added = args[len(known) :]
            named = {name: kwargs.pop(name) for name in set(kwargs) - set(known)}
            if not added and not named:
                return wrapper(*args, **kwargs)
            passing_them_on = self.make(lambda *args, **kwargs: original(*args, *added, **kwargs, **named), self)
            return passing_them_on(*args[: len(known)], **kwargs)

        return with_unknown_parameters

    def _current(self) -> Function | None:
        return resolve(self.module, self.path)[1]

    def supported_by(self, function: Function) -> bool:
        """Return whether a function supports PackedSequence; whatever it raises on one counts as no."""
        try:
            return self.upstream_supports is not None and bool(self.upstream_supports(function))
        except Exception:
            return False

    def _reached_from(self, current: Function) -> bool:
        """Return whether a call of ``current`` ends up in our wrapper."""
        wrappers = [layer.wrapper for layer in self._layers]
        if any(function is wrapper for function in chain(current) for wrapper in wrappers):
            return True
        # A third-party wrapper without `__wrapped__`: only a call can tell, with ours acting.
        if not wrappers or self.upstream_supports is None or any(current is layer.original for layer in self._layers):
            return False
        # If it supports PackedSequence without ours, it is a fix of its own.
        if self._other_copies(current) or (not self.active and self.supported_by(current)):
            return False
        was, self.active = self.active, True
        try:
            return self.supported_by(current)
        finally:
            self.active = was

    def _other_copies(self, current: Function | None) -> list[Any]:
        """Return the active patches of other copies of this package, loaded a second time, around the target.

        The copy that is enabled last reverts the others: two would wrap twice, and neither could promise that
        turning it off restores upstream.
        """
        patches = {id(p): p for f in chain(current) if (p := getattr(f, _ATTRIBUTE, None)) is not None}
        return [patch for patch in patches.values() if patch is not self and patch.active]


def apply(patches: Iterable[Patch]) -> None:
    """Wrap the targets of patches, unless they are wrapped, missing, changed, or right as they are."""
    examined = list(patches)
    for patch in examined:
        patch.examine()
    layers = []
    for patch in examined:
        # Before the wrapper is visible: another thread may call it at once.
        patch.active = patch._verdict[0] == "applied"
        if patch.active:
            layers += [(layer.owner, patch.path, layer.original, layer.wrapper) for layer in patch._layers]
    exchange(layers)


def revert(patches: Iterable[Patch]) -> None:
    """Restore the original objects. If third-party code has wrapped our wrapper, theirs stays, ours does nothing."""
    layers = []
    for patch in patches:
        patch.active = False
        unsafe.pop(patch.target, None)
        layers += [(layer.owner, patch.path, layer.wrapper, layer.original) for layer in reversed(patch._layers)]
    exchange(layers)


def raise_if_unsafe(*, evaluates: bool) -> None:
    """Raise if a patch is missing without which a packed batch would give wrong numbers silently.

    Args:
        evaluates: whether an evaluation loop runs; otherwise the batch may be one of a training.

    Raises:
        RuntimeError: naming what differs upstream.
    """
    for patch in unsafe.values():
        if patch.silent in ("always", "evaluation" if evaluates else "training"):
            raise RuntimeError(
                f"a packed batch would give wrong numbers here. {patch.deviation()}. Upgrade hf_packfix, or install a "
                f"release that it was tested with (hf-packfix docs versions), or collate padded tensors"
            )
