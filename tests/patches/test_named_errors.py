"""Errors in a batch name the key or the position; batches that cannot be joined, the batch as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.utils import operations
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers import Trainer
from transformers.trainer_pt_utils import EvalLoopContainer, find_batch_size, nested_concat

from hf_packfix import evaluation
from hf_packfix.packing import jagged, trees
from tests.support.oracle import PlainTagger, Row, new_trainer, packed_batch, rows, stock
from tests.support.packed_sequences import Pair

INCONSISTENT = "in the batch: this PackedSequence is inconsistent: its batch_sizes sum to"


def inconsistent(packed: PackedSequence) -> PackedSequence:
    return packed._replace(data=packed.data[:-1])


# --- batches that are lists or tuples ---------------------------------------------------------------------


class OfPositions(Trainer):
    """Takes batches without keys."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(inputs[0], inputs[1])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def prediction_step(self, model, inputs, prediction_loss_only, **kwargs):
        return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


@pytest.mark.parametrize("run", ["train", "evaluate"])
@pytest.mark.parametrize("spoilt", [0, 1])
@pytest.mark.parametrize("kind", [list, tuple])
def test_a_position_is_named(tmp_path, kind, spoilt, run):
    def collate(features: list[Row]) -> Any:
        values = list(packed_batch(features).values())
        values[spoilt] = inconsistent(values[spoilt])
        return kind(values)

    trainer = new_trainer(tmp_path, PlainTagger, rows(3), collate, trainer=OfPositions)
    with pytest.raises(ValueError, match=f"^position {spoilt} {INCONSISTENT}"):
        getattr(trainer, run)()


def test_what_is_named_in_other_batches():
    packed = packed_batch(rows(3))["input_ids"]
    for batch, name in (
        ([packed, inconsistent(packed)], "position 1"),
        ((1, [{"deep": inconsistent(packed)}]), "position 1"),
        (Pair(packed, inconsistent(packed)), "'second'"),
        ({"x": packed, "y": [inconsistent(packed)]}, "'y'"),
        ({"x": packed, 3: (inconsistent(packed),)}, "3"),
    ):
        with pytest.raises(ValueError, match=f"^{name} {INCONSISTENT}"):
            trees.check_batch(batch)
    for find in (find_batch_size, operations.find_batch_size):
        for batch, name in (
            ({"x": inconsistent(packed)}, "'x'"),
            ([inconsistent(packed)], "position 0"),
            ({"outer": [{"inner": inconsistent(packed)}]}, "'outer'"),
        ):
            with pytest.raises(ValueError, match=f"^{name} {INCONSISTENT}"):
                find(batch)


# --- steps of another shape ------------------------------------------------------------------------------


def widths(features: list[Row], width: int) -> PackedSequence:
    return pack_sequence([row["input_ids"].float()[:, None].expand(-1, width) for row in features], False)


class Wide(nn.Module):
    """Returns logits, and takes labels, of as many features a step as the batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Any, labels: Any = None, more: Any = None) -> Any:
        logits = x._replace(data=x.data * self.weight)
        if more is None:
            return {"loss": logits.data.mean(), "logits": logits}
        return {"loss": logits.data.mean(), "logits": logits, "more": more._replace(data=more.data * 2)}


def varying(keys: dict[str, list[int]]) -> Any:
    """Return a collator whose keys have these numbers of features, batch by batch."""
    number = -1

    def collate(features: list[Row]) -> Any:
        nonlocal number
        number += 1
        return {key: widths(features, sizes[number % len(sizes)]) for key, sizes in keys.items()}

    return collate


@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"x": [2, 2, 2], "labels": [3, 3, 1]},
            r"^'labels' has steps of shape \[1\] in batch 2 .* but \[3\] in batch 0",
        ),
        (
            {"x": [2, 2, 2], "labels": [1, 3, 3]},
            r"^'labels' has steps of shape \[3\] in batch 1 .* but \[1\] in batch 0",
        ),
        (
            {"x": [4, 5, 4], "labels": [1, 1, 1]},
            r"^'x' and output 'logits' of the model has steps of shape \[5\] in batch 1",
        ),
        (
            {"x": [4, 4, 4], "labels": [1, 1, 1], "more": [2, 3, 2]},
            r"^'more' and output 'more' of the model has steps of shape \[3\] in batch 1",
        ),
    ],
)
def test_an_evaluation_names_key_and_batch(tmp_path, keys, message, metrics):
    options = {"compute_metrics": lambda p: {"n": len(p.label_ids)}} if metrics else {}
    data = rows(9)
    trainer = new_trainer(tmp_path, Wide, data, varying(keys), options=options, remove_unused_columns=False)
    with pytest.raises(ValueError, match=message):
        trainer.predict(data)


def test_an_evaluation_without_arrays_takes_steps_of_any_shape(tmp_path):
    keys = {"x": [4, 5, 6], "labels": [1, 2, 3]}
    options = {"remove_unused_columns": False, "prediction_loss_only": True}
    trainer = new_trainer(tmp_path, Wide, rows(9), varying(keys), **options)
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_container_of_a_loop_without_prediction_steps_names_what_it_can():
    first, other = widths(rows(3), 2), widths(rows(3), 1)
    for wrap in (lambda packed: packed, lambda packed: (packed, packed), lambda packed: {"logits": packed}):
        with evaluation.running(evaluation.Loop(packed=True)):
            container = EvalLoopContainer()
            container.add(wrap(first))
            with pytest.raises(ValueError, match=r"^number 0 of what .* has steps of shape \[1\] in batch 1 of"):
                container.add(wrap(other))


def test_concatenation_names_key_and_batch():
    wide, narrow = widths(rows(3), 2), widths(rows(3), 1)
    with pytest.raises(ValueError, match=r"number 0 have \[2\], those of number 2 have \[1\]"):
        jagged.concatenate([wide, wide, narrow])
    with pytest.raises(ValueError, match=r"those of a batch have \[1\], those before it \[2\]"):
        nested_concat(wide, narrow)
    for batches, name in (
        ([{"x": wide, "y": wide}, {"x": wide, "y": narrow}], "'y'"),
        ([{"x": wide, "y": [{"z": wide}]}, {"x": wide, "y": [{"z": narrow}]}], "'y'"),
        ([(wide, wide), (wide, narrow)], "position 1"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} has steps of shape \[1\] in batch 1, but \[2\] in batch 0"):
            operations.concatenate(batches)
    with pytest.raises(ValueError, match=f"^'y' {INCONSISTENT}"):
        operations.concatenate([{"x": wide, "y": wide}, {"x": wide, "y": inconsistent(wide)}])


def test_upstream_would_repeat_a_dimension_of_size_one():
    # Why it is an error of ours: padded tensors of two lengths take this way without a word.
    with stock():
        joined = nested_concat(torch.zeros(1, 2, 3), torch.ones(1, 4, 1))
    assert joined[1].tolist() == torch.ones(4, 3).tolist()
