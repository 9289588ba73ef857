"""Evaluation and prediction on a GPU report what they report for padded batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpu.device import ON_GPU, compare_evaluation
from tests.support.oracle import Classifier, PlainTagger, Tagger, rows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("model", [Tagger, PlainTagger])
def test_one_label_a_step(tmp_path: Path, model: Any) -> None:
    found = compare_evaluation(tmp_path, model, rows())
    assert found["metrics"]["eval_loss"] == pytest.approx(found["metrics"]["test_loss"])
    assert found["metrics"]["eval_accuracy"] > 0
    assert isinstance(found["predictions"], np.ndarray)
    assert found["predictions"].shape == (14, 9, 4)


def test_one_label_a_row(tmp_path: Path) -> None:
    found = compare_evaluation(tmp_path, Classifier, rows(labels="row"))
    assert found["predictions"].shape == (14, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_accumulation_steps": 1},
        {"eval_accumulation_steps": 2},
        {"include_for_metrics": ["inputs"]},
        {"include_for_metrics": ["inputs", "loss"], "eval_accumulation_steps": 2},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2},
        {"accelerator_config": {"non_blocking": True}},
        {"label_smoothing_factor": 0.1},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_arguments_of_the_evaluation_loop(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = compare_evaluation(tmp_path, Tagger, rows(), **changes)
    for name in changes.get("include_for_metrics", ()):
        assert {"inputs": "inputs", "loss": "losses"}[name] in found["seen"][0]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("how", ["{}", "{}_full_eval"])
def test_half_precision(tmp_path: Path, dtype: str, how: str) -> None:
    if dtype == "fp16" and not ON_GPU:
        pytest.skip("accelerate refuses fp16 on a CPU")
    # One prediction of 55 may differ, where two classes are as likely.
    found = compare_evaluation(tmp_path, Tagger, rows(), tolerance=3e-2, **{how.format(dtype): True})
    assert found["predictions"].dtype in (np.float32, np.float16)


def test_predictions_leave_the_gpu(tmp_path: Path) -> None:
    found = compare_evaluation(tmp_path, Tagger, rows(), eval_accumulation_steps=1)
    assert not any(isinstance(value, torch.Tensor) for value in found["seen"][0].values())
