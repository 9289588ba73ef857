"""A packed batch costs no more moves to the device than a padded one, and a training step never waits for the device.

``meta`` is the device: reading a value from a tensor there raises, as ``item()``, ``tolist()``, ``bool()``,
``nonzero()``, ``torch.equal`` and ``cpu()`` do, each of which would wait for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import operations
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

from hf_packfix import DataCollatorForPackedSequence
from hf_packfix.models import (
    RecurrentConfig,
    RecurrentEncoderDecoder,
    RecurrentEncoderDecoderConfig,
    RecurrentForCausalLM,
    RecurrentForSequenceClassification,
    RecurrentForTokenClassification,
)
from hf_packfix.packing.packed import _move_indices, move_without_waiting, same_packing, with_data
from tests.support.oracle import CLASSES, VOCABULARY, Row, Tagger, new_trainer, packed_batch, padded_batch, rows
from tests.support.packed_sequences import CPU, META, bare_trainer, some_packed

Move = Callable[[Any], Any]


def by_accelerate(batch: Any) -> Any:
    return operations.send_to_device(batch, META)


def by_trainer(batch: Any) -> Any:
    return bare_trainer(META)._prepare_input(batch)


class Moves(TorchDispatchMode):
    """Counts the tensors that move to another device."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") not in (None, args[0].device):
            self.count += 1
        return function(*args, **(kwargs or {}))


def moves(function: Callable[[], Any]) -> int:
    with Moves() as counted:
        function()
    return counted.count


def through_a_worker(batch: Any) -> Any:
    """Return the batch with tensors of their own in every key, as other collators make them, and pinned memory."""
    return {
        key: PackedSequence(*(None if field is None else field.clone() for field in value))
        for key, value in batch.items()
    }


@pytest.mark.needs_patch("accelerate.utils.operations:send_to_device")
@pytest.mark.parametrize("wrap", [lambda batch: batch, through_a_worker], ids=["as collated", "copied"])
@pytest.mark.parametrize("collate", [DataCollatorForPackedSequence(), packed_batch], ids=["ours", "theirs"])
def test_accelerate_moves_no_more_tensors_than_of_a_padded_batch(collate, wrap):
    packed, padded = wrap(collate(rows(5))), padded_batch(rows(5))
    # There is no mask: the index tensors of both keys take its place.
    assert moves(lambda: by_accelerate(packed)) <= moves(lambda: by_accelerate(padded)) == 3


def test_the_trainer_moves_no_more_tensors_than_of_a_padded_batch():
    packed, padded = packed_batch(rows(6)), padded_batch(rows(6))
    assert moves(lambda: by_trainer(packed)) <= moves(lambda: by_trainer(padded)) == 3
    there = by_accelerate(packed)
    assert moves(lambda: by_trainer(there)) == 0


@pytest.mark.needs_patch("accelerate.utils.operations:send_to_device")
@pytest.mark.parametrize("copied", [False, True])
def test_keys_with_the_same_lengths_share_their_index_tensors(copied):
    batch = DataCollatorForPackedSequence()(rows(5))
    first, second = batch["input_ids"], batch["labels"]
    assert first.batch_sizes is second.batch_sizes
    assert first.sorted_indices is second.sorted_indices
    assert first.unsorted_indices is second.unsorted_indices
    moved = by_accelerate(through_a_worker(batch) if copied else batch)
    assert moved["input_ids"].sorted_indices is moved["labels"].sorted_indices
    assert moved["input_ids"].unsorted_indices is moved["labels"].unsorted_indices
    assert same_packing(moved["input_ids"], moved["labels"])  # which raises if it looks at them


def test_other_lengths_have_other_index_tensors():
    batch = DataCollatorForPackedSequence()([{"a": [1, 2], "b": [3]}, {"a": [4], "b": [5, 6]}])
    moved = by_accelerate(batch)
    assert moved["a"].sorted_indices is not moved["b"].sorted_indices
    for value in batch.values():
        assert value.sorted_indices.device.type == "cpu"
        there = with_data(value, torch.empty_like(value.data, device="meta"))
        assert there.sorted_indices is with_data(value, there.data).sorted_indices


def test_index_tensors_that_were_changed_are_not_used_again():
    packed = some_packed()
    moved = by_trainer(packed)
    moved.sorted_indices.add_(1)
    assert by_trainer(packed).sorted_indices is not moved.sorted_indices
    moved = by_trainer(packed)
    packed.sorted_indices.copy_(torch.tensor([0, 1, 2]))
    packed.unsorted_indices.copy_(torch.tensor([0, 1, 2]))
    assert by_trainer(packed).sorted_indices is not moved.sorted_indices


