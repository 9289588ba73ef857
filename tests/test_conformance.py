"""The shortest proof that the plugin does its work on this version: one training run, one evaluation."""

from __future__ import annotations

import pytest

from tests.support.oracle import Tagger, assert_training_equals_padded, rows
from tests.support.reports import assert_evaluation_equals_padded

pytestmark = pytest.mark.conformance


def test_training_equals_the_padded_run(tmp_path):
    options = {"gradient_accumulation_steps": 2, "include_num_input_tokens_seen": True}
    data = rows(12)  # four batches: 4.46 leaves out what does not fill the last step
    packed, _ = assert_training_equals_padded(tmp_path, Tagger, data, **options)
    assert packed.state.num_input_tokens_seen == 2 * sum(len(row["input_ids"]) for row in data)


def test_evaluation_equals_the_padded_run(tmp_path):
    assert_evaluation_equals_padded(tmp_path, Tagger, rows())
