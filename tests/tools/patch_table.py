"""Write the table of every patch on the page "How it works", as declared: ``python -m tests.tools.patch_table``."""

from __future__ import annotations

import re
from pathlib import Path

from hf_packfix.engine.first_use import FIRST_USE
from hf_packfix.engine.patch import Patch
from hf_packfix.patches import FAST_RNN, PATCHES

__all__ = ["PAGE", "with_table"]

PAGE = Path(__file__).parents[2] / "hf_packfix/docs/how_it_works.md"
GROUPS = {
    "": PATCHES,
    "Until a Trainer is first used": FIRST_USE,
    "Only on request, with `HF_PACKFIX_FAST_RNN=1`": FAST_RNN,
}
_TABLE = re.compile(r"(<!-- patches -->\n).*?(<!-- /patches -->\n)", re.DOTALL)


def with_table(page: str) -> str:
    """Return the text of the page with the table between its marks as the declarations have it."""
    lines = ["| patched, in place | the original | with the patch |", "|---|---|---|"]
    for title, patches in GROUPS.items():
        lines += [f"| *{title}* | | |"] if title else []
        lines += map(_row, patches)
    return _TABLE.sub(lambda marks: marks[1] + "\n".join(lines) + "\n" + marks[2], page)


def _row(patch: Patch) -> str:
    problem = patch.problem.replace("silently", "**silently**")
    if patch.issue:
        *_, repository, _, number = patch.issue.split("/")
        problem += f" ([{repository} #{number}]({patch.issue}))"
    return f"| {patch.module}<br>`{patch.path}`{_releases(patch)} | {problem} | {patch.fix} |"


def _releases(patch: Patch) -> str:
    if patch.until:
        return f", before {patch.until}"
    return f", from {patch.since}" if patch.since else ""


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