def test_what_inference_mode_moved_is_not_used_in_training():
    packed = some_packed()
    with torch.inference_mode():
        by_trainer(packed)
    moved = by_trainer(packed)
    assert not moved.sorted_indices.is_inference()
    with torch.inference_mode():
        assert by_trainer(packed).sorted_indices is not moved.sorted_indices


def test_keys_that_accelerate_is_to_skip_stay_where_they_are():
    packed = some_packed()
    moved = operations.send_to_device({"a": packed, "b": [packed]}, META, skip_keys="a")
    assert moved["a"] is packed
    assert moved["b"][0].data.device == META


def test_index_tensors_keep_their_values():
    batch = packed_batch(rows(5))["labels"]
    for _ in range(2):
        there, back = _move_indices(batch.sorted_indices, batch.unsorted_indices, CPU)
        assert torch.equal(there, batch.sorted_indices)
        assert torch.equal(back, batch.unsorted_indices)
    assert by_accelerate([some_packed(sort=True)])[0].sorted_indices is None
    wrong = batch._replace(sorted_indices=batch.sorted_indices.int(), unsorted_indices=batch.unsorted_indices.int())
    assert by_accelerate(wrong).sorted_indices.dtype == torch.int32  # which a check finds


def test_a_gpu_copies_from_pinned_memory_while_the_program_goes_on(monkeypatch):
    calls: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: calls.append((args, kwargs)))
    gpu = torch.device("cuda", 0)
    move_without_waiting(torch.ones(2), gpu)
    assert calls == ["pinned", ((gpu,), {"non_blocking": True})]
    move_without_waiting(torch.ones(2), META)
    assert calls[2:] == [((META,), {})]


# --- a training step ------------------------------------------------------------------------------------


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 8, "pad_token_id": 0}


def encoder_decoder() -> nn.Module:
    return RecurrentEncoderDecoder(RecurrentEncoderDecoderConfig("lstm", **SIZES, eos_token_id=1, bos_token_id=2))


def new_model(kind: Any) -> nn.Module:
    if kind is encoder_decoder:
        return encoder_decoder()
    if kind is Tagger:
        return Tagger(Tagger.config_class())
    bidirectional = kind is RecurrentForTokenClassification
    return kind(RecurrentConfig("gru", **SIZES, num_labels=CLASSES, bidirectional=bidirectional))


@pytest.fixture
def a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], Any]]:
    """Return a function that returns what a Trainer does in a step with a batch that is on the device already."""

    def prepare(kind: Any, batch: Any, **changes: Any) -> Callable[[], Any]:
        trainer = new_trainer(tmp_path, Tagger, rows(), packed_batch, **changes)
        monkeypatch.setattr("transformers.TrainingArguments.device", META)
        trainer.model = model = new_model(kind).to(META).train()

        def step() -> None:
            items = None
            if hasattr(trainer, "_get_num_items_in_batch"):
                items = trainer._get_num_items_in_batch([batch], META)
            loss = trainer.compute_loss(model, trainer._prepare_inputs(batch), num_items_in_batch=items)
            trainer.floating_point_ops(batch)
            loss.backward()

        return step

    return prepare


OURS = [RecurrentForTokenClassification, RecurrentForSequenceClassification, RecurrentForCausalLM, encoder_decoder]
SMOOTHED = [(Tagger, 0.1), (RecurrentForTokenClassification, 0.1)]


@pytest.mark.parametrize(("kind", "smoothing"), [*((kind, 0.0) for kind in (Tagger, *OURS)), *SMOOTHED])
@pytest.mark.parametrize("collate", [DataCollatorForPackedSequence(), packed_batch], ids=["ours", "theirs"])
def test_a_training_step_reads_nothing_from_the_device(a_step, kind, collate, smoothing):
    data: list[Row] = rows(6, labels="row" if kind is RecurrentForSequenceClassification else "tokens")
    step = a_step(kind, by_accelerate(collate(data)), label_smoothing_factor=smoothing)
    # A language model looks up the steps before, also to count labels; their places come from the CPU without waiting.
    assert moves(step) <= {RecurrentForCausalLM: 2, encoder_decoder: 1}.get(kind, 0)


def test_these_steps_notice_what_reads_from_the_device(a_step):
    batch = by_accelerate(packed_batch(rows(6)))
    labels = batch["labels"]
    batch["labels"] = labels._replace(sorted_indices=labels.sorted_indices.clone())
    with pytest.raises((NotImplementedError, RuntimeError), match="Meta"):
        a_step(RecurrentForTokenClassification, batch)()
