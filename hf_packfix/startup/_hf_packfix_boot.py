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

# As in `hf_packfix.activation.environment`.
ACCEPTED = {
    "on": ("1", "true", "yes", "on"),
    "force": ("force",),
    "off": ("0", "false", "no", "off"),
}

#: True while the package is imported on behalf of the variable, and not of the user's own code.
activating = False

_started = False


def parse(value: str | None) -> str | None:
    """Return what a value asks for: "on", "force" or "off"; "" for unset or empty; None for anything else."""
    word = (value or "").strip().lower()
    if not word:
        return ""
    return next((asks for asks, words in ACCEPTED.items() if word in words), None)


def start() -> None:
    """Do what ``HF_PACKFIX`` asks for; harmless when called again, as virtual environments do. Never raises."""
    global _started
    try:
        # Isolated mode (-I, -E): the environment must not be read. The `.start` file cannot check this.
        asks = "" if sys.flags.ignore_environment else parse(os.environ.get(VARIABLE))
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

    Looking for transformers, as ``importlib.util.find_spec`` does, is not importing it: hence the loader. A finder
    that was put in front of this one may load transformers by itself (the import hooks of typeguard and jaxtyping do):
    then the package is imported right before the next module that comes by here.
    """

    def __init__(self) -> None:
        self._searching: set[int] = set()  # threads that are in a call of the other finders

    def find_spec(self, fullname: str, path: "Any" = None, target: "Any" = None) -> "Any":
        thread = get_ident()
        if (fullname != "transformers" and "transformers" not in sys.modules) or thread in self._searching:
            return None
        self._searching.add(thread)
        try:
            for finder in list(sys.meta_path):
                find_spec = getattr(finder, "find_spec", None)
                spec = None if find_spec is None else find_spec(fullname, path, target)
                if spec is not None:
                    _Loader.around(spec, self)
                    return spec
            return None
        finally:
            self._searching.discard(thread)


class _Loader:
    """A loader with the activation before the module's first line; leaves no trace of itself.

    It has the methods of the loader that it wraps, and no others: the import system, and loaders that were put around
    this one, decide by them how to load (mlflow's calls ``load_module`` of whatever it finds).
    """

    def __init__(self, spec: "Any", finder: _WaitForTransformers) -> None:
        self._loader = spec.loader
        self._spec = spec
        self._finder = finder

    @classmethod
    def around(cls, spec: "Any", finder: _WaitForTransformers) -> None:
        """Put one in the place of a spec's loader, if there is a loader and it can be replaced."""
        # A folder without an `__init__.py` has no loader yet.
        if getattr(spec, "loader", None) is not None:
            try:  # noqa: SIM105 (contextlib is not loaded at the start of an interpreter)
                spec.loader = cls(spec, finder)
            except Exception:
                pass  # a spec of a kind of its own: the next module will do

    def __getattr__(self, name: str) -> "Any":
        if name in ("_loader", "_spec", "_finder"):  # while a copy is being made, there is nothing to delegate to yet
            raise AttributeError(name)
        value = getattr(self._loader, name)
        if name not in ("exec_module", "load_module"):
            return value

        def load(module: "Any") -> "Any":  # or its name, for `load_module`
            self._withdraw(module)
            self._activate_once()
            return value(module)

        return load

    def _withdraw(self, module: "Any") -> None:
        """Put the wrapped loader back, unless third-party code has put another one there."""
        for owner, name in ((self._spec, "loader"), (module, "__loader__")):
            if getattr(owner, name, None) is self:
                try:  # noqa: SIM105
                    setattr(owner, name, self._loader)
                except Exception:
                    pass  # a module of a kind of its own

    def _activate_once(self) -> None:
        global activating
        if self._finder not in sys.meta_path:
            return
        sys.meta_path.remove(self._finder)
        if "hf_packfix" in sys.modules:  # imported, or being imported, by the program itself
            return
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
