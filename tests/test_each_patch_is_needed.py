"""Switch one patch off at a time: something the tests hold to be right must go wrong.

A patch that nothing needs is a patch too many, and an oracle that does not notice it is gone is no oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_concat, nested_numpify, nested_truncate

from hf_packfix.patches import PATCHES
from tests import test_evaluate, test_prepare_input, test_seq2seq, test_train
from tests.drift import state_here
from tests.oracle import Tagger, packed_batch, padded_batch, rows, stock, train


def same_training(directory: Any, **kwargs: Any) -> None:
    packed = train(directory, Tagger, rows(), kwargs.pop("collate", packed_batch), **kwargs)
    with stock():
        padded = train(directory, Tagger, rows(), padded_batch, **kwargs)
    test_train.assert_same_run(packed, padded)


def same_labels(convert: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Return a check that ``convert`` makes of packed labels what it makes of padded ones."""

    def check(directory: Any) -> None:
        with stock():
            expected = convert(padded_batch(rows(4))["labels"])
        found = convert(packed_batch(rows(4))["labels"])
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))

    return check


def input_tokens(directory: Any) -> None:
    test_train.test_input_tokens_seen_are_the_sum_of_the_lengths(directory, "all", False, False, dict)


def truncated(labels: Any) -> Any:
    return nested_numpify(nested_truncate(labels, 2))


#: What goes wrong without each patch: a check that passes with all of them on.
NEEDED_BY: dict[str, Callable[[Any], None]] = {
    "Trainer._prepare_input": same_training,
    "Trainer.floating_point_ops": same_training,
    "Trainer._track_num_input_tokens": input_tokens,
    "Trainer._get_num_items_in_batch": lambda d: test_train.test_gradient_accumulation_with_a_loss_function(
        d, Tagger, 3
    ),
    "Trainer.get_batch_samples": input_tokens,
    "Trainer.evaluation_loop": test_evaluate.test_labels_under_another_name_are_named_once,
    "Trainer.prediction_step": test_evaluate.test_labels_under_another_name_are_named_once,
    "LabelSmoother.__call__": lambda d: test_train.test_label_smoothing(d, 1),
    "nested_detach": lambda d: test_evaluate.compare(d, Tagger, rows()),
    "nested_concat": same_labels(lambda labels: nested_concat(labels, labels, padding_index=-100)),
    "nested_numpify": same_labels(nested_numpify),
    "nested_truncate": same_labels(truncated),
    "find_batch_size": test_evaluate.test_number_of_samples_of_a_data_set_without_a_length,
    "EvalPrediction.__init__": same_labels(lambda labels: EvalPrediction(labels, labels).label_ids),
    "Seq2SeqTrainer.prediction_step": lambda d: test_seq2seq.test_generation_reports_what_the_padded_run_reports(d, 0),
    "BatchFeature.to": lambda d: test_prepare_input.test_batch_feature_casts_floating_data_alone(),
    "BatchEncoding.to": lambda d: test_prepare_input.test_batch_encoding_keeps_and_moves_packs(),
    "pad_across_processes": lambda d: test_evaluate.test_preprocessed_logits_are_rectangles(d),
}


#: What is patched on the versions installed; tests/test_drift.py holds the states to this.
APPLIED = [patch for patch in PATCHES if state_here(patch) == "applied"]


@pytest.mark.parametrize("patch", APPLIED, ids=lambda patch: patch.path)
def test_without_it_something_goes_wrong(tmp_path, patch, monkeypatch):
    check = NEEDED_BY[patch.path]
    check(tmp_path)
    off = property(lambda self: self is not patch, lambda self, value: None)
    monkeypatch.setattr(type(patch), "active", off, raising=False)
    with pytest.raises(Exception):  # noqa: B017, PT011 (a crash of any kind, or a wrong number)
        check(tmp_path)


def test_every_patch_has_a_check():
    assert set(NEEDED_BY) == {patch.path for patch in PATCHES}
