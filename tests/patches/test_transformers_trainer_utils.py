"""What ``compute_metrics`` is given, made by hand."""

from __future__ import annotations

import torch

from tests.support.oracle import (
    packed_batch,
    padded_batch,
    rows,
)


def test_metrics_never_get_a_packed_sequence():
    from transformers import EvalPrediction

    batch = packed_batch(rows(4))
    with_packed = EvalPrediction(batch["labels"], batch["labels"], inputs={"x": [batch["input_ids"]]})
    expected = padded_batch(rows(4))
    assert torch.equal(with_packed.label_ids, expected["labels"])
    assert torch.equal(with_packed.predictions, expected["labels"])
    assert with_packed.inputs["x"][0].shape == expected["input_ids"].shape
