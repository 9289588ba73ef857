"""Every patch has a test that fails without it: see ``needs_patch`` in ``tests/support/needed.py``."""

from __future__ import annotations

import ast
from pathlib import Path

import hf_packfix.patches
from hf_packfix.patches import PATCHES


def marked_targets() -> set[str]:
    """Return the targets in all marks ``needs_patch``."""
    calls = [
        node
        for path in Path(__file__).parents[1].rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "needs_patch"
    ]
    return {argument.value for call in calls for argument in call.args if isinstance(argument, ast.Constant)}


def test_every_file_of_patches_has_a_file_of_tests():
    names = {path.stem for path in Path(hf_packfix.patches.__file__).parent.glob("[a-z]*.py")}
    assert {name for name in names if not list(Path(__file__).parent.glob(f"test_{name}*.py"))} == set()


def test_every_patch_has_a_test_that_needs_it():
    assert marked_targets() == {patch.target for patch in PATCHES}
