"""The patches that only older releases need, around stand-ins for what those releases had, on any version."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence
from transformers import BatchEncoding, BatchFeature

from hf_packfix.patches.transformers_trainer import _countable_packed_sequence
from tests.support.oracle import packed_batch, padded_batch, rows
from tests.support.packed_sequences import CPU, META, bare_trainer, some_packed
from tests.support.patched import patch_of


def counting_inline(self: Any, epoch_iterator: Any, num_batches: int) -> Any:
    """Count items as ``Trainer.get_batch_samples`` of 4.46 to 4.56 does."""
    batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
    return batches, sum(batch["labels"].ne(-100).sum() for batch in batches)


def tokens_counted_inline(trainer: Any, inputs: Any, pad_token_id: int | None) -> int:
    """Count tokens as ``Trainer._inner_training_loop`` up to 5.2 does."""
    if trainer.args.include_num_input_tokens_seen != "non_padding":
        return inputs["input_ids"].numel()
    if "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    return inputs["input_ids"].numel() if pad_token_id is None else int((inputs["input_ids"] != pad_token_id).sum())


def old_trainer(mode: Any) -> Any:
    args = SimpleNamespace(include_num_input_tokens_seen=mode)
    return SimpleNamespace(args=args, model=torch.nn.Linear(1, 1), compute_loss_func=None)


@pytest.fixture
def wrapped(monkeypatch):
    patch = patch_of("transformers.trainer:Trainer.get_batch_samples")
    monkeypatch.setattr(patch, "active", True)
    # From 4.57 on a method of its own counts, and has its own patch.
    monkeypatch.setattr(patch_of("transformers.trainer:Trainer._get_num_items_in_batch"), "active", False)
    return patch.make(counting_inline, patch)


def test_items_are_those_of_the_padded_tensors(wrapped):
    batches = [packed_batch(rows(4)), packed_batch(rows(2, seed=1)), {"labels": torch.tensor([1, -100])}, object()]
    iterator = iter(batches)
    samples, items = wrapped(old_trainer("no"), iterator, 3)
    assert list(map(id, samples)) == list(map(id, batches[:3]))
    padded = [padded_batch(rows(4)), padded_batch(rows(2, seed=1)), batches[2]]
    assert items == counting_inline(None, iter(padded), 3)[1] > 0
    assert next(iterator) is batches[3]  # not one batch more was taken


@pytest.mark.parametrize("mode", [True, "all", "non_padding"])
@pytest.mark.parametrize("pad_token_id", [None, 0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [dict, OrderedDict, BatchEncoding])
def test_the_loop_counts_real_tokens(wrapped, mode, pad_token_id, masked, kind):
    data = rows(5)
    if masked:
        data = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in data]
    batch = kind(packed_batch(data))
    trainer = old_trainer(mode)
    (sample,), _ = wrapped(trainer, iter([batch]), 1)
    assert type(sample) is kind
    assert tokens_counted_inline(trainer, sample, pad_token_id) == sum(len(row["input_ids"]) for row in data)
    assert type(batch["input_ids"]) is PackedSequence  # the collator's own batch is left alone
    moved = bare_trainer()._prepare_input(sample)
    assert {type(value) for value in moved.values()} == {PackedSequence}


def test_what_needs_no_counting_comes_back_as_it_is(wrapped):
    for batch in (padded_batch(rows(2)), {"x": some_packed(), "labels": torch.ones(2)}):
        (sample,), _ = wrapped(old_trainer("all"), iter([batch]), 1)
        assert sample is batch


def test_a_countable_packed_sequence_is_a_packed_sequence():
    packed, kind = some_packed(), _countable_packed_sequence()
    countable = kind._make(packed)
    assert isinstance(countable, PackedSequence)
    assert all(left is right for left, right in zip(countable, packed, strict=True))
    assert (countable.numel(), int(countable.sum()), int((countable != 7).sum())) == (6, 6, 6)
    assert (countable != 7).dtype == (packed.data != 7).dtype  # a mask
    assert countable != "text"
    assert (countable != kind._make(packed)) is False  # as tuples are, of the same fields
    trainer = bare_trainer()
    assert type(trainer._prepare_input(countable)) is PackedSequence
    assert torch.nn.GRU(2, 3)(countable)[0].data.shape == (6, 3)
    for same in (copy.deepcopy(countable), pickle.loads(pickle.dumps(countable))):
        assert type(same) is PackedSequence
        assert torch.equal(same.data, packed.data)


def test_a_batch_type_that_drops_what_is_no_tensor_keeps_packed_sequences(monkeypatch):
    def dropping(self: Any, device: Any) -> Any:  # as `BatchEncoding.to` of 4.46
        self.data = {key: value.to(device) for key, value in self.data.items() if isinstance(value, torch.Tensor)}
        return self

    patch = patch_of("transformers.tokenization_utils_base:BatchEncoding.to")
    monkeypatch.setattr(patch, "active", True)
    held = {"x": some_packed(), "note": "dropped upstream", "y": torch.ones(2), "several": [some_packed(), "kept"]}
    moved = patch.make(dropping, patch)(BatchEncoding(held), META)
    assert list(moved) == ["x", "note", "y", "several"]
    assert moved["x"].data.device == moved["several"][0].sorted_indices.device == moved["y"].device == META
    assert moved["x"].batch_sizes.device == CPU
    assert moved["several"][1] == "kept"


@pytest.mark.parametrize("kind", [BatchEncoding, BatchFeature])
def test_a_batch_that_cannot_move_stays_whole(kind):
    class Immovable(torch.Tensor):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no room")

    held = {"x": some_packed(), "y": torch.ones(2).as_subclass(Immovable), "z": torch.ones(1)}
    batch = kind(held)
    with pytest.raises(RuntimeError, match="no room"):
        batch.to("meta")
    assert {key: batch[key] is value for key, value in held.items()} == {"x": True, "y": True, "z": True}
