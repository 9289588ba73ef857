"""``hf-packfix docs`` prints every page as it is."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from hf_packfix.commands.pages import MODULES, TITLE, reference
from hf_packfix.models import RecurrentConfig
from hf_packfix.patches import FAST_RNN, FIRST_USE, PATCHES
from tests.support.interpreters import environment, python

DOCS = Path(__file__).parents[2] / "hf_packfix/docs"
TITLES = {path.stem: path.read_text(encoding="utf-8").splitlines()[0] for path in DOCS.glob("*.md")}
PAGES = dict(sorted({**TITLES, "api": f"# {TITLE}", "patches": "# Every patch"}.items()))


def docs(*arguments: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[bytes]:
    return python(
        "-m", "hf_packfix", "docs", *arguments, env={"PYTHONIOENCODING": encoding}, measured=True, text=False
    )


def test_the_list_has_every_page_with_its_title():
    result = docs()
    assert (result.returncode, result.stderr) == (0, b"")
    listed = [line.split(maxsplit=1) for line in result.stdout.decode().splitlines()[2:]]
    assert listed == [[page, title.removeprefix("# ")] for page, title in PAGES.items()]


@pytest.mark.parametrize("name", ["performance", "troubleshooting.md"])
def test_a_page_is_printed_as_it_is(name):
    result = docs(name)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode().splitlines() == (DOCS / name).with_suffix(".md").read_text("utf-8").splitlines()


def test_the_api_is_made_from_the_docstrings():
    assert docs("api").stdout.decode() == reference()


def test_the_table_of_patches_is_what_they_declare():
    lines = docs("patches").stdout.decode().splitlines()
    for patch in PATCHES + FIRST_USE + FAST_RNN:
        (row,) = [line for line in lines if f"| {patch.module}<br>`{patch.path}`" in line]
        assert patch.fix in row


def test_an_unknown_page_names_those_that_exist():
    result = docs("performence")
    assert (result.returncode, result.stdout) == (2, b"")
    expected = f"argument PAGE: expected one of: {', '.join(PAGES)}; found 'performence'"
    assert result.stderr.decode().splitlines()[-1].endswith(expected)


def test_a_terminal_that_lacks_some_characters():
    result = docs("performance", encoding="ascii")
    assert (result.returncode, result.stderr) == (0, b"")
    assert "sequences ? width" in result.stdout.decode("ascii")


@pytest.mark.parametrize("arguments", [["performance"], []], ids=["a page", "the list"])
def test_a_reader_that_stops_is_no_error(arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_packfix", "docs", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    process.stdout.close()  # before the first line
    _, stderr = process.communicate(timeout=240)
    assert (process.returncode, stderr) == (0, b"")


# --- the API -----------------------------------------------------------------------------------------------

REFERENCE = reference()


def test_every_public_name_has_an_entry_that_says_something():
    public = {f"{name}.{word}" for name in MODULES for word in importlib.import_module(name).__all__}
    entries = [entry.split("\n", 1) for entry in REFERENCE.split("\n### ")[1:]]
    assert {title for title, _ in entries} == public - {"hf_packfix.__version__"}
    for title, text in entries:
        assert len(text.split("```")[2].strip()) > 20, title


def test_an_entry_is_the_call_and_the_docstring():
    text = "batch_size(packed: PackedSequence) -> int\n```\n\nReturn B, the number of sequences.\n"
    assert f"\n### hf_packfix.batch_size\n\n```text\n{text}" in REFERENCE
    call = REFERENCE.split("### hf_packfix.models.RecurrentConfig\n\n```text\n")[1].split("\n```")[0]
    assert "\n    cell_type: str = 'gru',\n    vocab_size: int | None = None,\n" in call
    assert inspect.cleandoc(RecurrentConfig.__doc__ or "").split("Example:")[0].replace("``", "`") in REFERENCE
    assert "\n#### hf_packfix.models.RecurrentForCausalLM.labels_in_loss\n" in REFERENCE
