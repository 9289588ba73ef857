"""``hf-packfix docs``: the pages of ``hf_packfix/docs``, installed with the package, and two made from the code."""

from __future__ import annotations

import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING, Any

from hf_packfix.commands import CommandError

if TYPE_CHECKING:
    from hf_packfix.engine.patch import Patch

_PATCHES = (
    "# Every patch\n\nMade from the declarations; `print(hf_packfix.status())` shows where each of them stands.\n\n"
)
TITLE = "API reference"
_API = f"""\
# {TITLE}

Shapes: B sequences, T steps in the longest one, N steps in all, D features, V token ids, C labels; `*` is any further
dimensions.
"""
#: The modules whose ``__all__`` is public, each with a sentence.
MODULES = {
    "hf_packfix": "Turning it on and off, the collator, and functions of one PackedSequence.",
    "hf_packfix.models": "Recurrent networks as transformers models; see `hf-packfix docs models`.",
    "hf_packfix.rnn": "Recurrent layers that train faster; see `hf-packfix docs performance`.",
}


def run(page: str | None) -> int:
    """Print a page as it is, in Markdown, or the list of pages.

    Args:
        page: the name of a file, with or without ``.md``; or "api", made from the docstrings, or "patches", made from
            their declarations; None for the list.

    Returns:
        The exit status: 0.

    Raises:
        CommandError: there is no such page.
    """
    pages = _pages()
    if page is None:
        width = max(map(len, pages))
        titles = [f"  {name:<{width}}  {text.splitlines()[0].removeprefix('# ')}" for name, text in pages.items()]
        _write("\n".join(["hf-packfix docs PAGE prints one of these pages:", "", *titles, ""]))
        return 0
    text = pages.get(page.removesuffix(".md"))
    if text is None:
        raise CommandError(f"argument PAGE: expected one of: {', '.join(pages)}; found {page!r}")
    made = {_API: reference, _PATCHES: every_patch}
    _write(made[text]() if text in made else text)
    return 0


def every_patch() -> str:
    """Return the table of the patches, as they are declared."""
    from hf_packfix.patches import FAST_RNN, FIRST_USE, PATCHES

    lines = ["| patched, in place | the original | with the patch |", "|---|---|---|", *map(_row, PATCHES)]
    lines += ["| *Until a Trainer is first used* | | |", *map(_row, FIRST_USE)]
    lines += ["| *Only on request, with `HF_PACKFIX_FAST_RNN=1`* | | |", *map(_row, FAST_RNN)]
    return _PATCHES + "\n".join(lines) + "\n"


def _row(patch: Patch) -> str:
    releases = f", before {patch.until}" if patch.until else f", from {patch.since}" if patch.since else ""
    problem = patch.problem.replace("silently", "**silently**")
    if patch.issue:
        *_, repository, _, number = patch.issue.split("/")
        problem += f" ([{repository} #{number}]({patch.issue}))"
    return f"| {patch.module}<br>`{patch.path}`{releases} | {problem} | {patch.fix} |"


def reference() -> str:
    """Return the public names with their signatures and docstrings; imports torch and transformers."""
    parts = [_API]
    for name, sentence in MODULES.items():
        module = importlib.import_module(name)
        parts.append(f"## {name}\n\n{sentence}\n")
        for public in sorted(set(module.__all__) - {"__version__"}, key=lambda word: (not word[0].islower(), word)):
            parts += _entries("###", f"{name}.{public}", getattr(module, public))
    return "\n".join(parts)


def _entries(heading: str, name: str, thing: Any) -> Iterator[str]:
    """Yield the entry of a function, a property or a class, and those of the methods that a class defines."""
    call = name.rpartition(".")[2]
    if not isinstance(thing, property):
        signature = inspect.signature(inspect.unwrap(thing.__init__ if inspect.isclass(thing) else thing))
        call += re.sub(r"\((self|cls)(, /)?(, )?", "(", str(signature))
        call = re.sub(r"""(?<=: |> )(['"])(.+?)\1(?= =|,|\)|$)""", r"\2", call).removesuffix(" -> None")  # annotations
    if len(call) > 100:  # a parameter a line
        call = re.sub(r", (?=[*\w]+(?:[:=,)]|$))", ",\n    ", call).replace("(", "(\n    ", 1)
    prose = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", inspect.cleandoc(thing.__doc__)).replace("``", "`")
    yield f"{heading} {name}\n\n```text\n{call}\n```\n\n{prose}\n"
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            function = getattr(value, "__func__", value)
            if not member.startswith("_") and function.__doc__ and isinstance(function, (property, type(_entries))):
                yield from _entries("####", f"{name}.{member}", function)


def _pages() -> dict[str, str]:
    """Return the text of every page by its name, in the order of the names."""
    # Not by `__file__`: the package may be in a zip file.
    files = {file.name: file for file in resources.files("hf_packfix").joinpath("docs").iterdir()}
    pages = {name[:-3]: file.read_text(encoding="utf-8") for name, file in files.items() if name.endswith(".md")}
    return dict(sorted({**pages, "api": _API, "patches": _PATCHES}.items()))


def _write(text: str) -> None:
    """Write to stdout, whatever its encoding, and even if its reader stops (``hf-packfix docs api | head``)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer goes nowhere; otherwise Python reports it when it flushes stdout at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
