"""What is logged and warned of while patches are applied."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from hf_packfix._version import __version__
from hf_packfix._warnings import HFPackfixWarning, is_main_process, warn_once
from hf_packfix.activation import versions
from hf_packfix.activation.state import state

if TYPE_CHECKING:
    from hf_packfix.patches import Patch, PatchStatus

__all__ = ["announce", "difference", "log_change", "log_warning", "logger", "warn"]

logger = logging.getLogger("hf_packfix")


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


def log_change(patch: Patch, status: PatchStatus) -> None:
    """Log the new state of a patch, and report what differs upstream."""
    logger.debug("%s: %s%s", status.target, status.state, f" ({status.detail})" if status.detail else "")
    found = difference(patch, status)
    if found:
        state.report(found)


def warn(message: str) -> None:
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


def announce(applied: int, pending: int) -> None:
    """Log one line about the patched Trainer."""
    if not is_main_process():
        return
    if not logger.isEnabledFor(logging.INFO):  # the versions below are read from files
        return
    logger.info(
        "hf_packfix %s activated by %s: %d patches applied, %d pending; transformers %s, accelerate %s, torch %s",
        __version__,
        state.activated_by,
        applied,
        pending,
        *map(versions.found, ("transformers", "accelerate", "torch")),
    )
    newer = [f"{package} {version}" for package, version in versions.untested().items()]
    if newer:
        logger.info("newer than what hf_packfix was tested with, judged by probes: %s", ", ".join(newer))
