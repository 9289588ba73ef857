"""Warnings: a class of our own, and each cause once a process."""

from __future__ import annotations

import os
import sys
import warnings

__all__ = ["HFPackfixWarning", "is_main_process", "warn_once"]

_warned: set[str] = set()


class HFPackfixWarning(UserWarning):
    """Something about hf_packfix that a user should know; raised once a process for each cause."""


def warn_once(message: str, *, cause: str | None = None) -> None:
    """Warn with an :class:`HFPackfixWarning` that points at the first caller outside this package.

    Says nothing in a distributed run's other processes.

    Args:
        message: what to say.
        cause: what to say it once for; the message by default.
    """
    cause = cause or message
    if cause not in _warned and is_main_process():
        _warned.add(cause)
        warnings.warn(message, HFPackfixWarning, stacklevel=_stacklevel())


def is_main_process() -> bool:
    """Tell whether to speak at all: in a distributed run, the process of rank 0 does (``RANK``, as torchrun sets)."""
    return os.environ.get("RANK", "0") == "0"


def _stacklevel() -> int:
    """Return the stack level of the first frame outside this package, seen from ``warn_once``."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("hf_packfix", "importlib")):
        level, frame = level + 1, frame.f_back
    return level
