"""The complete examples run as they are, and learn what they are for."""

from __future__ import annotations

import pytest

from tests.support.interpreters import ROOT, python

EXAMPLES = ROOT / "hf_packfix/docs/examples"
#: What the number in the last line must reach, far from a guess; a guess of `forecasting` is 1, and less is better.
BARS = {
    "sequence_classification": 0.95,
    "tagging": 0.95,
    "language_model": 0.75,
    "sequence_to_sequence": 0.9,
    "time_series_classification": 0.95,
    "forecasting": 0.35,
    "ctc": 0.9,
    "onnx_serving": 0.95,
}


def test_every_example_has_a_bar():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(BARS)


@pytest.mark.slow
@pytest.mark.parametrize("name", BARS)
def test_the_example_learns(tmp_path, name):
    if name == "onnx_serving":
        pytest.importorskip("onnxruntime")
    variables = {"ACCELERATE_USE_CPU": "true"}
    result = python(EXAMPLES / f"{name}.py", cwd=tmp_path, env=variables, measured=True, limit=600)
    assert result.returncode == 0, result.stderr
    reached = float(result.stdout.splitlines()[-1].rpartition(": ")[2])
    assert reached <= BARS[name] if name == "forecasting" else reached >= BARS[name]


@pytest.mark.parametrize("name", BARS)
def test_the_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 80
