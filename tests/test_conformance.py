"""The shortest proof that the plugin does its work on this version: one training run, one evaluation."""

from __future__ import annotations

import pytest

from tests.support.oracle import Tagger, assert_same_run, packed_batch, padded_batch, rows, stock, train
from tests.support.reports import compare

pytestmark = pytest.mark.conformance


def test_training_equals_the_padded_run(tmp_path):
    options = {"gradient_accumulation_steps": 2, "include_num_input_tokens_seen": True}
    data = rows(12)  # four batches: 4.46 leaves out what does not fill the last step
    packed = train(tmp_path, Tagger, data, packed_batch, **options)
    with stock():
        padded = train(tmp_path, Tagger, data, padded_batch, **options)
    assert_same_run(packed, padded)
    assert packed.state.num_input_tokens_seen == 2 * sum(len(row["input_ids"]) for row in data)


def test_evaluation_equals_the_padded_run(tmp_path):
    compare(tmp_path, Tagger, rows())
