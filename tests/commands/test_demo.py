"""The demo reaches its accuracy packed and padded, and its command line refuses what is wrong."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.interpreters import python

pytestmark = pytest.mark.slow  # starts many processes


def demo(directory, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "hf_packfix", "demo", *arguments, cwd=directory, measured=True, limit=600)


#: The lines before the last one, which must be all that compares the two runs.
CLOSING = [
    r"losses of the 270 batches: differ by at most (\S+)",
    r"steps computed: padded ([\d,]+), packed ([\d,]+) \((\d+)% saved\)",
    r"CPU time of training, one thread: padded (\S+) s \(torch's GRU, .*\), packed (\S+) s \(.*\): \d+%",
]
LAST = r"accuracy: (\d\.\d+) on 370 test recordings \(padded: (\d\.\d+)\)"


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4])
def test_accuracy_and_what_packing_saves(tmp_path, seed):
    result = demo(tmp_path, "--seed", str(seed), "--output-dir", "out")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "AssertionError" in lines[1]  # what stock does with the same batch
    (accuracy, padded) = map(float, re.fullmatch(LAST, lines[-1]).groups())
    assert accuracy >= 0.950
    assert padded == pytest.approx(accuracy, abs=0.01)
    assert result.stdout.count("accuracy") == 1
    found = [re.fullmatch(pattern, line) for pattern, line in zip(CLOSING, lines[-4:-1], strict=True)]
    assert all(found), lines[-4:-1]
    difference, steps, _ = ([*match.groups()] for match in found if match)
    # Not to the last bit: rounding grows from batch to batch. The first losses are 2.2.
    assert float(difference[0]) < 0.01
    assert steps[1] == f"{30 * 4274:,}"
    assert 30 < int(steps[2]) < 40
    assert (tmp_path / "out/demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/model/model.safetensors").exists()


def test_the_output_is_short_and_without_a_picture_if_so_asked(tmp_path):
    result = demo(tmp_path, "--epochs", "2", "--no-plot")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 10
    assert not (tmp_path / "demo_output/demo.png").exists()
    assert "{" not in result.stdout
    bars = re.split(r"[\r\n]+", result.stderr)
    assert [line for line in bars if line.strip("\x1b[A ") and "%|" not in line] == []
    assert any(line.startswith("training, packed and padded in turns: 100%") for line in bars)
    assert [line for line in bars if re.match(r"\s*\d+%", line)] == []  # every bar has a name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: expected a whole number from 1 on, found '0'"),
        (["--epochs", "many"], "argument --epochs: expected a whole number from 1 on, found 'many'"),
        (["--seed", "-1"], "argument --seed: expected a whole number from 0 on, found '-1'"),
        (["--output-dir", "taken/out"], "--output-dir: cannot write to taken/out"),
    ],
)
def test_wrong_values_are_named(tmp_path, arguments, message):
    (tmp_path / "taken").touch()
    result = demo(tmp_path, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_page_shows_what_is_printed():
    page = (Path(__file__).parents[2] / "hf_packfix/docs/examples.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```text\n(losses of .*?)```", page, re.MULTILINE | re.DOTALL)
    assert re.fullmatch("\n".join([*CLOSING, LAST, ""]), shown)
