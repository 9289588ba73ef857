"""Training on packed batches equals training on the same rows padded and masked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence
from transformers import BatchEncoding, BatchFeature

from tests.support import oracle
from tests.support.oracle import (
    Classifier,
    PlainClassifier,
    PlainTagger,
    Tagger,
    assert_same_run,
    assert_training_equals_padded,
    by_length,
    count_items,
    packed_batch,
    padded_batch,
    rows,
    sorted_packed_batch,
    stock,
    train,
    transformers_from,
)

COUNTS_ITEMS = pytest.mark.needs_patch("transformers.trainer:Trainer._get_num_items_in_batch")
MODELS = [(Classifier, "row"), (PlainClassifier, "row"), (Tagger, "tokens"), (PlainTagger, "tokens")]


@pytest.mark.needs_patch("transformers.trainer:Trainer._prepare_input")
@pytest.mark.parametrize(("model", "labels"), MODELS)
def test_every_step_equals_the_padded_run(tmp_path, model, labels):
    assert_training_equals_padded(tmp_path, model, rows(labels=labels))


BATCHES: dict[str, dict[str, Any]] = {
    "a BatchEncoding": {"packed": lambda features: BatchEncoding(packed_batch(features))},
    "a BatchFeature": {"packed": lambda features: BatchFeature(packed_batch(features))},
    "sorted, without index tensors": {"packed": by_length(sorted_packed_batch), "padded": by_length(padded_batch)},
    "from data loader workers": {"only_packed": {"dataloader_num_workers": 2}},
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_every_kind_train_as_padded_ones(tmp_path, kind):
    assert_training_equals_padded(tmp_path, Tagger, rows(), **BATCHES[kind])


def test_a_resumed_training_ends_where_a_whole_one_does(tmp_path, monkeypatch):
    if not transformers_from("4.47"):
        # It loads the state of NumPy's generator as torch before 2.6 allowed by default.
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    whole = train(tmp_path / "packed", Tagger, rows(), packed_batch, **options)
    resumed = train(
        tmp_path / "packed", Tagger, rows(), packed_batch, resume=str(tmp_path / "packed/checkpoint-4"), **options
    )
    with stock():
        padded = train(tmp_path / "padded", Tagger, rows(), padded_batch, **options)
    assert len(resumed.losses) == len(whole.losses)
    assert_same_run(resumed, padded)


# --- gradient accumulation ------------------------------------------------------------------------------


def sum_of_losses(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    """A ``compute_loss_func`` as users write it: the sum over the items, divided by their number."""
    logits = outputs["logits"]
    if isinstance(logits, PackedSequence):
        logits, labels = logits.data, labels.data
    else:
        logits, labels = logits.flatten(0, 1), labels.flatten()
    items = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / items


@pytest.mark.parametrize("steps", [1, *(pytest.param(steps, marks=COUNTS_ITEMS) for steps in (2, 3))])
@pytest.mark.parametrize("model", [Tagger, PlainTagger])
def test_gradient_accumulation_with_a_loss_function(tmp_path, model, steps):
    options = {"options": {"compute_loss_func": sum_of_losses}, "gradient_accumulation_steps": steps}
    assert_training_equals_padded(tmp_path, model, rows(), **options)


def twofold(row: Any) -> Any:
    return {**row, "labels": torch.stack([row["labels"], row["labels"].clamp(min=0)], -1)}


ITEMS = {
    "labels": (dict, False),
    "shifted labels": (dict, True),
    "two labels a step": (twofold, False),
    "labels that are shifted already": (lambda row: {**row, "shift_labels": row["labels"]}, True),
}


@pytest.mark.parametrize("kind", ITEMS)
def test_the_items_are_those_of_the_padded_batches(tmp_path, kind):
    change, shifts = ITEMS[kind]
    trainer = oracle.new_trainer(tmp_path, Tagger, rows(), packed_batch)
    trainer._loss_shifts_labels = shifts
    groups = [[change(row) for row in rows(count, seed=count)] for count in (5, 3, 1)]
    packed = count_items(trainer, [packed_batch(group) for group in groups])
    with stock():
        padded = count_items(trainer, [padded_batch(group) for group in groups])
        silent = count_items(trainer, [packed_batch(group) for group in groups])
    assert int(packed) == int(padded) > 0
    assert silent is None


def test_a_batch_of_nothing_adds_no_items(tmp_path):
    trainer = oracle.new_trainer(tmp_path, Tagger, rows(), packed_batch)
    nothing = PackedSequence(torch.ones(0).long(), torch.ones(0).long())
    alone = count_items(trainer, [packed_batch(rows(5))])
    assert int(count_items(trainer, [{"labels": nothing}, packed_batch(rows(5))])) == int(alone) > 0


@pytest.mark.needs_patch("transformers.trainer:Trainer.floating_point_ops")
def test_floating_point_operations_count_the_real_tokens(tmp_path):
    data = rows()
    run = train(tmp_path, Tagger, data, packed_batch)
    model = run.trainer.model
    tokens = sum(len(row["input_ids"]) for row in data)
    assert run.state.total_flos == 2 * 6 * tokens * model.num_parameters(exclude_embeddings=True)
    with stock():  # one row a batch has no padding, so stock counts the same
        alone = train(tmp_path, Tagger, data, padded_batch, per_device_train_batch_size=1)
    assert alone.state.total_flos == run.state.total_flos


class WatchingTagger(Tagger):
    """Keeps the types of what it is given."""

    def forward(self, input_ids=None, labels=None, attention_mask=None, **loss_kwargs):
        self.fed = {type(input_ids), type(labels)} | ({type(attention_mask)} - {type(None)})
        return super().forward(input_ids, labels, None, **loss_kwargs)


# 4.46 has one mode, which any true value selects.
@pytest.mark.needs_patch(
    "transformers.trainer:Trainer._track_num_input_tokens", "transformers.trainer:Trainer.get_batch_samples"
)
@pytest.mark.parametrize("mode", [True, "all", "non_padding"])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_tokenizer", [False, True])
@pytest.mark.parametrize("wrap", [dict, BatchEncoding])
def test_input_tokens_seen_are_the_sum_of_the_lengths(tmp_path, mode, with_mask, with_tokenizer, wrap):
    data = rows()
    if with_mask:
        data = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in data]
    tokenizer = SimpleNamespace(pad_token_id=0, model_input_names=["input_ids"], save_pretrained=None)
    options: dict[str, Any] = {"options": {"processing_class": tokenizer} if with_tokenizer else {}}
    options["include_num_input_tokens_seen"] = mode
    run = train(tmp_path, WatchingTagger, data, lambda features: wrap(packed_batch(features)), **options)
    assert run.trainer.model.fed == {PackedSequence}
    assert run.state.num_input_tokens_seen == 2 * sum(len(row["input_ids"]) for row in data)
    with stock():  # one row a batch has no padding, so stock counts the same in every mode
        alone = train(tmp_path, Tagger, rows(), padded_batch, per_device_train_batch_size=1, **options)
    assert alone.state.num_input_tokens_seen == run.state.num_input_tokens_seen
