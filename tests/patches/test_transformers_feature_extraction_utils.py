"""``BatchFeature``: it moves as the Trainer moves a batch."""

from __future__ import annotations

import pytest
import torch
from transformers import BatchFeature

from tests.support.oracle import stock
from tests.support.packed_sequences import CPU, META, some_packed


def test_batch_feature_moves_as_prepare_input_does():
    packed = some_packed()
    feature = BatchFeature({"x": packed, "y": torch.ones(2), "nested": [packed, torch.ones(1), "text"]})
    moved = feature.to(META)
    assert moved is feature
    assert list(moved) == ["x", "y", "nested"]
    for found in (moved["x"], moved["nested"][0]):
        assert found.data.device == found.sorted_indices.device == META
        assert found.batch_sizes.device == CPU
    assert moved["y"].device == moved["nested"][1].device == META
    assert moved["nested"][2] == "text"
    with stock():
        # Up to 4.57 a PackedSequence is left where it is, from 5.0 on rebuilding it fails.
        try:
            left = BatchFeature({"x": packed}).to(META)["x"].data.device
        except AssertionError:
            left = CPU
        assert left == CPU


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
