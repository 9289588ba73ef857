"""Every code block of the README runs, and its table names every patch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_packfix import versions
from hf_packfix.patches import FAST_RNN, PATCHES

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
(SLOW,) = re.findall(r"^```python slow\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(directory: Path, code: str) -> str:
    (directory / "block.py").write_text(code, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "HF_PACKFIX"} | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [sys.executable, "block.py"], cwd=directory, capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("code", BLOCKS, ids=[str(number) for number in range(len(BLOCKS))])
def test_block_runs(tmp_path, code):
    printed = run(tmp_path, code).splitlines()
    if "generate(" in code:
        assert printed[-1] == "[[7, 8, 9, 0, 1, 2, 3, 4]]"


@pytest.mark.slow
def test_digits_are_reversed(tmp_path):
    assert float(run(tmp_path, SLOW).splitlines()[-1]) >= 0.98


def test_the_tagger_is_short():
    (tagger,) = (block for block in BLOCKS if "compute_metrics" in block)
    assert len(tagger.splitlines()) < 40


def test_the_first_block_needs_the_plugin(tmp_path):
    without = BLOCKS[0].replace("import hf_packfix  # the one line\n", "")
    assert without != BLOCKS[0]
    (tmp_path / "block.py").write_text(without, encoding="utf-8")
    result = subprocess.run([sys.executable, "block.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    error = "AssertionError: Expected data to be a list or tuple of length 2"
    assert error in result.stderr
    assert error in README


def test_the_versions_are_the_tested_ones():
    between = README.partition("<!-- versions -->")[2].partition("<!-- /versions -->")[0]
    listed = re.findall(r"^\| (\d\S*) \| (\d\S*) \|", between, re.MULTILINE)
    tested = [(pair["transformers"], pair["accelerate"]) for pair in versions.TESTED]
    assert listed == tested, "the table between <!-- versions --> and <!-- /versions --> differs from versions.TESTED"


def test_the_gate_is_what_the_package_requires():
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for package, minimum in versions.MINIMUM.items():
        assert f'"{package}>={minimum}"' in pyproject


def test_every_patch_is_in_the_table():
    for patch in PATCHES + FAST_RNN:
        assert f"`{patch.path}`" in README, patch.target
