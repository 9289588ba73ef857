"""``BatchEncoding``: it keeps and moves what is packed."""

from __future__ import annotations

import pytest
import torch
from transformers import BatchEncoding

from tests.support.packed_sequences import CPU, META, some_packed


@pytest.mark.needs_patch("transformers.tokenization_utils_base:BatchEncoding.to")
def test_batch_encoding_keeps_and_moves_packed_sequences():
    encoding = BatchEncoding({"x": some_packed(), "y": torch.ones(2)})
    moved = encoding.to(META)
    assert moved is encoding
    assert list(moved) == ["x", "y"]
    assert moved["x"].data.device == moved["x"].sorted_indices.device == moved["y"].device == META
    assert moved["x"].batch_sizes.device == CPU
