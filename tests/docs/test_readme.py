"""Every code block of the README and of the pages runs, their links lead somewhere, and their tables are complete."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from hf_packfix.activation import versions
from tests.support.interpreters import ROOT, python

DOCS = ROOT / "hf_packfix/docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TEXTS = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = {
    f"{name}-{number}": code
    for name, text in TEXTS.items()
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
}
(SLOW,) = re.findall(r"^```python slow\n(.*?)^```", TEXTS["models"], re.MULTILINE | re.DOTALL)
#: A comment beside `print` that begins with what is printed, rather than with a word about it.
PRINTED = re.compile(r"^print\(.*\)  # ((?:[\[\d]|True|False|torch\.).*)$", re.MULTILINE)
THE_FIX = "README-0"
#: What the last line is between, for the blocks that learn.
LAST_NUMBER = {THE_FIX: (0.95, 1.0), "evaluation-0": (0.95, 1.0), "distributed-0": (0.0, 0.2)}


def run(directory: Path, code: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a block as a script of its own, and check its exit status."""
    (directory / "block.py").write_text(code, encoding="utf-8")
    result = python("block.py", cwd=directory, env={"ACCELERATE_USE_CPU": "true"}, measured=True, limit=600)
    assert result.returncode == status, result.stdout + result.stderr
    return result


@pytest.mark.parametrize("name", BLOCKS)
def test_block_runs_and_prints_what_the_page_says(tmp_path, name):
    code = BLOCKS[name]
    printed = run(tmp_path, code).stdout.splitlines()
    lines = iter(printed)
    for comment in PRINTED.findall(code):
        assert any(line and comment.startswith(line) for line in lines), comment
    lowest, highest = LAST_NUMBER.get(name, (None, None))
    if lowest is not None:
        assert lowest <= float(printed[-1]) <= highest


def test_the_accuracy_that_the_readme_shows():
    (shown,) = re.findall(r"^```text\n(\d\S*)\n```$", TEXTS["README"], re.MULTILINE)
    lowest, highest = LAST_NUMBER[THE_FIX]
    assert lowest <= float(shown) <= highest


@pytest.mark.slow
def test_digits_are_reversed(tmp_path):
    assert float(run(tmp_path, SLOW).stdout.splitlines()[-1]) >= 0.98


def test_the_fix_needs_the_plugin(tmp_path):
    without = BLOCKS[THE_FIX].replace("import hf_packfix  # the one line\n", "")
    assert without != BLOCKS[THE_FIX]
    error = "AssertionError: Expected data to be a list or tuple of length 2"
    assert error in run(tmp_path, without, status=1).stderr
    assert error in TEXTS["README"]


def test_the_readme_is_short():
    assert len(TEXTS["README"].splitlines()) <= 150


@pytest.mark.parametrize("command", [".venv/bin/hf-packfix demo", ".venv/bin/python -m pytest"])
def test_the_commands_that_ci_runs_are_lines_of_their_own(command):
    lines = [line for line in TEXTS["README"].splitlines() if command in line]
    assert len(lines) == 1
    assert lines[0].startswith("python -m venv .venv && .venv/bin/pip install ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", TEXTS[page.stem], flags=re.M | re.S)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_readme_leads_to_every_page():
    missing = [page.name for page in PAGES[1:] if f"(hf_packfix/docs/{page.name}" not in TEXTS["README"]]
    assert missing == []


def test_every_page_begins_with_its_title():
    for page in PAGES:
        assert re.match(r"# \S", TEXTS[page.stem]), page


def test_the_versions_are_the_tested_ones():
    between = TEXTS["versions"].partition("<!-- versions -->")[2].partition("<!-- /versions -->")[0]
    listed = re.findall(r"^\| (\d\S*) \| (\d\S*) \|", between, re.MULTILINE)
    tested = [(pair["transformers"], pair["accelerate"]) for pair in versions.TESTED]
    assert listed == tested, "the table between <!-- versions --> and <!-- /versions --> differs from versions.TESTED"


def test_the_gate_is_what_the_package_requires():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package, minimum in (versions.MINIMUM | versions.NEEDED).items():
        assert f'"{package}>={minimum}"' in pyproject
