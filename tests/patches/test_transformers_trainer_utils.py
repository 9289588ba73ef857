"""What ``compute_metrics`` is given, made by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import EvalPrediction

from tests.support.oracle import packed_batch, padded_batch, rows


@pytest.mark.needs_patch("transformers.trainer_utils:EvalPrediction.__init__")
def test_metrics_never_get_a_packed_sequence():
    batch = packed_batch(rows(4))
    with_packed = EvalPrediction(batch["labels"], batch["labels"], inputs={"x": [batch["input_ids"]]})
    expected = padded_batch(rows(4))
    assert torch.equal(with_packed.label_ids, expected["labels"])
    assert torch.equal(with_packed.predictions, expected["labels"])
    assert with_packed.inputs["x"][0].shape == expected["input_ids"].shape
