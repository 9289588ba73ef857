"""``BatchFeature``: it moves as the Trainer moves a batch."""

from __future__ import annotations

import pytest
import torch
from transformers import BatchFeature

from tests.support.packed_sequences import some_packed


@pytest.mark.needs_patch("transformers.feature_extraction_utils:BatchFeature.to")
def test_batch_feature_casts_floating_data_alone():
    feature = BatchFeature({"x": some_packed(), "ids": some_packed(torch.int64)}).to(torch.float16)
    assert feature["x"].data.dtype == torch.float16
    assert feature["ids"].data.dtype == torch.int64
    assert feature["x"].sorted_indices.dtype == torch.int64


def test_batch_feature_is_whole_after_a_refused_argument():
    feature = BatchFeature({"x": some_packed(), "y": torch.ones(2)})
    with pytest.raises(ValueError, match="BatchFeature"):
        feature.to(object())
    assert list(feature) == ["x", "y"]
