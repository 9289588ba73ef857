"""Which versions are supported. A refusal is a value, so that the caller decides how loud to be."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

#: What the tests run on, oldest first: ``tests/tools/matrix.py`` installs these, ``docs/versions.md`` lists them, and
#: the gate below follows from them.
TESTED = (
    {"transformers": "4.46.3", "accelerate": "0.28.0"},
    {"transformers": "4.57.6", "accelerate": "1.12.0"},
    {"transformers": "5.0.0", "accelerate": "1.12.0"},
    {"transformers": "5.10.2", "accelerate": "1.14.0"},
    {"transformers": "5.23.0", "accelerate": "1.15.0"},
    {"transformers": "5.24.0", "accelerate": "1.15.0"},
)

#: The oldest version of each distribution that is supported: the minor release of the oldest tested one, as
#: ``pyproject.toml`` asks for.
MINIMUM = {package: version.rpartition(".")[0] for package, version in TESTED[0].items()}

#: What activating itself imports, as ``pyproject.toml`` asks for it.
NEEDED = {"importlib-metadata": "6.0", "packaging": "21.0", "wrapt": "1.16"}

#: The newest version of each distribution that the tests run on.
NEWEST_TESTED = TESTED[-1]


class UnsupportedVersionError(ImportError):
    """An installed version that the patches are not written for, or a missing package.

    Attributes:
        conflict: what was required and what was found.
    """

    def __init__(self, conflict: Conflict) -> None:
        super().__init__(str(conflict), name=conflict.package)
        self.conflict = conflict


@dataclass(frozen=True)
class Conflict:
    """A package that is missing or too old.

    Attributes:
        package: name of the distribution.
        required: the oldest supported version.
        found: the installed version; None if the package is not installed, or nothing shows its version.
    """

    package: str
    required: str
    found: str | None

    def __str__(self) -> str:
        cure = "upgrade it, or call hf_packfix.enable(force=True) (HF_PACKFIX=force) to patch what can be patched"
        found = f"found {self.package} {self.found}"
        if self.found is None:
            cure = f"install it with: pip install '{self.package}>={self.required}'"
            found = f"{self.package} is not installed, or its metadata is damaged"
        return f"hf_packfix needs {self.package} >= {self.required}, but {found}; {cure}"


def found(package: str) -> str | None:
    """Return the installed version of a distribution; None if there is none, or nothing shows its version.

    Imports no package: if the metadata are missing or broken, reads ``__version__`` from the loaded module or from its
    source. A program that PyInstaller made has the metadata that our hook adds.
    """
    # No such package, or importlib_metadata itself (both are ImportErrors); a file without a version, one that is not
    # UTF-8, one that cannot be read.
    with suppress(ImportError, KeyError, ValueError, OSError):
        # Imported here: a process that never activates should not pay for it.
        import importlib_metadata

        version: Any = importlib_metadata.version(package)
        if isinstance(version, str):
            return version
    module = _module(package)
    # Stand-ins, lazy modules in the middle of their import, finders and loaders of others may raise anything.
    with suppress(Exception):
        version = getattr(sys.modules.get(module), "__version__", None)
        if isinstance(version, str):
            return version
    with suppress(Exception):
        loader: Any = getattr(importlib.util.find_spec(module), "loader", None)
        match = re.search(r"""^__version__(?:: str)? = (["'])([^"']+)\1""", loader.get_source(module), re.MULTILINE)
        return match and match[2]
    return None


def conflict() -> Conflict | None:
    """Return the first package that is missing or older than its minimum; None if all is well."""
    for package, required in NEEDED.items():
        try:
            importlib.import_module(_module(package))
        except ImportError:
            return Conflict(package, required, None)
    for package, required in MINIMUM.items():
        version = found(package)
        if version is None or older(version, required):
            return Conflict(package, required, version)
    return None


def _module(package: str) -> str:
    return package.replace("-", "_")


def older(version: str | None, than: str | None) -> bool:
    """Return whether a version comes before another one; False if one of them is unknown."""
    from packaging.version import InvalidVersion, Version

    try:
        # Only release numbers: 4.46.0.dev0 has what 4.46 has, and a local build suffix means nothing.
        return Version(version or "").release < Version(than or "").release
    except InvalidVersion:
        return False
