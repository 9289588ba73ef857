"""Turning the patches on and off, and applying them as upstream modules are imported."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from hf_packfix._version import __version__
from hf_packfix._warnings import HFPackfixWarning, in_a_line, is_main_process, warn_once
from hf_packfix.activation import environment, versions
from hf_packfix.activation.environment import FAST_RNN_VARIABLE, VARIABLE
from hf_packfix.activation.status_report import Status
from hf_packfix.engine.targets import is_complete

if TYPE_CHECKING:
    from hf_packfix.engine.patch import Patch, PatchStatus

logger = logging.getLogger("hf_packfix")

#: Stand among the names of loaded modules for a Trainer that is first used, and for a call of ``enable``.
_FIRST_USE, _ENABLED = "the first use of a Trainer", "enable()"


@dataclass
class _State:
    """What changes while the process runs.

    Attributes:
        lock: held while patches are applied or reverted. Reentrant: applying a patch imports torch, which may call
            another of our import hooks.
        activated_by: what turned hf_packfix on; None while it is off.
        why_inactive: why it is off.
        fast_rnn: whether the patches of the recurrent layers are asked for.
        hooked: modules with an import hook of ours.
        loaded: modules whose import hook was called, and whose patches are still to be applied.
        torch_is_loaded: whether torch is loaded to its last line.
        failures: errors that were logged.
        announced: whether the line about the patched Trainer was logged.
        report: how differences upstream are reported; set by ``enable``.
    """

    lock: threading.RLock = field(default_factory=threading.RLock)
    activated_by: str | None = None
    why_inactive: str = "hf_packfix.enable() was not called"
    fast_rnn: bool = False
    hooked: set[str] = field(default_factory=set)
    loaded: deque[str] = field(default_factory=deque)
    torch_is_loaded: bool = False
    failures: set[str] = field(default_factory=set)
    announced: bool = False
    report: Callable[[str], None] = warn_once


# `importlib.reload` and IPython's autoreload run this file again: what is known must stay.
state: _State = globals().get("state") or _State()

# Another thread may hold the lock while this one forks; in the child it would never be released.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: setattr(state, "lock", threading.RLock()))


# --- what users call -------------------------------------------------------------------------------------


def enable(*, force: bool = False, fast_rnn: bool | None = None) -> None:
    """Patch transformers, accelerate and torch for packed batches, now or as soon as they are imported.

    Calling it again wraps nothing twice; it applies again what third-party code has removed since.

    Args:
        force: go on past a version refusal, and past ``HF_PACKFIX=0``.
        fast_rnn: whether ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` run packed data with operators of our own: on a CPU in
            training, on a GPU (LSTM and GRU) as padded data whose state is held still over padding. By default, what
            ``HF_PACKFIX_FAST_RNN`` asks for, if hf_packfix is not enabled yet; if it is, this stays as it is.

    Raises:
        UnsupportedVersionError: transformers or accelerate is missing or too old.
    """
    _enable("hf_packfix.enable()", force=force, fast_rnn=fast_rnn)


def disable() -> None:
    """Restore the original objects.

    If third-party code has wrapped one of our wrappers, theirs stays in place, and ours calls the original.
    """
    from hf_packfix.engine.patch import revert
    from hf_packfix.patches import FAST_RNN, FIRST_USE, PATCHES

    with _locked():
        state.activated_by, state.fast_rnn = None, False
        state.why_inactive = "hf_packfix.disable() was called"
        revert([*FIRST_USE, *reversed(PATCHES + FAST_RNN)])


@contextmanager
def disabled() -> Iterator[None]:
    """Restore the original objects inside a ``with`` statement, in all threads; afterwards all is as it was before.

    To compare with what transformers does without hf_packfix.

    Example:
        >>> import hf_packfix
        >>> with hf_packfix.disabled():
        ...     hf_packfix.is_enabled()
        False
        >>> hf_packfix.is_enabled()
        True
    """
    by, fast_rnn, why = state.activated_by, state.fast_rnn, state.why_inactive
    disable()
    try:
        yield
    finally:
        state.why_inactive = why
        if by is not None:
            # Past a refusal that was passed before.
            _enable(by, force=True, fast_rnn=fast_rnn, report=state.report)


def is_enabled() -> bool:
    """Return whether the patches act, or will as soon as what they patch is imported.

    Read from the patched objects, not only from memory: False if third-party code has put an original back.
    """
    with _locked():
        _apply_pending()
        return state.activated_by is not None and not any(patch.overwritten() for patch in _requested_patches())


def status() -> Status:
    """Return where hf_packfix stands; imports neither torch nor transformers."""
    from hf_packfix.patches import FAST_RNN, PATCHES

    with _locked():
        activated_by = state.activated_by
        enabled = is_enabled()
        patches = tuple(_status_of(patch, patch not in FAST_RNN or state.fast_rnn) for patch in PATCHES + FAST_RNN)
    if activated_by is None:
        reason = state.why_inactive
    elif enabled:
        reason = f"activated by {activated_by}"
    else:
        reason = f"activated by {activated_by}, but a patch was overwritten since"
    names = ("hf-packfix", "transformers", "accelerate", "torch", "wrapt")
    return Status(enabled, reason, activated_by, {name: versions.found(name) for name in names}, patches)


def _status_of(patch: Patch, requested: bool) -> PatchStatus:
    """Return the status of a patch, with why it is off though others are on, or waits though its module is there."""
    if not requested:
        how = f"hf_packfix.enable(fast_rnn=True) or {FAST_RNN_VARIABLE}=1 turns it on"
        return replace(patch.status(False), detail=how)
    status = patch.status(state.activated_by is not None)
    if status.state != "pending" or patch.module not in sys.modules:
        return status
    detail = "torch is not loaded" if is_complete(patch.module) else "the module is being imported"
    return replace(status, detail=detail)


# --- turning it on ---------------------------------------------------------------------------------------


def activate_on_import() -> None:
    """Activate because the package was imported; called once, by ``hf_packfix/__init__.py``.

    A user's own import raises if the versions are refused. An import on behalf of ``HF_PACKFIX`` logs the refusal and
    lets the program run on, and the commands report it in their own words.

    Raises:
        UnsupportedVersionError: transformers or accelerate is missing or too old.
    """
    asks, value = environment.requested(), environment.raw()
    if asks == "off":
        state.why_inactive = f"{VARIABLE}={value} keeps it off"
        return
    if asks is None:
        state.why_inactive = f"{environment.misunderstood(VARIABLE)}; nothing is activated"
        return
    automatic = bool(getattr(sys.modules.get("_hf_packfix_boot"), "activating", False))
    by = f"{VARIABLE}={value}" if automatic else "import hf_packfix"
    try:
        _enable(by, force=asks == "force", report=log_warning if automatic else None)
    except versions.UnsupportedVersionError as error:
        if not (automatic or _is_command()):
            raise
        state.why_inactive = str(error)
        if automatic:
            log_warning(f"not activated: {error}")


def enable_for_run() -> None:
    """Activate for ``hf-packfix run``, and in the child processes of the program, past ``HF_PACKFIX=0``.

    Raises:
        UnsupportedVersionError: transformers or accelerate is missing or too old.
    """
    force = environment.requested() == "force"
    if not force:
        os.environ[VARIABLE] = "1"
    _enable("hf-packfix run", force=force)
    state.activated_by = "hf-packfix run"


def _is_command() -> bool:
    """Return whether this process is ``hf-packfix`` or ``python -m hf_packfix``."""
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    # While `-m` imports the package, argv[0] is "-m".
    by_module = program == "-m" and any(word in sys.orig_argv for word in ("hf_packfix", "-mhf_packfix"))
    return by_module or program.startswith("hf-packfix")


def _enable(
    activated_by: str, *, force: bool, fast_rnn: bool | None = None, report: Callable[[str], None] | None = None
) -> None:
    if environment.requested() == "off" and not force:
        warn_once(f"{VARIABLE}={environment.raw()} keeps hf_packfix off; unset it, or call enable(force=True)")
        return
    conflict = versions.conflict()
    if conflict is not None and not force:
        raise versions.UnsupportedVersionError(conflict)
    state.report = report or _warn
    # Before anything is changed: without it nothing can be.
    import wrapt

    import hf_packfix.patches as patches
    from hf_packfix.engine.patch import revert
    from hf_packfix.patches import FAST_RNN

    patches.on_first_use = partial(_apply_loaded, _FIRST_USE)
    with _locked():
        if fast_rnn is None:
            fast_rnn = state.fast_rnn
            if state.activated_by is None:
                fast_rnn = environment.requested(FAST_RNN_VARIABLE) == "on"
                if problem := environment.misunderstood(FAST_RNN_VARIABLE):
                    state.report(f"{problem}; torch's own layers run")
        state.fast_rnn = fast_rnn
        if not fast_rnn:
            revert(reversed(FAST_RNN))
        modules = sorted({"torch", *(patch.module for patch in _requested_patches())} - state.hooked)
    # wrapt calls no hook at the end of an import that another thread has begun.
    for name in filter(_is_half_imported, modules):
        with suppress(Exception):  # that thread handles it
            import_module(name)
    with _locked():
        state.activated_by = state.activated_by or activated_by
        if "torch" in sys.modules:
            _apply_and_log([patch for patch in _requested_patches() if not _is_half_imported(patch.module)])
            _apply_pending(_ENABLED)
        state.hooked.update(modules)
    # Outside the lock, since wrapt takes its own and calls back for a module imported meanwhile.
    for name in modules:
        wrapt.register_post_import_hook("hf_packfix.activation.control:on_module_imported", name)


# --- applying patches as modules are imported ------------------------------------------------------------


def on_module_imported(module: ModuleType) -> None:
    """Apply the patches of an upstream module that has just been imported (wrapt's import hook).

    Without torch there are no packed batches, and a program that needs only a tokenizer should not load it: all
    patches wait for torch.

    Never blocks: another thread may hold the lock while it waits for this very import; the holder applies these
    patches before it releases the lock. Never raises: an exception in an import hook would fail the import itself.
    """
    _apply_loaded(module.__name__)


@contextmanager
def _locked() -> Iterator[None]:
    """Hold the lock; on leaving, apply what came up meanwhile."""
    try:
        with state.lock:
            yield
    finally:
        _apply_loaded()


def _apply_loaded(*names: str) -> None:
    """Apply the patches of these modules and of others loaded so far, unless another thread is at work, which will."""
    state.loaded.extend(names)
    lock = state.lock
    # A loop: a module may have found the lock taken a moment before it was released.
    while state.loaded and lock.acquire(blocking=False):
        try:
            while state.loaded:
                _apply_pending(state.loaded.popleft())
        finally:
            lock.release()


def _apply_pending(name: str = "") -> None:
    """Apply the pending patches of every loaded module: not every import hook is called.

    A third-party finder in front of wrapt's may load a module by itself, as comet_ml's does for torch, and those of
    typeguard and jaxtyping for the modules that their users name. Never raises; the caller holds the lock.

    Args:
        name: of a module whose import hook was just called: it is loaded to its end, though the import system is not
            done with it. Empty if only the state is asked for.
    """
    # While torch is being imported, modules of its own among them, no probe can run: its hook comes last.
    state.torch_is_loaded = state.torch_is_loaded or name == "torch" or is_complete("torch")
    if state.activated_by is None or not state.torch_is_loaded:
        return
    from hf_packfix.engine.patch import apply, revert
    from hf_packfix.patches import FIRST_USE

    try:
        due = [
            patch
            for patch in _requested_patches()
            if patch.module == name
            or (patch.pending and is_complete(patch.module))
            or (name == "torch" and not _is_half_imported(patch.module))
        ]
        # `enable()` has just applied some of them, and asks for the hooks of loaded modules as well.
        due = [patch for patch in due if patch.status(True).state != "applied"]
        if due:
            _apply_and_log(due)
        # What is not loaded when a Trainer is first used, it does not need; the hook of a later module waits again.
        if name == _FIRST_USE or not any(patch.pending for patch in _requested_patches()):
            revert(FIRST_USE)
        elif name:
            apply(patch for patch in FIRST_USE if patch.module == name or is_complete(patch.module))
    except Exception as error:
        logger.debug("could not patch %s", name or "what is pending", exc_info=True)
        # Once: an error of ours would come back in the hook of every module.
        if repr(error) not in state.failures:
            state.failures.add(repr(error))
            log_warning(f"hf_packfix could not patch {name or 'what is pending'}: {in_a_line(error)}")


def _apply_and_log(patches: Iterable[Patch]) -> None:
    """Apply patches, log what changed, and report what differs upstream."""
    from hf_packfix.engine.patch import apply

    before = {patch: patch.status(True) for patch in patches}
    apply(before)
    for patch, was in before.items():
        now = patch.status(True)
        if now != was:
            logger.debug("%s: %s%s", now.target, now.state, f" ({now.detail})" if now.detail else "")
            if deviation := patch.deviation(now):
                state.report(deviation)
    if not state.announced:
        _announce()


def _announce() -> None:
    """Log one line, once the Trainer is patched."""
    states = [patch.status(True).state for patch in _requested_patches()]
    if "transformers.trainer" not in sys.modules or "applied" not in states:
        return
    state.announced = True
    # For modules that upstream no longer has; the hooks of others are still to come.
    _apply_and_log([patch for patch in _requested_patches() if patch.module not in sys.modules])
    # The versions are read from files: only if the line is shown.
    if logger.isEnabledFor(logging.INFO) and is_main_process():
        found = {package: versions.found(package) for package in ("transformers", "accelerate", "torch")}
        logger.info(
            "hf_packfix %s activated by %s: %d patches applied, %d pending; transformers %s, accelerate %s, torch %s",
            __version__,
            state.activated_by,
            states.count("applied"),
            states.count("pending"),
            *found.values(),
        )
        tested = versions.NEWEST_TESTED.items()
        newer = [f"{package} {found[package]}" for package, newest in tested if versions.older(newest, found[package])]
        if newer:
            logger.info("newer than what hf_packfix was tested with, judged by probes: %s", ", ".join(newer))


def _is_half_imported(name: str) -> bool:
    """Return whether a module is being imported, so that its functions may not be there yet."""
    return name in sys.modules and not is_complete(name)


def _requested_patches() -> tuple[Patch, ...]:
    from hf_packfix.patches import FAST_RNN, PATCHES  # here, as above: a process with HF_PACKFIX=0 does not need them

    return PATCHES + FAST_RNN if state.fast_rnn else PATCHES


# --- messages --------------------------------------------------------------------------------------------


def _warn(message: str) -> None:
    """Warn once; log instead if warnings are errors (``-W error``), since a difference must not end a program."""
    try:
        warn_once(message)
    except HFPackfixWarning:
        log_warning(message)


def log_warning(message: str) -> None:
    """Log one line with our name: a program that sets up no logging shows the bare message on stderr.

    In a distributed run only the process of rank 0 logs.
    """
    if is_main_process():
        logger.warning("hf_packfix: %s", " ".join(message.removeprefix("hf_packfix ").split()))
