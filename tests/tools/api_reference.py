"""Write ``hf_packfix/docs/api.md`` from the docstrings: ``python -m tests.tools.api_reference``."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["PAGE", "reference"]

PAGE = Path(__file__).parents[2] / "hf_packfix/docs/api.md"
#: The modules whose ``__all__`` is public, each with a sentence.
MODULES = {
    "hf_packfix": "Turning it on and off, the collator, and functions of one PackedSequence.",
    "hf_packfix.models": "Recurrent networks as transformers models; see [recurrent models](models.md).",
    "hf_packfix.rnn": "Recurrent layers that train faster on a CPU; see [performance](performance.md).",
}
_WIDTH = 100
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example):\n((?:(?: {4}.*)?\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^(\*{0,2}[\w., ]+): (.*(?:\n(?: {4}.*)?)*)", re.MULTILINE)


def reference() -> str:
    """Return the page."""
    lines = [
        "# API reference",
        "",
        "Made from the docstrings by `python -m tests.tools.api_reference`.",
        "",
        "Shapes: B sequences, T steps in the longest one, N steps in all, D features, V token ids, C labels; `*` is "
        "any further dimensions.",
    ]
    for name, sentence in MODULES.items():
        module = importlib.import_module(name)
        lines += ["", f"## {name}", "", sentence]
        for public in sorted(module.__all__, key=lambda public: (not public[0].islower(), public)):
            if public != "__version__":
                lines += _entry(f"{name}.{public}", getattr(module, public))
    return "\n".join(lines) + "\n"


def _entry(name: str, thing: Any) -> Iterator[str]:
    yield from ("", f"### {name}", "", "```text", _signature(name.rpartition(".")[2], thing), "```", "", _prose(thing))
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if member.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
                continue
            title = member if isinstance(value, property) else f"{member}()"
            yield from ("", f"#### {thing.__name__}.{title}", "")
            if not isinstance(value, property):
                yield from ("```text", _signature(member, function), "```", "")
            yield _prose(function)


def _signature(name: str, thing: Callable[..., Any]) -> str:
    """Return the call, in one line if it fits."""
    function = thing.__init__ if inspect.isclass(thing) else thing
    parts: list[str] = []
    for parameter in inspect.signature(inspect.unwrap(function)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        if parameter.name not in ("self", "cls"):
            parts.append(_parameter(parameter))
    line = f"{name}({', '.join(parts)})"
    return line if len(line) <= _WIDTH else "\n".join([f"{name}(", *(f"    {part}," for part in parts), ")"])


def _parameter(parameter: inspect.Parameter) -> str:
    # By hand: `str(parameter)` differs from one Python to the next.
    text = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + parameter.name
    typed = isinstance(parameter.annotation, str)
    if typed:
        text += f": {parameter.annotation}"
    if parameter.default is not parameter.empty:
        default = repr(parameter.default).replace("'", '"')
        text += f"{' = ' if typed else '='}{'...' if default.startswith('<') else default}"
    return text


def _prose(thing: Any) -> str:
    """Return a docstring as Markdown."""
    text = inspect.cleandoc(thing.__doc__) + "\n"
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    return _SECTION.sub(_section, text).strip()


def _section(found: re.Match[str]) -> str:
    title, body = found[1], textwrap.dedent(found[2])
    if title == "Example":
        words, _, code = body.partition(">>>")
        return f"**Example**\n\n{words.strip()}\n\n```pycon\n>>>{code.rstrip()}\n```\n".replace("\n\n\n\n", "\n\n")
    entries = _ENTRY.findall(body) if title in ("Args", "Attributes", "Raises") else []
    listed = [f"- `{name}`: {' '.join(text.split())}" for name, text in entries]
    return f"**{title}**\n\n" + ("\n".join(listed) or " ".join(body.split())) + "\n\n"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
