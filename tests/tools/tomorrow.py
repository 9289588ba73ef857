"""What happens on the day upstream renames something: every name that a patch uses, renamed in a copy of upstream.

    python -m tests.tools.tomorrow [NAME ...] [--propose] [--jobs N]

For each name (all that are declared, by default), copies of transformers, accelerate and torch in which it has another
name run ``tests/support/tomorrow_program.py``: an ordinary program without the plugin and with it, and a packed one.

- The ordinary program must report the same numbers as without the plugin.
- Each use of the packed program must report the numbers of the padded one, or raise. If a number is wrong, a warning
  must have named the patch.

``--propose`` adds the names that stand in the code of the targets without being declared. Exits with 1 if an ordinary
program differs, or a packed one is silently wrong.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_packfix.engine.targets import resolve
from hf_packfix.patches import PATCHES
from tests.support.future import Edit, release
from tests.support.interpreters import environment, python

PACKAGES = ("transformers", "accelerate")
SUFFIX = "_as_of_tomorrow"

#: How a name is renamed: as a word, or where that breaks upstream itself, as an attribute. `{0}` is the name.
WAYS = {"word": r"\b{0}\b", "attribute": r"(?:(?<=\.)|(?<=\bdef )){0}\b"}

#: What programs write themselves; without these names they would break with any upstream.
OF_PROGRAMS = {"label_smoothing_factor", "include_num_input_tokens_seen", "predict_with_generate", "compute_loss"}


@dataclass(frozen=True)
class Outcome:
    """What happened under one renamed name.

    Attributes:
        way: how it was renamed; empty if upstream itself breaks in every way.
        ordinary: "same", or what differs.
        packed: for every use "right", "raises: ...", "WRONG, with a warning" or "WRONG".
    """

    name: str
    way: str
    ordinary: str
    packed: dict[str, str]
    warnings: tuple[str, ...]

    @property
    def is_harmless(self) -> bool:
        return self.ordinary in ("same", "") and "WRONG" not in self.packed.values()


def declared() -> list[str]:
    """Return every name of transformers and accelerate that a patch has for a target or uses."""
    names = [part for patch in PATCHES for part in (patch.path, *(use.rpartition(":")[2] for use in patch.uses))]
    last = [name.rpartition(".")[2] for name in names]
    return sorted({name for name in last if not name.startswith("__")} - OF_PROGRAMS)


def proposed() -> list[str]:
    """Return the attributes that the code of the targets names, which no patch declares."""
    found: set[str] = set()
    for patch in PATCHES:
        import_module(patch.module)
        function = resolve(patch.module, patch.path)[1]
        if function is not None:
            source = inspect.getsource(inspect.unwrap(function))
            found |= set(re.findall(r"\bself\.(\w{4,})", source))
    return sorted(found - set(declared()) - OF_PROGRAMS)


@cache
def sources(package: str) -> dict[str, str]:
    """Return the text of every source file of a package, by its path in it."""
    root = Path(import_module(package).__file__ or "").parent
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in root.rglob("*.py")}


def renamed(name: str, way: str, directory: Path) -> bool:
    """Write copies of the packages in which a name is another; return whether any file has it."""
    pattern = WAYS[way].format(re.escape(name))
    for package in PACKAGES:
        matching = [file for file, text in sources(package).items() if re.search(pattern, text)]
        if matching:
            edits = [Edit(file, pattern, name + SUFFIX) for file in matching]
            release(directory, package, edits, version(package))
    return any(directory.iterdir())


def run(directory: Path | None, *layouts: str, plugin: bool) -> dict[str, Any]:
    """Return what the program reports on copies of upstream; on upstream itself without a directory."""
    path = [environment()["PYTHONPATH"]] if directory is None else [str(directory), environment()["PYTHONPATH"]]
    variables = {"PYTHONPATH": os.pathsep.join(path), "HF_PACKFIX": "1" if plugin else "0"}
    done = python("-m", "tests.support.tomorrow_program", *layouts, env=variables, limit=600)
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    except (IndexError, ValueError):
        return {"error": (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]}


def equal(found: Any, expected: Any, tolerance: float = 1e-4) -> bool:
    """Compare nested numbers."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return found.keys() == expected.keys() and all(equal(found[key], expected[key], tolerance) for key in expected)
    if isinstance(expected, list) and isinstance(found, list):
        return len(found) == len(expected) and all(
            equal(*pair, tolerance) for pair in zip(found, expected, strict=True)
        )
    if isinstance(expected, float) and isinstance(found, float):
        return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
    return bool(found == expected)


@cache
def baseline() -> dict[str, Any]:
    """Return what the program reports on upstream as it is."""
    return run(None, "padded", "packed", plugin=True)


def outcome(name: str) -> Outcome:
    """Rename a name, run the program, and compare."""
    right = {use: value for use, value in baseline()["padded"].items() if use != "models"}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            if not renamed(name, way, directory):
                return Outcome(name, "", "no file has it", {}, ())
            without = run(directory, "padded", plugin=False)
            if not equal(without.get("padded"), right):
                continue  # upstream itself breaks
            found = run(directory, "padded", "packed", plugin=True)
        if "error" in found:
            return Outcome(name, way, found["error"], {}, ())
        ordinary = {use: value for use, value in found["padded"].items() if use != "models"}
        differing = [use for use in right if not equal(ordinary[use], right[use])]
        warned = tuple(found["warnings"])
        packed = {
            use: judge(value, baseline()["packed" if use == "models" else "padded"][use], warned)
            for use, value in found["packed"].items()
        }
        same = "; ".join(f"{use}: {ordinary[use]}" for use in differing) or "same"
        return Outcome(name, way, same, packed, warned)
    return Outcome(name, "", "", {}, ())


def judge(found: Any, expected: Any, warned: tuple[str, ...]) -> str:
    """Return in words what became of a use of the packed program."""
    if isinstance(found, str):
        return f"raises: {found}"
    if equal(found, expected):
        return "right"
    return "WRONG, with a warning" if warned else "WRONG"


def row(found: Outcome) -> str:
    """Return a line of the table."""
    if not found.way:
        return f"| `{found.name}` | - | {found.ordinary or 'upstream itself breaks'} | - |"
    groups: dict[str, list[str]] = {}
    for use, text in found.packed.items():
        groups.setdefault(text if len(text) < 160 else f"{text[:157]}...", []).append(use)
    if groups.keys() == {"right"}:
        packed = "right"
    else:
        packed = "; ".join(f"{', '.join(uses)}: {text}" for text, uses in groups.items())
    warned = f"; {len(found.warnings)} warning{'s' * (len(found.warnings) > 1)}" if found.warnings else ""
    return f"| `{found.name}` | {found.way} | {found.ordinary} | {packed}{warned} |"


def main() -> int:
    """Print the table; return 1 if a name breaks something silently."""
    parser = argparse.ArgumentParser(description="rename what the patches use, and see what happens")
    parser.add_argument("names", nargs="*", metavar="NAME", help="every declared one by default")
    parser.add_argument("--propose", action="store_true", help="add the undeclared names in the targets' code")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    names = options.names or [*declared(), *(proposed() if options.propose else [])]
    print("| renamed | as | a padded program, plugin on | a packed program |\n|---|---|---|---|", flush=True)
    failed = False
    baseline()
    with ThreadPoolExecutor(options.jobs) as pool:
        for found in pool.map(outcome, names):
            failed |= not found.is_harmless
            print(row(found), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
