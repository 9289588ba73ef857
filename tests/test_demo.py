"""The demo reaches its accuracy, and its command line refuses what is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest


def demo(directory, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hf_packfix", "demo", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4])
def test_accuracy(tmp_path, seed):
    result = demo(tmp_path, "--seed", str(seed), "--output-dir", "out")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "AssertionError" in lines[1]  # what stock does with the same batch
    name, accuracy = lines[-1].split(": ")
    assert name == "accuracy"
    assert float(accuracy) >= 0.950
    assert (tmp_path / "out/demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/model/model.safetensors").exists()


def test_no_plot_and_few_epochs(tmp_path):
    result = demo(tmp_path, "--epochs", "2", "--no-plot")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "demo_output/demo.png").exists()


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
