"""``hf-packfix docs api``: the public names with their signatures and docstrings, as Markdown."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

TITLE = "API reference"
HEAD = f"""\
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


def reference() -> str:
    """Return the page; imports torch and transformers."""
    parts = [HEAD]
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
