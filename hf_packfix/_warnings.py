"""Warnings: a class of our own, and each cause once a process."""

from __future__ import annotations

import os
import sys
import warnings

_warned: set[str] = set()

#: Packages whose code runs between a line of the user's and a warning: ours, those that call our import hooks, and
#: those that we patch.
_BETWEEN = {"hf_packfix", "_hf_packfix_boot", "importlib", "wrapt", "transformers", "accelerate", "torch"}


class HFPackfixWarning(UserWarning):
    """Something about hf_packfix that a user should know; raised once a process for each cause."""


def warn_once(message: str, *, cause: str | None = None) -> None:
    """Warn with an :class:`HFPackfixWarning` that points at the user's own line.

    In a distributed run only the process of rank 0 warns.

    Args:
        message: of the warning.
        cause: a second warning with the same cause is not shown; the message by default.
    """
    cause = cause or message
    if cause not in _warned and is_main_process():
        _warned.add(cause)
        warnings.warn(message, HFPackfixWarning, stacklevel=_stacklevel())


def in_a_line(error: BaseException) -> str:
    """Return the kind and the message of an error, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def is_main_process() -> bool:
    """Return whether this process warns and logs: in a distributed run, that of rank 0 (``RANK``, set by torchrun)."""
    return os.environ.get("RANK", "0") == "0"


def _stacklevel() -> int:
    """Return the stack level of the first frame that is the user's own, seen from ``warn_once``."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        frame = frame.f_back
        file = frame.f_code.co_filename
        # `warnings.warn` leaves out these frames when it counts (`warnings._is_internal_frame`).
        level += not ("importlib" in file and "_bootstrap" in file)
    return level
