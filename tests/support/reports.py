"""What an evaluation reports and warns of, and that two runs report the same."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer

import hf_packfix
from tests.support.oracle import Row, new_trainer, packed_batch, padded_batch, stock


class Recorder:
    """A ``compute_metrics`` that keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        self.calls.append(prediction)
        labels = prediction.label_ids
        logits = prediction.predictions
        while isinstance(labels, (tuple, list)):
            labels = labels[0]
        while isinstance(logits, (tuple, list)):
            logits = logits[0]
        labels, logits = torch.as_tensor(labels), torch.as_tensor(logits)
        real = labels != -100
        return {"accuracy": (logits.argmax(-1)[real] == labels[real]).float().mean().item()}


def assert_same_tree(found: Any, expected: Any) -> None:
    """Compare nested arrays and tensors: types of containers, shapes, dtypes, values."""
    if expected is None:
        assert found is None
    elif isinstance(expected, (tuple, list)):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for left, right in zip(found, expected, strict=True):
            assert_same_tree(left, right)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same_tree(found[key], expected[key])
    else:
        assert type(found) is type(expected)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-5, atol=1e-6)


def report(directory, model, collate, data, **kwargs) -> tuple[dict[str, float], list[Any], Any]:
    """Evaluate and predict; return the metrics without the times, what metrics were computed on, and predictions."""
    recorder = Recorder()
    options = {"compute_metrics": recorder, **kwargs.pop("options", {})}
    trainer = new_trainer(directory, model, data, collate, options=options, **kwargs)
    metrics = {k: v for k, v in trainer.evaluate().items() if not k.endswith(("_second", "time"))}
    return metrics, recorder.calls, trainer.predict(data)


def assert_same_report(found, expected) -> None:
    assert list(found[0]) == list(expected[0])
    for key, value in expected[0].items():
        assert found[0][key] == pytest.approx(value, rel=1e-5), key
    assert len(found[1]) == len(expected[1])
    for left, right in zip(found[1], expected[1], strict=True):
        assert_same_tree(left.predictions, right.predictions)
        assert_same_tree(left.label_ids, right.label_ids)
        assert_same_tree(getattr(left, "losses", None), getattr(right, "losses", None))
    assert_same_tree(found[2].predictions, expected[2].predictions)
    assert_same_tree(found[2].label_ids, expected[2].label_ids)
    assert found[2].metrics["test_loss"] == pytest.approx(expected[2].metrics["test_loss"], rel=1e-5)


def assert_evaluation_equals_padded(directory, model, data, packed=packed_batch, padded=padded_batch, **kwargs):
    """Assert that packed batches are evaluated under the plugin as padded ones without it; return the first report."""
    found = report(directory, model, packed, data, **kwargs)
    with stock():
        expected = report(directory, model, padded, data, **kwargs)
    assert_same_report(found, expected)
    return found


class Stream(IterableDataset):
    """Rows without a length; the data loader batches them, so that nothing is dispatched."""

    def __init__(self, data: list[Row]) -> None:
        self.data = data

    def __iter__(self):
        return iter(self.data)


def messages(trainer: Trainer, method: str, data: Any) -> list[str]:
    """Call a method of a Trainer twice, and return what hf_packfix warned of."""
    hf_packfix._warnings._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            getattr(trainer, method)(data)
    return [str(w.message) for w in caught if w.category is hf_packfix.HFPackfixWarning]
