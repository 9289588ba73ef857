"""``hf-packfix run``: a program as Python would run it, with the plugin on."""

from __future__ import annotations

import importlib.util
import io
import linecache
import marshal
import os
import pkgutil
import runpy
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib.machinery import BuiltinImporter, ModuleSpec, SourceFileLoader, SourcelessFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any

from hf_packfix.activation.control import enable_for_run

__all__ = ["RunError", "run"]

Namespace = dict[str, Any]


class RunError(Exception):
    """A program that cannot be found or opened, or a plugin that cannot be turned on."""


def run(target: str, arguments: Sequence[str], *, option: str = "") -> None:
    """Activate and run a program as ``__main__``, and let child processes activate, too.

    The program stays ``__main__`` until the interpreter ends, for its threads and ``atexit`` functions. What it raises
    is raised here, and Python sets the exit status; the traceback that is shown is that of the program alone.

    Args:
        target: path of a script, or of a folder or zip file with a ``__main__``; "-" for standard input; after an
            option, a module's name or code.
        arguments: the program's arguments.
        option: "-m" if ``target`` is a module's name, "-c" if it is code, empty otherwise.

    Raises:
        RunError: there is no such program, or the versions found are not supported.
        BaseException: what the program raised.
    """
    load: Callable[[str, Namespace], CodeType | None]
    if option == "-m":
        load, folder, argument = _module, os.getcwd(), option
    elif option == "-c":
        load, folder, argument = _code, "", option
    elif target == "-":
        load, folder, argument = _standard_input, "", target
    elif pkgutil.get_importer(target) is not None:  # a folder or a zip file
        load, folder, argument = _folder, os.path.abspath(target), target
    else:
        load, folder, argument = _script, _folder_of(target), target
    _replace_first_path(folder, even_if_safe=load is _folder)
    try:
        enable_for_run()
    except ImportError as error:
        raise RunError(str(error)) from error

    sys.argv = [argument, *arguments]
    namespace = _new_main()
    try:
        program = load(target, namespace)
        if program is not None:
            exec(program, namespace)
    except (RunError, SystemExit):
        raise
    except BaseException as error:
        _show_the_program_alone(error)
        raise


def _replace_first_path(folder: str, *, even_if_safe: bool) -> None:
    """Put what Python puts first for the program in the place of what it put there for this command."""
    # In safe-path mode (-P, -I) Python puts nothing there, unless the program is a folder or a zip file itself.
    safe = sys.flags.isolated or getattr(sys.flags, "safe_path", False)
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    in_zip = spec is not None and spec.name == "__main__"
    # A zip application may hold what hf_packfix needs.
    if not safe and not in_zip:
        del sys.path[0]
    if not safe or even_if_safe:
        sys.path.insert(0, folder)


def _folder_of(script: str) -> str:
    """Return the folder of a script, past links; of `/dev/fd/63` and its like, which link to no file, `/dev/fd`."""
    real = os.path.realpath(script)
    return os.path.dirname(real if os.path.exists(real) else os.path.abspath(script))


def _new_main() -> Namespace:
    """Put a new module in the place of ``__main__`` and return its namespace, which has what Python gives it."""
    # Up to 3.13; this command's own module has it if this Python gives it.
    given: Namespace = {"__annotations__": {}} if "__annotations__" in vars(sys.modules["__main__"]) else {}
    main = sys.modules["__main__"] = ModuleType("__main__")
    namespace = vars(main)
    namespace.update(given, __builtins__=sys.modules["builtins"], __loader__=BuiltinImporter)
    return namespace


def _script(path: str, namespace: Namespace) -> CodeType:
    absolute = os.path.abspath(path)
    try:
        # Once: a pipe (`<(...)`, `/dev/stdin`) cannot be read again.
        with io.open_code(absolute) as file:
            content = file.read()
    except OSError as error:
        is_module_name = all(map(str.isidentifier, path.split("."))) and not path.endswith(".py")
        hint = f"; for a module, use: hf-packfix run -m {path}" if is_module_name else ""
        raise RunError(f"cannot open {path!r}: {error.strerror}{hint}") from error
    compiled = content.startswith(importlib.util.MAGIC_NUMBER)
    loader = (SourcelessFileLoader if compiled else SourceFileLoader)("__main__", absolute)
    namespace.update(__file__=absolute, __loader__=loader, __cached__=None)
    if path.endswith(".pyc") and not compiled:
        raise RuntimeError("Bad magic number in .pyc file")  # as Python says it
    if not compiled:
        return _compile(content, absolute)
    program: CodeType = marshal.loads(content[16:])  # behind the header
    return program


def _standard_input(_: str, namespace: Namespace) -> CodeType | None:
    if sys.stdin is not None and sys.stdin.isatty():
        import code  # here: a file of the user's may have this name

        getattr(sys, "__interactivehook__", lambda: None)()  # completion, and the history of the session
        code.interact(local=namespace, exitmsg="")
        return None
    namespace.update(__file__="<stdin>", __cached__=None)
    return _compile(b"" if sys.stdin is None else sys.stdin.buffer.read(), "<stdin>")


def _code(text: str, _: Namespace) -> CodeType:
    if sys.version_info >= (3, 14):
        text = textwrap.dedent(text)
    if sys.version_info >= (3, 13):  # whose tracebacks show its lines
        linecache.cache["<string>"] = len(text), None, text.splitlines(keepends=True), "<string>"
    return _compile(text, "<string>")


def _module(name: str, namespace: Namespace) -> CodeType:
    # Private, but what the standard library's own pdb and trace use for `-m`.
    _, spec, program = runpy._get_module_details(name, RunError)  # type: ignore[attr-defined]
    sys.argv[0] = spec.origin
    return _of_spec(spec, program, namespace)


def _folder(_: str, namespace: Namespace) -> CodeType:
    # Looks on `sys.path`, where the folder is the first.
    _, spec, program = runpy._get_main_module_details(RunError)  # type: ignore[attr-defined]
    return _of_spec(spec, program, namespace)


def _of_spec(spec: ModuleSpec, program: CodeType, namespace: Namespace) -> CodeType:
    namespace.update(
        __file__=spec.origin,
        __cached__=spec.cached,
        __loader__=spec.loader,
        __package__=spec.parent,
        __spec__=spec,
    )
    return program


def _compile(source: str | bytes, name: str) -> CodeType:
    # Not with the `from __future__` of this file.
    program: CodeType = compile(source, name, "exec", dont_inherit=True)
    return program


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
