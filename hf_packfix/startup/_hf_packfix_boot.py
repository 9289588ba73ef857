"""Runs at the start of an interpreter that ``HF_PACKFIX`` asks to patch; imports nothing until transformers is.

The wheel lays this file at the top of site-packages, next to the start-up files that call :func:`start`. It
lives outside the package because importing ``hf_packfix`` activates it. The name of :func:`start` is frozen:
the start-up files of one version may meet this file of another.
"""

import os
import sys
from _thread import get_ident

# `typing` is not loaded at the start of an interpreter, and is not going to be because of us.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VARIABLE = "HF_PACKFIX"

# As in `hf_packfix.switch`.
ACCEPTED = {
    "on": ("1", "true", "yes", "on"),
    "force": ("force",),
    "off": ("0", "false", "no", "off"),
}

#: True while the package is imported on behalf of the variable, and not of the user's own code.
activating = False

_started = False


def meaning(value: str | None) -> str | None:
    """Return what a value asks for: "on", "force" or "off"; "" for unset or empty; None for anything else."""
    word = (value or "").strip().lower()
    if not word:
        return ""
    return next((asks for asks, words in ACCEPTED.items() if word in words), None)


def start() -> None:
    """Do what ``HF_PACKFIX`` asks for; harmless when called again, as virtual environments do. Never raises."""
    global _started
    try:
        # Isolated mode (-I, -E): the environment is not to be looked at. The `.start` file cannot say so.
        asks = "" if sys.flags.ignore_environment else meaning(os.environ.get(VARIABLE))
        if asks in ("", "off"):
            sys.modules.pop(__name__, None)
        elif not _started:
            _started = True
            if asks is None:
                accepted = ", ".join(word for words in ACCEPTED.values() for word in words)
                _say(f"{VARIABLE}={os.environ[VARIABLE]!r} is not one of: {accepted}; nothing is activated")
            elif "hf_packfix" not in sys.modules:
                sys.meta_path.insert(0, _WaitForTransformers())
    except Exception as error:
        _say(f"not activated: {type(error).__name__}: {error}")


class _WaitForTransformers:
    """A finder that has the package imported right before ``transformers`` runs, and then is gone.

    Looking for transformers, as ``importlib.util.find_spec`` does, is not importing it: hence the loader.
    """

    def __init__(self) -> None:
        self._searching: set[int] = set()  # threads that ask the other finders

    def find_spec(self, fullname: str, path: "Any" = None, target: "Any" = None) -> "Any":
        thread = get_ident()
        if fullname != "transformers" or thread in self._searching:
            return None
        self._searching.add(thread)
        try:
            for finder in list(sys.meta_path):
                find_spec = getattr(finder, "find_spec", None)
                spec = None if find_spec is None else find_spec(fullname, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader, self)
                    return spec
            return None
        finally:
            self._searching.discard(thread)


class _Loader:
    """The loader of ``transformers``, with the activation before its first line; leaves no trace of itself."""

    def __init__(self, loader: "Any", finder: _WaitForTransformers) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> "Any":
        if name == "_loader":  # while a copy is being made, there is nothing to delegate to yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: "Any") -> "Any":
        return self._loader.create_module(spec)

    def exec_module(self, module: "Any") -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
            _activate()
        self._loader.exec_module(module)


def _activate() -> None:
    global activating
    activating = True
    try:
        # By name: a folder that an uninstallation left behind can be imported, and does nothing.
        from hf_packfix import __version__  # noqa: F401
    # Whatever is wrong with us, the program that imports transformers must not notice.
    except (Exception, SystemExit) as error:
        _say(f"not activated: {type(error).__name__}: {error}")
    finally:
        activating = False


def _say(message: str) -> None:
    """Write one line to stderr, in one process of a distributed run."""
    if os.environ.get("RANK", "0") == "0" and sys.stderr is not None:
        line = "hf_packfix: " + " ".join(message.split()) + "\n"
        try:
            # Past the buffer: a line that cannot be written must not stay there. On Python 3.14 and newer, it would
            # change the exit status to 120 when Python flushes stderr at the end.
            raw = getattr(getattr(sys.stderr, "buffer", None), "raw", None)
            if raw is None:
                sys.stderr.write(line)
            else:
                sys.stderr.flush()
                raw.write(line.encode(sys.stderr.encoding, "backslashreplace"))
        except Exception:
            pass  # a closed stderr is no reason to stop a program
