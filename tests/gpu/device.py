"""The device of these tests, and the oracle on it.

``HF_PACKFIX_TEST_GPU_ON_CPU=1`` runs their bodies on the CPU, to find mistakes in them on a machine without a GPU; it
shows nothing of GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support.oracle import (
    Row,
    assert_training_equals_padded,
    new_trainer,
    packed_batch,
    padded_batch,
    stock,
)

ON_GPU = torch.cuda.is_available()
#: None if there is no GPU.
DEVICE: Any = torch.device("cuda", 0) if ON_GPU else None
if not ON_GPU and os.environ.get("HF_PACKFIX_TEST_GPU_ON_CPU") == "1":
    DEVICE = torch.device("cpu")


def on_device(**changes: Any) -> dict[str, Any]:
    """Return training arguments for the device of these tests.

    With plain gradient descent rounding errors stay as small as they are; Adam divides tiny gradients by themselves.
    """
    return {"use_cpu": not ON_GPU, "optim": "sgd", "learning_rate": 0.5, **changes}


def compare_training(*args: Any, **options: Any) -> None:
    """Call :func:`assert_training_equals_padded` on the device of these tests, with a tolerance of 1e-4 by default."""
    found, expected = assert_training_equals_padded(*args, **{"tolerance": 1e-4, **on_device(**options)})
    assert found.trainer.args.device.type == DEVICE.type
    assert found.state.num_input_tokens_seen == expected.state.num_input_tokens_seen


def compare_evaluation(
    directory: Path, model: type[nn.Module], data: Any, *, tolerance: float = 1e-5, **changes: Any
) -> dict[str, Any]:
    """Evaluate and predict on packed batches, and on padded ones without the plugin; compare all that is reported.

    Returns:
        What the packed run reported: the metrics, what ``compute_metrics`` was given, and the prediction.
    """
    found = _report(directory, model, data, packed_batch, **changes)
    with stock():
        expected = _report(directory, model, data, padded_batch, **changes)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return found


def _report(
    directory: Path, model: type[nn.Module], data: Any, collate: Callable[[list[Row]], Any], **changes: Any
) -> dict[str, Any]:
    seen: list[dict[str, Any]] = []

    def metrics(prediction: Any) -> dict[str, float]:
        fields = ("predictions", "label_ids", "inputs", "losses")
        found = {name: value for name in fields if (value := getattr(prediction, name, None)) is not None}
        if "inputs" in found:  # padded by the collator with 0, by hf_packfix with -100
            found["inputs"] = found["inputs"].clip(min=0)
        seen.append(found)
        right = prediction.predictions.argmax(-1) == prediction.label_ids
        return {"accuracy": float(right[prediction.label_ids != -100].mean())}

    options = {"compute_metrics": metrics}
    trainer = new_trainer(directory, model, data, collate, options=options, **on_device(**changes))
    evaluated, predicted = trainer.evaluate(), trainer.predict(data)
    assert trainer.args.device.type == DEVICE.type
    reported = {**evaluated, **predicted.metrics}
    return {
        "metrics": {key: value for key, value in reported.items() if not key.endswith(("_second", "time"))},
        "seen": seen,
        "predictions": predicted.predictions,
        "label_ids": predicted.label_ids,
    }
