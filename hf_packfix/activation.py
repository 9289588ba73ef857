"""Turning the patches on and off, and saying where they stand."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

from hf_packfix import versions
from hf_packfix.notices import warn_once
from hf_packfix.startup._hf_packfix_boot import meaning

if TYPE_CHECKING:
    from hf_packfix.patches import Patch, PatchStatus

__all__ = ["Status", "activate_on_import", "disable", "enable", "is_enabled", "status"]

logger = logging.getLogger("hf_packfix")

# Reentrant: putting on a patch imports torch, whose import may fire another of our import hooks.
_lock = threading.RLock()
_activated_by: str | None = None
_why_inactive = "hf_packfix.enable() was not called"
_hooked: set[str] = set()


@dataclass(frozen=True)
class Status:
    """Where hf_packfix stands in this process; ``str()`` of it is made to be read.

    Attributes:
        enabled: whether the patches act, or will as soon as what they patch is imported.
        reason: why it is enabled or not.
        activated_by: what turned it on, such as ``import hf_packfix``; None while it is off.
        versions: the installed version of each distribution that matters; None where it is missing.
        patches: every patch with its target, its reason and its state.
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


def enable(*, force: bool = False) -> None:
    """Wrap what stands in the way of packed batches, now or as soon as it is imported.

    Calling it again wraps nothing twice; it puts back what somebody removed since.

    Args:
        force: go on past a version refusal, and past ``HF_PACKFIX=0``.

    Raises:
        UnsupportedVersionError: transformers or accelerate is missing or too old.
    """
    _enable("hf_packfix.enable()", force=force)


def disable() -> None:
    """Put the originals back, the very same objects.

    Where somebody wrapped one of our wrappers in turn, theirs stays in place and ours hands over to the
    original.
    """
    global _activated_by, _why_inactive
    with _lock:
        _activated_by, _why_inactive = None, "hf_packfix.disable() was called"
        for patch in reversed(_patches()):
            patch.take_off()


def is_enabled() -> bool:
    """Tell whether the patches act, or will as soon as what they patch is imported.

    Read from the patched objects, not from memory alone: False where somebody has put an original back.
    """
    with _lock:
        return _activated_by is not None and not any(patch.overwritten() for patch in _patches())


def status() -> Status:
    """Return where hf_packfix stands; imports neither torch nor transformers."""
    with _lock:
        activated_by = _activated_by
        enabled = is_enabled()
        patches = tuple(patch.status(activated_by is not None) for patch in _patches())
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

    Raises:
        UnsupportedVersionError: transformers or accelerate is missing or too old.
    """
    global _why_inactive
    switch = meaning(os.environ.get("HF_PACKFIX"))
    if switch == "off":
        _why_inactive = f"HF_PACKFIX={os.environ['HF_PACKFIX']} keeps it off"
        return
    _enable("import hf_packfix", force=switch == "force")


def module_loaded(module: ModuleType) -> None:
    """Put on the patches of an upstream module that has just been imported (``wrapt``'s import hook).

    Never raises: an exception in an import hook would fail the import of the module itself.
    """
    try:
        with _lock:
            if _activated_by is not None:
                _put_on(patch for patch in _patches() if patch.module == module.__name__)
    except Exception:
        logger.warning("could not patch %s", module.__name__, exc_info=True)


def _enable(activated_by: str, *, force: bool) -> None:
    global _activated_by
    switch = os.environ.get("HF_PACKFIX")
    if meaning(switch) == "off" and not force:
        warn_once(f"HF_PACKFIX={switch} keeps hf_packfix off; unset it, or call hf_packfix.enable(force=True)")
        return
    conflict = versions.conflict()
    if conflict is not None and not force:
        raise versions.UnsupportedVersionError(conflict)
    for package, version in versions.untested().items():
        warn_once(
            f"{package} {version} is newer than {versions.NEWEST_TESTED[package]}, the newest that hf_packfix "
            f"was tested with; patches are applied where their probes pass, see hf_packfix.status()"
        )
    with _lock:
        _activated_by = _activated_by or activated_by
        _put_on(_patches())
        modules = {patch.module for patch in _patches()} - _hooked
        _hooked.update(modules)
    # Outside the lock, since wrapt takes its own and calls back for a module imported meanwhile.
    import wrapt

    for name in sorted(modules):
        wrapt.register_post_import_hook("hf_packfix.activation:module_loaded", name)


def _put_on(patches: Iterable[Patch]) -> None:
    for patch in patches:
        patch.put_on()
        logger.debug("%s", patch.status(True))


def _patches() -> tuple[Patch, ...]:
    # Imported on first use: a process kept inactive by HF_PACKFIX=0 has no need of them.
    from hf_packfix.patches import PATCHES

    return PATCHES
