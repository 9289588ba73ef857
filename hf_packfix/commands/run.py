"""``hf-packfix run``: a program as Python would run it, with the plugin on."""

from __future__ import annotations

import atexit
import io
import linecache
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib.machinery import BuiltinImporter, PathFinder, SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any

from hf_packfix.activation.control import enable_for_run, status
from hf_packfix.commands import CommandError


def run(target: str, arguments: Sequence[str], *, option: str = "", show_status: bool = False) -> None:
    """Activate and run a program as ``__main__``, and let child processes activate as well.

    The program stays ``__main__`` until the interpreter ends, for its threads and ``atexit`` functions. What it raises
    is raised here, and Python sets the exit status; the traceback that is shown is only that of the program.

    Args:
        target: path of a script, or of a folder or zip file with a ``__main__``; "-" for standard input; after an
            option, a module's name or code.
        arguments: the program's arguments.
        option: "-m" if ``target`` is a module's name, "-c" if it is code, empty otherwise.
        show_status: print ``hf_packfix.status()`` to stderr when the program has ended.

    Raises:
        CommandError: there is no such program, or the versions found are not supported.
        BaseException: what the program raised.
    """
    is_folder = not option and target != "-" and pkgutil.get_importer(target) is not None  # or a zip file
    if option == "-m" or is_folder:
        folder = os.path.abspath(target if is_folder else "")
    else:
        folder = "" if option or target == "-" else os.path.dirname(os.path.realpath(target))
    replace_first_path(folder, even_if_safe=is_folder)
    try:
        enable_for_run()
    except ImportError as error:
        raise CommandError(str(error)) from error
    sys.argv = [option or target, *arguments]
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__.update(__builtins__=sys.modules["builtins"], __loader__=BuiltinImporter)
    try:
        if option == "-m" or is_folder:
            program = _module("" if is_folder else target, main)
        elif option == "-c":
            code = textwrap.dedent(target)  # as Python does from 3.14 on; from 3.13 on it shows the lines of errors
            if sys.version_info >= (3, 13):
                linecache.cache["<string>"] = len(code), None, code.splitlines(keepends=True), "<string>"
            program = compile(code, "<string>", "exec", dont_inherit=True)  # without this file's `__future__`
        elif target == "-":
            main.__dict__.update(__file__="<stdin>", __cached__=None)
            program = compile(sys.stdin.buffer.read() if sys.stdin else "", "<stdin>", "exec", dont_inherit=True)
        else:
            program = _script(target, main)
        if show_status:  # registered before what the program registers, so that it runs after that
            atexit.register(lambda: print(f"\n{status()}", file=sys.stderr))
        exec(program, vars(main))
    except (CommandError, SystemExit):
        raise
    except BaseException as error:
        _show_the_program_alone(error)
        raise


def replace_first_path(folder: str, *, even_if_safe: bool = False) -> None:
    """Put what Python puts first on the path for a program in the place of what it put there for this command."""
    # In safe-path mode (-P, -I) Python puts nothing there, unless the program is a folder or a zip file itself.
    safe = sys.flags.isolated or getattr(sys.flags, "safe_path", False)
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    in_zip = spec is not None and spec.name == "__main__"
    # A zip application may hold what hf_packfix needs.
    if not safe and not in_zip:
        del sys.path[0]
    if not safe or even_if_safe:
        sys.path.insert(0, folder)


def _module(name: str, main: ModuleType) -> CodeType:
    """Return the code of a module, or without a name of the ``__main__`` that is first on the path."""
    # Private, but what the standard library's own pdb and trace use for `-m`.
    details: Any = runpy._get_module_details if name else runpy._get_main_module_details  # type: ignore[attr-defined]
    _, spec, program = details(*[name] if name else [], CommandError)
    if name:
        sys.argv[0] = spec.origin
    main.__dict__.update(
        __file__=spec.origin, __cached__=spec.cached, __loader__=spec.loader, __package__=spec.parent, __spec__=spec
    )
    return program  # type: ignore[no-any-return]


def _script(path: str, main: ModuleType) -> CodeType:
    absolute = os.path.abspath(path)
    try:
        with io.open_code(absolute) as file:  # once: a pipe (`<(...)`, `/dev/stdin`) cannot be read again
            content = file.read()
    except OSError as error:
        raise CommandError(f"cannot open {path!r}: {error.strerror}{_hint(path)}") from error
    main.__dict__.update(__file__=absolute, __loader__=SourceFileLoader("__main__", absolute), __cached__=None)
    byte_code: CodeType | None = pkgutil.read_code(io.BytesIO(content))
    return byte_code or compile(content, absolute, "exec", dont_inherit=True)


def _hint(path: str) -> str:
    """Return what may be meant by the path of a script that cannot be opened."""
    if len(sys.argv) > 1 and re.fullmatch(r"python[\d.]*", os.path.basename(path)):
        return f"; did you mean: hf-packfix run {shlex.join(sys.argv[1:])}"
    if shutil.which(path):
        return f"; for a command that is no Python file, use: HF_PACKFIX=1 {shlex.join([path, *sys.argv[1:]])}"
    package, dot, _ = path.partition(".")
    spec = PathFinder.find_spec(package)
    if spec and (not dot or spec.submodule_search_locations):
        return f"; for a module, use: hf-packfix run -m {path}"
    return ""


def _show_the_program_alone(error: BaseException) -> None:
    """Have the traceback of an error shown without the frames of this command and of runpy in front."""
    ours = {run.__code__.co_filename, runpy.run_path.__code__.co_filename}
    program = error.__traceback__
    while program is not None and program.tb_frame.f_code.co_filename in ours:
        program = program.tb_next
    hook = sys.excepthook

    # Python calls it when the error has left this command, so that the error has all frames again.
    def show(kind: type[BaseException], shown: BaseException, traceback: TracebackType | None) -> Any:
        sys.excepthook = hook
        if shown is error:
            traceback = shown.__traceback__ = sys.last_traceback = program
        return hook(kind, shown, traceback)

    sys.excepthook = show
