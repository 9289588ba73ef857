"""Switch one patch off at a time: something the tests hold to be right must go wrong.

A patch that nothing needs is a patch too many, and an oracle that does not notice it is gone is no oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import transformers.trainer_pt_utils as pt_utils
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_concat, nested_numpify, nested_truncate

from hf_packfix.patches import PATCHES, Patch, revert
from hf_packfix.ragged import Pieces
from tests import (
    test_distributed,
    test_evaluate,
    test_label_names,
    test_models,
    test_prepare_input,
    test_ragged,
    test_seq2seq,
    test_train,
)
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


def labels_under_another_name(directory: Any) -> None:
    test_label_names.test_the_target_is_named_and_the_advice_gives_the_loss(
        directory, test_label_names.OtherNames, "targets", "tokens", metrics=False
    )


def truncated(labels: Any) -> Any:
    return nested_numpify(nested_truncate(labels, 2))


def alone(value: Any) -> Any:
    return value


def cast_to_half() -> None:
    from torch.distributed.utils import _apply_to_tensors

    pack = test_distributed.two_packs()[2]
    features = pack._replace(data=pack.data.float())
    cast, again = _apply_to_tensors(lambda data: data.half(), [features, {"x": features.data}])
    assert torch.equal(cast.data, again["x"])
    assert cast.data.dtype == torch.float16


def kept_flat() -> None:
    trees = [test_ragged.rectangles(tree) for tree in test_ragged.batches()]
    container = pt_utils.EvalLoopContainer()
    # On a GPU this frees memory; here, it is asked for at all.
    with mock.patch.object(Pieces, "to_cpu", autospec=True) as to_cpu:
        for tree in trees:
            container.add(tree)
            container.to_cpu_and_numpy()
            assert container.tensors is container.arrays is None
    assert to_cpu.call_count == len(trees)
    assert container.get_arrays()[0].shape == (11, 7, 2)


def broadcast_without_indices() -> None:
    """Let a stand-in for the process group notice what is sent: data and layout, never a missing index."""
    from accelerate.utils import DistributedType, operations

    sent = []
    state = mock.Mock(distributed_type=DistributedType.MULTI_CPU, debug=False)
    data = rows(3)
    pack = torch.nn.utils.rnn.pack_sequence(sorted((row["input_ids"] for row in data), key=len, reverse=True))
    with (
        mock.patch.object(operations, "PartialState", return_value=state),
        mock.patch("torch.distributed.broadcast", lambda tensor, src: sent.append(tensor.clone())),
    ):
        same = operations.broadcast({"x": pack})["x"]
    assert [len(tensor) for tensor in sent] == [len(pack.data), len(pack.batch_sizes)]
    assert torch.equal(same.data, pack.data)


#: What goes wrong without each patch: a check that passes with all of them on.
NEEDED_BY: dict[str, Callable[[Any], None]] = {
    "Trainer._prepare_input": same_training,
    "Trainer.floating_point_ops": same_training,
    "Trainer._track_num_input_tokens": input_tokens,
    "Trainer._get_num_items_in_batch": lambda d: test_train.test_gradient_accumulation_with_a_loss_function(
        d, Tagger, 3
    ),
    "Trainer.get_batch_samples": input_tokens,
    "Trainer.compute_loss": lambda d: test_models.test_label_smoothing_smooths_the_next_token(d, "left", 2),
    "Trainer.evaluation_loop": labels_under_another_name,
    "Trainer.prediction_step": labels_under_another_name,
    "LabelSmoother.__call__": lambda d: test_train.test_label_smoothing(d, 1),
    "nested_detach": lambda d: test_evaluate.compare(d, Tagger, rows()),
    "nested_concat": same_labels(lambda labels: nested_concat(labels, labels, padding_index=-100)),
    "nested_numpify": same_labels(nested_numpify),
    "nested_truncate": same_labels(truncated),
    "EvalLoopContainer.add": lambda d: kept_flat(),
    "find_batch_size": test_evaluate.test_number_of_samples_of_a_data_set_without_a_length,
    "EvalPrediction.__init__": same_labels(lambda labels: EvalPrediction(labels, labels).label_ids),
    "Seq2SeqTrainer.prediction_step": lambda d: test_seq2seq.test_generation_reports_what_the_padded_run_reports(d, 0),
    "BatchFeature.to": lambda d: test_prepare_input.test_batch_feature_casts_floating_data_alone(),
    "BatchEncoding.to": lambda d: test_prepare_input.test_batch_encoding_keeps_and_moves_packs(),
    "find_batch_size (accelerate)": lambda d: test_distributed.test_operations(alone),
    "slice_tensors": lambda d: test_distributed.test_operations(alone),
    "concatenate": lambda d: test_distributed.test_operations(alone),
    "get_data_structure": lambda d: test_distributed.test_operations(alone),
    "initialize_tensors": lambda d: test_distributed.test_operations(alone),
    "gather": lambda d: test_distributed.test_operations(alone),
    "get_shape": lambda d: test_distributed.test_operations(alone),
    "broadcast": lambda d: broadcast_without_indices(),
    "Accelerator.gather_for_metrics": lambda d: (
        test_distributed.test_gather_for_metrics_cuts_the_last_batch_by_sequence()
    ),
    "_apply_to_tensors": lambda d: cast_to_half(),
    "pad_across_processes": lambda d: test_evaluate.test_preprocessed_logits_are_rectangles(d),
}


def name_of(patch: Patch) -> str:
    """Return the path of a patch; two modules have a ``find_batch_size``."""
    twin = patch.target == "accelerate.utils.operations:find_batch_size"
    return f"{patch.path} (accelerate)" if twin else patch.path


#: What is patched on the versions installed; tests/test_drift.py holds the states to this.
APPLIED = [patch for patch in PATCHES if state_here(patch) == "applied"]


@pytest.mark.parametrize("patch", APPLIED, ids=name_of)
def test_without_it_something_goes_wrong(tmp_path, patch, monkeypatch):
    check = NEEDED_BY[name_of(patch)]
    check(tmp_path)
    off = property(lambda self: self is not patch, lambda self, value: None)
    monkeypatch.setattr(type(patch), "active", off, raising=False)
    revert([patch])
    with pytest.raises(Exception):  # noqa: B017, PT011 (a crash of any kind, or a wrong number)
        check(tmp_path)


def test_every_patch_has_a_check():
    assert set(NEEDED_BY) == set(map(name_of, PATCHES))
