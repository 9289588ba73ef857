"""Turning the patches on and off, and saying where they stand."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from hf_packfix import versions
from hf_packfix._version import __version__
from hf_packfix.notices import HFPackfixWarning, in_a_line, is_main_process, warn_once
from hf_packfix.switch import ACCEPTED, FAST_RNN_VARIABLE, VARIABLE, switch, value
from hf_packfix.switch import fast_rnn as environment_fast_rnn

if TYPE_CHECKING:
    from hf_packfix.patches import Patch, PatchStatus

__all__ = ["Status", "activate_on_import", "difference", "disable", "enable", "is_enabled", "status"]

logger = logging.getLogger("hf_packfix")

# Reentrant: putting on a patch imports torch, whose import may fire another of our import hooks.
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


# Another thread may hold the lock while this one forks; in the child nobody would ever release it.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)

_activated_by: str | None = None
_fast_rnn = False  # whether the patches of the recurrent layers are asked for
_why_inactive = "hf_packfix.enable() was not called"
_hooked: set[str] = set()
_loaded: deque[str] = deque()  # modules whose import hook has fired and whose patches nobody has looked at since
_torch_is_loaded = False
_failures: set[str] = set()
_announced = False
_tell: Callable[[str], None] = warn_once  # how differences upstream are reported; set by `_enable`


@dataclass(frozen=True)
class Status:
    """Where hf_packfix stands in this process; ``str()`` of it is made to be read.

    Attributes:
        enabled: whether the patches act, or will as soon as what they patch is imported.
        reason: why it is enabled or not.
        activated_by: what turned it on, such as ``import hf_packfix``; None while it is off.
        versions: the installed version of each distribution that matters; None where it is missing.
        patches: every patch with its target, its problem and fix, and its state.
    """

    enabled: bool
    reason: str
    activated_by: str | None
    versions: dict[str, str | None] = field(default_factory=dict)
    patches: tuple[PatchStatus, ...] = ()

    def __str__(self) -> str:
        installed = ", ".join(f"{name} {version or 'missing'}" for name, version in self.versions.items())
        head = f"hf_packfix is {'enabled' if self.enabled else 'not enabled'}: {self.reason}\n{installed}"
        return "\n".join([head, *map(str, self.patches)])


def enable(*, force: bool = False, fast_rnn: bool | None = None) -> None:
    """Wrap what stands in the way of packed batches, now or as soon as it is imported.

    Calling it again wraps nothing twice; it puts back what somebody removed since.

    Args:
        force: go on past a version refusal, and past ``HF_PACKFIX=0``.
        fast_rnn: whether ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` train on packed data on a CPU with a backward of our
            own. By default, what ``HF_PACKFIX_FAST_RNN`` asks for, if hf_packfix is not enabled yet; if it is, this
            stays as it is.

    Raises:
        UnsupportedVersionError: transformers or accelerate is missing or too old.
    """
    _enable("hf_packfix.enable()", force=force, fast_rnn=fast_rnn)


def disable() -> None:
    """Put the originals back, the very same objects.

    Where somebody wrapped one of our wrappers in turn, theirs stays in place and ours hands over to the
    original.
    """
    global _activated_by, _fast_rnn, _why_inactive
    with _locked():
        _activated_by, _fast_rnn, _why_inactive = None, False, "hf_packfix.disable() was called"
        _revert([*_first_uses(), *reversed(_all_patches())])


def is_enabled() -> bool:
    """Tell whether the patches act, or will as soon as what they patch is imported.

    Read from the patched objects, not from memory alone: False where somebody has put an original back.
    """
    with _locked():
        _apply_pending()
        return _activated_by is not None and not any(patch.overwritten() for patch in _patches())


def status() -> Status:
    """Return where hf_packfix stands; imports neither torch nor transformers."""
    with _locked():
        activated_by = _activated_by
        enabled = is_enabled()
        asked = set(_patches())
        patches = tuple(
            _with_cause(patch.status(activated_by is not None), patch.module) if patch in asked else _not_asked(patch)
            for patch in _all_patches()
        )
    if activated_by is None:
        reason = _why_inactive
    elif enabled:
        reason = f"activated by {activated_by}"
    else:
        reason = f"activated by {activated_by}, but a patch was overwritten since"
    names = ("hf-packfix", "transformers", "accelerate", "torch", "wrapt")
    return Status(enabled, reason, activated_by, {name: versions.found(name) for name in names}, patches)


def activate_on_import() -> None:
    """Activate because the package was imported; called once, by ``hf_packfix/__init__.py``.

    A user's own import is told of a refusal by an exception. An import on behalf of ``HF_PACKFIX`` logs it
    and leaves the program alone, and the commands report it in their own words.

    Raises:
        UnsupportedVersionError: transformers or accelerate is missing or too old.
    """
    global _why_inactive
    asks = switch()
    if asks == "off":
        _why_inactive = f"{VARIABLE}={value()} keeps it off"
        return
    if asks is None:
        accepted = ", ".join(word for words in ACCEPTED.values() for word in words)
        _why_inactive = f"{VARIABLE}={value()!r} is not one of: {accepted}; nothing is activated"
        return
    automatic = bool(getattr(sys.modules.get("_hf_packfix_boot"), "activating", False))
    by = f"{VARIABLE}={value()}" if automatic else "import hf_packfix"
    try:
        _enable(by, force=asks == "force", tell=_log_warning if automatic else None)
    except versions.UnsupportedVersionError as error:
        if not (automatic or _is_command()):
            raise
        _why_inactive = str(error)
        if automatic:
            _log_warning(f"not activated: {error}")


def enable_for_run() -> None:
    """Activate for ``hf-packfix run``, and in the child processes of the program, past ``HF_PACKFIX=0``.

    Raises:
        UnsupportedVersionError: transformers or accelerate is missing or too old.
    """
    global _activated_by
    force = switch() == "force"
    if not force:
        os.environ[VARIABLE] = "1"
    _enable("hf-packfix run", force=force)
    _activated_by = "hf-packfix run"


def _is_command() -> bool:
    """Tell whether this process is ``hf-packfix`` or ``python -m hf_packfix``."""
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    # While `-m` imports the package, argv[0] is "-m".
    by_module = program == "-m" and any(word in sys.orig_argv for word in ("hf_packfix", "-mhf_packfix"))
    return by_module or program.startswith("hf-packfix")


def module_loaded(module: ModuleType) -> None:
    """Put on the patches of an upstream module that has just been imported (``wrapt``'s import hook).

    Where torch is not loaded there are no packs, and a program that needs no more than a tokenizer is not made to
    load it: all patches wait for torch.

    Never waits for another thread, which in turn may wait for the import of this module: who has the lock then puts
    on these patches, too. Never raises: an exception in an import hook would fail the import of the module itself.
    """
    _loaded.append(module.__name__)
    _catch_up()


def _trainer_is_used() -> None:
    """Put on the patches of modules whose import hook never ran; like :func:`module_loaded`, never waits or raises."""
    _loaded.append("")
    _catch_up()


@contextmanager
def _locked() -> Iterator[None]:
    try:
        with _lock:
            yield
    finally:
        _catch_up()


def _catch_up() -> None:
    """Put on the patches of the modules loaded so far, unless another thread is at work, which will."""
    lock = _lock
    # Asked again after letting go, for a module that found the lock taken a moment before.
    while _loaded and lock.acquire(blocking=False):
        try:
            while _loaded:
                _apply_pending(_loaded.popleft())
        finally:
            lock.release()


def _apply_pending(name: str = "") -> None:
    """Put on the patches of every loaded module that still has some: not every import hook runs.

    A finder that somebody put in front of wrapt's may load a module by itself, as that of comet_ml does for torch, and
    those of typeguard and jaxtyping for the modules that one names. Never raises; the lock is the caller's.

    Args:
        name: of a module whose import hook has just run: it is loaded to its end, though the import system is not
            through with it.
    """
    global _torch_is_loaded
    # While torch is being imported, modules of its own among them, no probe can tell anything: its hook comes last.
    _torch_is_loaded = _torch_is_loaded or name == "torch" or _is_complete("torch")
    if _activated_by is None or not _torch_is_loaded:
        return
    try:
        due = [
            patch
            for patch in _patches()
            if patch.module == name
            or (patch.pending and _is_complete(patch.module))
            or (name == "torch" and not _is_half_imported(patch.module))
        ]
        # What is applied was put on a moment ago, by `enable()`, which asks for the hooks of loaded modules as well.
        due = [patch for patch in due if patch.status(True).state != "applied"]
        if due:
            _apply_and_log(due)
        if any(patch.pending for patch in _patches()):
            _apply([patch for patch in _first_uses() if patch.module == name or _is_complete(patch.module)])
        else:
            _revert(_first_uses())
    except Exception as error:
        logger.debug("could not patch %s", name or "what is pending", exc_info=True)
        # Once: what is wrong with us fails in the hook of every module.
        if repr(error) not in _failures:
            _failures.add(repr(error))
            _log_warning(f"hf_packfix could not patch {name or 'what is pending'}: {in_a_line(error)}")


def _with_cause(status: PatchStatus, module: str) -> PatchStatus:
    """Return the status with what a patch waits for though its module is there."""
    if status.state != "pending" or module not in sys.modules:
        return status
    return replace(status, detail="torch is not loaded" if _is_complete(module) else "the module is being imported")


def _is_complete(name: str) -> bool:
    """Tell whether a module is loaded to its last line."""
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


def _is_half_imported(name: str) -> bool:
    """Tell whether a module is being imported, so that its functions may not be there yet."""
    return name in sys.modules and not _is_complete(name)


def _wait_for(names: Iterable[str]) -> None:
    """Wait for the modules that other threads are importing: wrapt calls no hook at the end of these."""
    for name in names:
        if _is_half_imported(name):
            with suppress(Exception):  # is for the thread that began it
                import_module(name)


def _enable(
    activated_by: str, *, force: bool, fast_rnn: bool | None = None, tell: Callable[[str], None] | None = None
) -> None:
    global _activated_by, _fast_rnn, _tell
    if switch() == "off" and not force:
        warn_once(f"{VARIABLE}={value()} keeps hf_packfix off; unset it, or call enable(force=True)")
        return
    conflict = versions.conflict()
    if conflict is not None and not force:
        raise versions.UnsupportedVersionError(conflict)
    _tell = tell or _warn
    # Before anything is changed: without it nothing can be.
    import wrapt

    with _locked():
        if fast_rnn is None:
            fast_rnn = _fast_rnn if _activated_by is not None else _environment_asks_for_fast_rnn()
        _fast_rnn = fast_rnn
        if not fast_rnn:
            _revert(reversed(_fast_rnn_patches()))
        modules = sorted({"torch", *(patch.module for patch in _patches())} - _hooked)
    _wait_for(modules)
    with _locked():
        _activated_by = _activated_by or activated_by
        if "torch" in sys.modules:
            _apply_and_log([patch for patch in _patches() if not _is_half_imported(patch.module)])
            _apply_pending()
        _hooked.update(modules)
    # Outside the lock, since wrapt takes its own and calls back for a module imported meanwhile.
    for name in modules:
        wrapt.register_post_import_hook("hf_packfix.activation:module_loaded", name)


def _apply_and_log(patches: Iterable[Patch]) -> None:
    """Apply patches, log what changed, and report what differs upstream."""
    before = {patch: patch.status(True) for patch in patches}
    _apply(before)
    for patch, was in before.items():
        after = patch.status(True)
        if after == was:
            continue
        logger.debug("%s: %s%s", after.target, after.state, f" ({after.detail})" if after.detail else "")
        found = difference(patch, after)
        if found:
            _tell(found)
    if not _announced:
        _announce()


def difference(patch: Patch, status: PatchStatus) -> str:
    """Return how a target differs from what its patch expects, and what that means; empty if it does not."""
    package = patch.module.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", None)
    if status.state == "refused" or (status.state == "not-applicable" and patch.expected_on(version)):
        return f"hf_packfix does not patch {status.target}: {status.detail}. Without the patch, it {status.problem}"
    if status.state == "applied" and patch.unknown:
        return (
            f"hf_packfix patches {status.target}, which has parameters that it does not know: expected "
            f"({', '.join(patch.parameters)}), found ({', '.join(patch.unknown)}) as well. They are passed on, but "
            f"have no effect on a PackedSequence"
        )
    return ""


def _warn(message: str) -> None:
    """Warn once; log instead if warnings are errors (``-W error``), since a difference must not end a program."""
    try:
        warn_once(message)
    except HFPackfixWarning:
        _log_warning(message)


def _log_warning(message: str) -> None:
    """Log one line with our name: a program that sets up no logging shows the bare message on stderr."""
    if is_main_process():
        logger.warning("hf_packfix: %s", " ".join(message.removeprefix("hf_packfix ").split()))


def _announce() -> None:
    """Log one line, once the Trainer is patched."""
    global _announced
    states = [patch.status(True).state for patch in _patches()]
    if "transformers.trainer" not in sys.modules or "applied" not in states:
        return
    _announced = True
    # For modules that upstream no longer has; the hooks of others are still to come.
    _apply_and_log([patch for patch in _patches() if patch.module not in sys.modules])
    if not is_main_process():
        return
    if not logger.isEnabledFor(logging.INFO):  # the versions below are read from files
        return
    logger.info(
        "hf_packfix %s activated by %s: %d patches applied, %d pending; transformers %s, accelerate %s, torch %s",
        __version__,
        _activated_by,
        states.count("applied"),
        states.count("pending"),
        *map(versions.found, ("transformers", "accelerate", "torch")),
    )
    newer = [f"{package} {version}" for package, version in versions.untested().items()]
    if newer:
        logger.info("newer than what hf_packfix was tested with, judged by probes: %s", ", ".join(newer))


def _environment_asks_for_fast_rnn() -> bool:
    asks = environment_fast_rnn()
    if asks is None:
        accepted = ", ".join(ACCEPTED["on"] + ACCEPTED["off"])
        _tell(f"{FAST_RNN_VARIABLE}={value(FAST_RNN_VARIABLE)!r} is not one of: {accepted}; torch's own layers run")
    return bool(asks)


def _not_asked(patch: Patch) -> PatchStatus:
    how = f"hf_packfix.enable(fast_rnn=True) or {FAST_RNN_VARIABLE}=1 turns it on"
    return replace(patch.status(False), detail=how)


def _apply(patches: Iterable[Patch]) -> None:
    from hf_packfix.patches import apply

    apply(patches)


def _revert(patches: Iterable[Patch]) -> None:
    from hf_packfix.patches import revert

    revert(patches)


def _patches() -> tuple[Patch, ...]:
    """Return the patches that are asked for."""
    # Imported on first use: a process kept inactive by HF_PACKFIX=0 has no need of them.
    from hf_packfix.patches import PATCHES

    return PATCHES + _fast_rnn_patches() if _fast_rnn else PATCHES


def _fast_rnn_patches() -> tuple[Patch, ...]:
    from hf_packfix.patches import FAST_RNN

    return FAST_RNN


def _all_patches() -> tuple[Patch, ...]:
    from hf_packfix.patches import FAST_RNN, PATCHES

    return PATCHES + FAST_RNN


def _first_uses() -> tuple[Patch, ...]:
    from hf_packfix.patches import FIRST_USE, first_use

    first_use.before = _trainer_is_used
    return FIRST_USE
