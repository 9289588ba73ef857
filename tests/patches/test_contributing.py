"""The page on contributing: its example is the code as it is, and what it says suffices to add the patch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8") if (ROOT / ".github").exists() else ""
FILE = "hf_packfix/patches/transformers_trainer_pt_utils.py"
TESTS = [
    "tests/patches/test_each_patch_is_needed.py",
    "tests/patches/test_drift.py",
    "tests/patches/test_undeclared.py",
]
TESTS += ["tests/patches/test_pass_through.py", "tests/test_conformance.py"]

pytestmark = [pytest.mark.newest, pytest.mark.skipif(not PAGE, reason="the page is not here")]


def example() -> str:
    (block,) = re.findall(r"```python\n(   @on_leaf.*?)   ```", PAGE, re.DOTALL)
    return textwrap.dedent(block)


def test_the_example_is_the_code_as_it_is():
    assert example() in (ROOT / FILE).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_is_all_that_adding_the_patch_takes(tmp_path):
    copy = shutil.copytree(ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(".*", "*.egg-info", "__pycache__"))
    source = (copy / FILE).read_text(encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *TESTS]

    def run(text: str) -> subprocess.CompletedProcess[str]:
        (copy / FILE).write_text(text, encoding="utf-8")
        return subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=500, check=False)

    without = run(source.replace(example(), ""))
    assert without.returncode == 1, without.stdout
    assert "test_every_patch_has_a_test_that_needs_it" in without.stdout
    added = run(source.replace(example(), "") + "\n\n" + example())
    assert added.returncode == 0, added.stdout[-3000:]
