"""``hf-packfix run``: a program as Python would run it, with the plugin on."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from types import TracebackType

from hf_packfix.activation import enable_for_run

__all__ = ["RunError", "run"]


class RunError(Exception):
    """A script or module that is not there, or a plugin that cannot be turned on."""


def run(target: str, arguments: Sequence[str], *, as_module: bool) -> int:
    """Activate and run a program as ``__main__``, and let child processes activate, too.

    Args:
        target: path of a script (or a folder or zip file with a ``__main__``), or a module's name.
        arguments: the program's arguments.
        as_module: whether ``target`` is a module's name.

    Returns:
        The exit status: 0, or 1 after an uncaught exception, whose traceback is that of the program alone.

    Raises:
        RunError: there is no such script or module, or the versions found are not supported.
        SystemExit: what the program raised.
        KeyboardInterrupt: what the program raised.
    """
    # Where Python would look first: beside the script, or in the working directory. In safe-path mode nowhere.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.getcwd() if as_module else os.path.dirname(os.path.abspath(target))
    if as_module and not _module_exists(target):
        raise RunError(f"run -m: there is no module named {target!r}")
    if not as_module and not os.path.exists(target):
        raise RunError(f"run: cannot open {target!r}: no such file; for a module, use: run -m {target}")
    try:
        enable_for_run()
    except ImportError as error:
        raise RunError(str(error)) from error

    sys.argv = [target, *arguments]
    try:
        if as_module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target, run_name="__main__")
    except Exception as error:
        error.__traceback__ = _of_program(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _of_program(traceback: TracebackType | None) -> TracebackType | None:
    """Drop the frames of this module and of runpy from the front of a traceback."""
    ours = {__file__, runpy.__file__, runpy.run_path.__code__.co_filename}
    while traceback is not None and traceback.tb_next is not None and traceback.tb_frame.f_code.co_filename in ours:
        traceback = traceback.tb_next
    return traceback
