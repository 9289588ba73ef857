"""What turns the patches on and off, and returns where they stand."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from hf_packfix._warnings import warn_once
from hf_packfix.activation import environment, versions
from hf_packfix.activation.applying import (
    all_patches,
    apply_and_log,
    apply_pending,
    fast_rnn_patches,
    first_uses,
    is_complete,
    is_half_imported,
    locked,
    requested_patches,
    revert,
    wait_for,
)
from hf_packfix.activation.environment import FAST_RNN_VARIABLE, VARIABLE
from hf_packfix.activation.messages import log_warning, warn
from hf_packfix.activation.state import state
from hf_packfix.activation.status_report import Status

if TYPE_CHECKING:
    from hf_packfix.patches import Patch, PatchStatus

__all__ = ["activate_on_import", "disable", "enable", "enable_for_run", "is_enabled", "status"]


def enable(*, force: bool = False, fast_rnn: bool | None = None) -> None:
    """Patch transformers, accelerate and torch for packed batches, now or as soon as they are imported.

    Calling it again wraps nothing twice; it applies again what third-party code has removed since.

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
    """Restore the original objects.

    If third-party code has wrapped one of our wrappers, theirs stays in place, and ours calls the original.
    """
    with locked():
        state.activated_by, state.fast_rnn = None, False
        state.why_inactive = "hf_packfix.disable() was called"
        revert([*first_uses(), *reversed(all_patches())])


def is_enabled() -> bool:
    """Return whether the patches act, or will as soon as what they patch is imported.

    Read from the patched objects, not from memory alone: False if third-party code has put an original back.
    """
    with locked():
        apply_pending()
        return state.activated_by is not None and not any(patch.overwritten() for patch in requested_patches())


def status() -> Status:
    """Return where hf_packfix stands; imports neither torch nor transformers."""
    with locked():
        activated_by = state.activated_by
        enabled = is_enabled()
        requested = set(requested_patches())
        patches = tuple(
            _with_cause(patch.status(activated_by is not None), patch.module)
            if patch in requested
            else _not_requested(patch)
            for patch in all_patches()
        )
    if activated_by is None:
        reason = state.why_inactive
    elif enabled:
        reason = f"activated by {activated_by}"
    else:
        reason = f"activated by {activated_by}, but a patch was overwritten since"
    names = ("hf-packfix", "transformers", "accelerate", "torch", "wrapt")
    return Status(enabled, reason, activated_by, {name: versions.found(name) for name in names}, patches)


def _with_cause(status: PatchStatus, module: str) -> PatchStatus:
    """Return the status with what a patch waits for though its module is there."""
    if status.state != "pending" or module not in sys.modules:
        return status
    return replace(status, detail="torch is not loaded" if is_complete(module) else "the module is being imported")


def _not_requested(patch: Patch) -> PatchStatus:
    how = f"hf_packfix.enable(fast_rnn=True) or {FAST_RNN_VARIABLE}=1 turns it on"
    return replace(patch.status(False), detail=how)


def activate_on_import() -> None:
    """Activate because the package was imported; called once, by ``hf_packfix/__init__.py``.

    A user's own import raises if the versions are refused. An import on behalf of ``HF_PACKFIX`` logs the refusal and
    lets the program run on, and the commands report it in their own words.

    Raises:
        UnsupportedVersionError: transformers or accelerate is missing or too old.
    """
    asks, value = environment.switch(), environment.value()
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
    force = environment.switch() == "force"
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
    if environment.switch() == "off" and not force:
        warn_once(f"{VARIABLE}={environment.value()} keeps hf_packfix off; unset it, or call enable(force=True)")
        return
    conflict = versions.conflict()
    if conflict is not None and not force:
        raise versions.UnsupportedVersionError(conflict)
    state.report = report or warn
    # Before anything is changed: without it nothing can be.
    import wrapt

    with locked():
        if fast_rnn is None:
            fast_rnn = state.fast_rnn if state.activated_by is not None else _environment_asks_for_fast_rnn()
        state.fast_rnn = fast_rnn
        if not fast_rnn:
            revert(reversed(fast_rnn_patches()))
        modules = sorted({"torch", *(patch.module for patch in requested_patches())} - state.hooked)
    wait_for(modules)
    with locked():
        state.activated_by = state.activated_by or activated_by
        if "torch" in sys.modules:
            apply_and_log([patch for patch in requested_patches() if not is_half_imported(patch.module)])
            apply_pending()
        state.hooked.update(modules)
    # Outside the lock, since wrapt takes its own and calls back for a module imported meanwhile.
    for name in modules:
        wrapt.register_post_import_hook("hf_packfix.activation.applying:on_module_imported", name)


def _environment_asks_for_fast_rnn() -> bool:
    asks = environment.fast_rnn()
    if asks is None:
        state.report(f"{environment.misunderstood(FAST_RNN_VARIABLE)}; torch's own layers run")
    return bool(asks)
