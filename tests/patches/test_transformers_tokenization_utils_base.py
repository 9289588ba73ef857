"""``BatchEncoding``: it keeps and moves what is packed."""

from __future__ import annotations

import pytest
import torch
from accelerate.utils import operations
from transformers import BatchEncoding

from tests.support.packed_sequences import CPU, META, some_packed


@pytest.mark.needs_patch("transformers.tokenization_utils_base:BatchEncoding.to")
@pytest.mark.parametrize("move", [BatchEncoding.to, operations.send_to_device])
def test_batch_encoding_keeps_and_moves_packed_sequences(move):
    encoding = BatchEncoding({"x": some_packed(), "y": torch.ones(2)})
    encoding.note = "kept"
    moved = move(encoding, META)
    assert moved is encoding
    assert moved.note == "kept"
    assert list(moved) == ["x", "y"]
    assert moved["x"].data.device == moved["x"].sorted_indices.device == moved["y"].device == META
    assert moved["x"].batch_sizes.device == CPU
