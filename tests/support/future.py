"""Releases of transformers and accelerate that do not exist yet: the installed one with some of its source changed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Edit:
    """A change of a source file, given relative to the package, as :func:`re.sub` makes it; no match is an error."""

    file: str
    pattern: str
    replacement: str


def release(directory: Path, package: str, edits: Iterable[Edit], number: str = "99.0.0") -> Path:
    """Write a changed copy of an installed package into a directory for ``PYTHONPATH``, and return the directory.

    Files that do not change are links.

    Raises:
        ValueError: a file has nothing that an edit could change.
    """
    source = Path(import_module(package).__file__ or "").parent
    current = re.escape(version(package))
    changed = [*edits, Edit("__init__.py", rf'(?m)^__version__ = "{current}"', f'__version__ = "{number}"')]
    files = {edit.file: (source / edit.file).read_text(encoding="utf-8") for edit in changed}
    for edit in changed:
        files[edit.file], count = re.subn(edit.pattern, edit.replacement, files[edit.file])
        if count == 0:
            raise ValueError(f"{package}/{edit.file} has nothing like {edit.pattern!r}: change the edit")
    _link(source, directory / package, {Path(file) for file in files})
    for file, text in files.items():
        (directory / package / file).write_text(text, encoding="utf-8")
    metadata = directory / f"{package}-{number}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n", encoding="utf-8")
    return directory


def _link(source: Path, target: Path, without: set[Path]) -> None:
    """Link what is in a folder, apart from these files, given relative to it."""
    target.mkdir(parents=True)
    for entry in source.iterdir():
        name = Path(entry.name)
        inside = {path.relative_to(name) for path in without if path.parts[0] == entry.name}
        if entry.name == "__pycache__" or Path() in inside:
            continue
        if inside:
            _link(entry, target / name, inside)
        else:
            (target / name).symlink_to(entry)
