"""Applying the patches of upstream modules as these are imported."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from hf_packfix._warnings import in_a_line
from hf_packfix.activation.messages import announce, log_change, log_warning, logger
from hf_packfix.activation.state import state

if TYPE_CHECKING:
    from hf_packfix.patches import Patch

__all__ = [
    "all_patches",
    "apply_and_log",
    "apply_pending",
    "fast_rnn_patches",
    "first_uses",
    "is_complete",
    "is_half_imported",
    "locked",
    "on_module_imported",
    "requested_patches",
    "revert",
    "wait_for",
]


def on_module_imported(module: ModuleType) -> None:
    """Apply the patches of an upstream module that has just been imported (wrapt's import hook).

    Without torch there are no packed batches, and a program that needs only a tokenizer should not load it: all
    patches wait for torch.

    Never blocks: another thread may hold the lock while it waits for this very import; the holder applies these
    patches before it releases the lock. Never raises: an exception in an import hook would fail the import itself.
    """
    state.loaded.append(module.__name__)
    _catch_up()


def _on_first_use() -> None:
    """Apply the patches of modules whose import hook was never called; never blocks or raises, as above."""
    state.loaded.append("")
    _catch_up()


@contextmanager
def locked() -> Iterator[None]:
    """Hold the lock; on leaving, apply what came up meanwhile."""
    try:
        with state.lock:
            yield
    finally:
        _catch_up()


def _catch_up() -> None:
    """Apply the patches of the modules loaded so far, unless another thread is at work, which will."""
    lock = state.lock
    # A loop: a module may have found the lock taken a moment before it was released.
    while state.loaded and lock.acquire(blocking=False):
        try:
            while state.loaded:
                apply_pending(state.loaded.popleft())
        finally:
            lock.release()


def apply_pending(name: str = "") -> None:
    """Apply the pending patches of every loaded module: not every import hook is called.

    A third-party finder in front of wrapt's may load a module by itself, as comet_ml's does for torch, and those of
    typeguard and jaxtyping for the modules that their users name. Never raises; the caller holds the lock.

    Args:
        name: of a module whose import hook was just called: it is loaded to its end, though the import system is not
            done with it.
    """
    # While torch is being imported, modules of its own among them, no probe can run: its hook comes last.
    state.torch_is_loaded = state.torch_is_loaded or name == "torch" or is_complete("torch")
    if state.activated_by is None or not state.torch_is_loaded:
        return
    try:
        due = [
            patch
            for patch in requested_patches()
            if patch.module == name
            or (patch.pending and is_complete(patch.module))
            or (name == "torch" and not is_half_imported(patch.module))
        ]
        # `enable()` has just applied some of them, and asks for the hooks of loaded modules as well.
        due = [patch for patch in due if patch.status(True).state != "applied"]
        if due:
            apply_and_log(due)
        if any(patch.pending for patch in requested_patches()):
            _apply([patch for patch in first_uses() if patch.module == name or is_complete(patch.module)])
        else:
            revert(first_uses())
    except Exception as error:
        logger.debug("could not patch %s", name or "what is pending", exc_info=True)
        # Once: an error of ours would come back in the hook of every module.
        if repr(error) not in state.failures:
            state.failures.add(repr(error))
            log_warning(f"hf_packfix could not patch {name or 'what is pending'}: {in_a_line(error)}")


def apply_and_log(patches: Iterable[Patch]) -> None:
    """Apply patches, log what changed, and report what differs upstream."""
    before = {patch: patch.status(True) for patch in patches}
    _apply(before)
    for patch, was in before.items():
        after = patch.status(True)
        if after != was:
            log_change(patch, after)
    if not state.announced:
        _announce()


def _announce() -> None:
    """Log one line, once the Trainer is patched."""
    states = [patch.status(True).state for patch in requested_patches()]
    if "transformers.trainer" not in sys.modules or "applied" not in states:
        return
    state.announced = True
    # For modules that upstream no longer has; the hooks of others are still to come.
    apply_and_log([patch for patch in requested_patches() if patch.module not in sys.modules])
    announce(states.count("applied"), states.count("pending"))


def is_complete(name: str) -> bool:
    """Return whether a module is loaded to its last line."""
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


def is_half_imported(name: str) -> bool:
    """Return whether a module is being imported, so that its functions may not be there yet."""
    return name in sys.modules and not is_complete(name)


def wait_for(names: Iterable[str]) -> None:
    """Wait for the modules that other threads are importing: wrapt calls no hook at the end of these."""
    for name in names:
        if is_half_imported(name):
            with suppress(Exception):  # the thread that began the import handles it
                import_module(name)


# The patches are imported on first use: a process with HF_PACKFIX=0 does not need them.


def _apply(patches: Iterable[Patch]) -> None:
    from hf_packfix.patches import apply

    apply(patches)


def revert(patches: Iterable[Patch]) -> None:
    """Revert patches."""
    from hf_packfix.patches import revert

    revert(patches)


def requested_patches() -> tuple[Patch, ...]:
    """Return the patches that are asked for."""
    from hf_packfix.patches import PATCHES

    return PATCHES + fast_rnn_patches() if state.fast_rnn else PATCHES


def fast_rnn_patches() -> tuple[Patch, ...]:
    """Return the patches of torch's recurrent layers."""
    from hf_packfix.patches import FAST_RNN

    return FAST_RNN


def all_patches() -> tuple[Patch, ...]:
    """Return the patches that ``status()`` lists."""
    from hf_packfix.patches import FAST_RNN, PATCHES

    return PATCHES + FAST_RNN


def first_uses() -> tuple[Patch, ...]:
    """Return the patches that are on while another one is pending."""
    from hf_packfix.patches import FIRST_USE, first_use

    first_use.before = _on_first_use
    return FIRST_USE
