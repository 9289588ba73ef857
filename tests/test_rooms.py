"""Which folder of the package may import which: dependencies run one way, and what must stay light stays light."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_packfix"

#: What every folder may import.
BASE = {"_version", "_warnings"}
MAY_IMPORT = {
    "startup": set(),
    "packing": set(),
    "evaluation": {"packing"},
    "rnn": {"packing"},
    "collator": {"packing"},
    "models": {"rnn", "packing"},
    "engine": {"evaluation", "rnn", "packing"},
    "patches": {"engine", "evaluation", "rnn", "packing"},
    "activation": {"engine", "patches"},
    "commands": {"activation", "engine", "patches", "rnn", "packing", "collator", "models"},
    "pyinstaller": set(),
}

#: Top-level modules that a folder may import when it is loaded itself; other imports stand inside functions.
LOADS = {
    "packing": {"torch", "numpy"},
    "evaluation": {"torch", "numpy"},
    "rnn": {"torch", "numpy"},
    "collator": {"torch", "numpy"},
    "models": {"torch", "numpy", "transformers"},
    "engine": set(),
    "patches": set(),
    "activation": set(),
    "startup": set(),
}

HEAVY = {"torch", "transformers", "accelerate", "numpy", "wrapt", "sktime", "matplotlib"}


def imports(path: Path, *, at_import: bool) -> Iterator[str]:
    """Yield the modules that a file imports, all of them or those that it imports when it is loaded."""
    waiting: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif at_import and isinstance(node, (ast.FunctionDef, ast.Lambda)):
            continue
        elif at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def files(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def test_every_folder_has_a_rule():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"docs"} == MAY_IMPORT.keys()


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_folder_imports_no_other_than_it_may(room):
    for path in files(room):
        for name in imports(path, at_import=False):
            top, _, rest = name.partition(".")
            if top == "hf_packfix" and rest and room not in ("startup", "commands"):
                assert rest.partition(".")[0] in MAY_IMPORT[room] | BASE | {room}, f"{path}: {name}"


@pytest.mark.parametrize("room", LOADS)
def test_a_folder_loads_no_more_than_it_may(room):
    for path in files(room):
        heavy = {name.partition(".")[0] for name in imports(path, at_import=True)} & HEAVY
        assert heavy <= LOADS[room], path
        # What it imports of the package must not load more, either.
        rooms = {name.split(".")[1] for name in imports(path, at_import=True) if name.startswith("hf_packfix.")}
        for other in rooms & LOADS.keys():
            assert LOADS[other] <= LOADS[room], f"{path} loads {other}"


def test_the_package_has_no_import_cycle():
    """Of imports that run when a file is loaded."""
    modules = {
        "hf_packfix." + path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
        for path in PACKAGE.rglob("*.py")
        if "docs" not in path.parts and path.name != "__init__.py"
    }
    needs = {
        name: {
            m for found in imports(path, at_import=True) for m in modules if found == m or found.startswith(m + ".")
        }
        for name, path in modules.items()
    }
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError, which names those that import each other


def test_no_test_imports_another():
    for path in (PACKAGE.parent / "tests").rglob("*.py"):
        for name in imports(path, at_import=False):
            assert not any(part.startswith("test_") for part in name.split(".")[:-1]), f"{path}: {name}"
