"""``Seq2SeqTrainer``: the loss of the packed batch, generation from padded tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers import GenerationConfig, Seq2SeqTrainer

from hf_packfix.packing import packed as packing
from hf_packfix.patches.transformers_trainer_seq2seq import _for_generation
from tests.support.oracle import (
    Classifier,
    OracleConfig,
    Tagger,
    assert_training_equals_padded,
    new_model,
    new_trainer,
    packed_batch,
    padded_batch,
    rows,
    stock,
)
from tests.support.patched import patch_of
from tests.support.reports import assert_evaluation_equals_padded, assert_same_report, assert_same_tree, report

PAD = 16


class Generating(Tagger):
    """A tagger that "generates" each prompt backwards, and keeps what it was given."""

    def __init__(self, config: OracleConfig) -> None:
        super().__init__(config)
        self.generation_config = GenerationConfig(max_length=12)
        self.prompts: list[dict[str, Any]] = []
        self.fed: list[type] = []

    def forward(self, input_ids=None, labels=None, attention_mask=None, **kwargs):
        self.fed.append(type(input_ids))
        return super().forward(input_ids, labels, attention_mask, **kwargs)

    def generate(self, input_ids=None, attention_mask=None, **kwargs):
        self.prompts.append({"input_ids": input_ids, "attention_mask": attention_mask, **kwargs})
        backwards = [ids[mask.bool()].flip(0) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(backwards, batch_first=True, padding_value=PAD)


def seq2seq(directory, model, data, **changes):
    return new_trainer(directory, model, data, packed_batch, trainer=Seq2SeqTrainer, **changes)


def model_with(is_encoder_decoder: bool = True) -> Generating:
    torch.manual_seed(0)
    return Generating(OracleConfig(is_encoder_decoder=is_encoder_decoder, pad_token_id=PAD))


def test_training_and_the_loss_equal_the_padded_run(tmp_path):
    for model, labels in ((Tagger, "tokens"), (Classifier, "row")):
        assert_training_equals_padded(tmp_path, model, rows(labels=labels), trainer=Seq2SeqTrainer)
    assert_evaluation_equals_padded(tmp_path, Tagger, rows(), trainer=Seq2SeqTrainer)


@pytest.mark.needs_patch("transformers.trainer_seq2seq:Seq2SeqTrainer.prediction_step")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_generation_reports_what_the_padded_run_reports(tmp_path, smoothing):
    data = rows()
    metric = {"options": {"compute_metrics": lambda p: {"mean": float(p.predictions.mean() + p.label_ids.mean())}}}
    kwargs = {"trainer": Seq2SeqTrainer, "predict_with_generate": True, "label_smoothing_factor": smoothing, **metric}
    packed, padded = model_with(), model_with()
    found = report(tmp_path, packed, packed_batch, data, **kwargs)
    with stock():
        expected = report(tmp_path, padded, padded_batch, data, **kwargs)
    assert_same_report(found, expected)
    assert found[2].predictions.shape == found[2].label_ids.shape == (14, 12)  # padded to max_length
    batches = 2 * 5  # evaluate and predict
    assert len(packed.prompts) == len(packed.fed) == batches
    assert set(packed.fed) == {PackedSequence}  # the loss is that of the packed batch
    for ours, theirs in zip(packed.prompts, padded.prompts, strict=True):
        real = theirs["attention_mask"].bool()
        assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
        assert torch.equal(ours["input_ids"][real], theirs["input_ids"][real])
        assert (ours["input_ids"][~real] == PAD).all()
        assert_same_tree(ours["labels"], theirs["labels"])


def test_a_decoder_only_model_gets_its_prompts_padded_on_the_left(tmp_path):
    data = rows(5)
    model = model_with(is_encoder_decoder=False)
    trainer = seq2seq(tmp_path, model, data, predict_with_generate=True)
    loss, tokens, labels = trainer.prediction_step(model, packed_batch(data), prediction_loss_only=False)
    (prompt,) = model.prompts
    for row, ids, mask in zip(data, prompt["input_ids"], prompt["attention_mask"], strict=True):
        length = len(row["input_ids"])
        assert ids[9 - length :].tolist() == row["input_ids"].tolist()
        assert (ids[: 9 - length] == PAD).all()
        assert mask.tolist() == [0] * (9 - length) + [1] * length
    assert tokens.shape == labels.shape == (5, 12)
    assert labels[0, 0] == data[0]["labels"][0]  # labels keep their place on the left
    plain = new_model(Tagger)
    plain.load_state_dict(model.state_dict())
    assert loss.item() == pytest.approx(plain(**padded_batch(data)).loss.item(), rel=1e-5)


def test_a_mask_of_the_batch_is_kept(tmp_path):
    data = rows(4)
    model = model_with()
    trainer = seq2seq(tmp_path, model, data, predict_with_generate=True)
    masked = packed_batch([{**row, "attention_mask": (row["input_ids"] > 3).long()} for row in data])
    trainer.prediction_step(model, masked, prediction_loss_only=False)
    expected = torch.nn.utils.rnn.pad_sequence([(row["input_ids"] > 3).long() for row in data], batch_first=True)
    assert torch.equal(model.prompts[0]["attention_mask"], expected)


def test_a_model_that_says_nothing_of_itself_continues_its_prompts():
    # No encoder that is known of, and no padding token.
    packed = pack_sequence([torch.tensor([5]), torch.tensor([7, 8])], enforce_sorted=False)
    for model in (SimpleNamespace(), SimpleNamespace(config=SimpleNamespace())):
        given = _for_generation(model, {"input_ids": packed, "labels": packed, "types": packed, "w": torch.ones(2)})
        assert list(given) == ["input_ids", "labels", "types", "w", "attention_mask"]
        assert given["input_ids"].tolist() == given["types"].tolist() == [[0, 5], [7, 8]]
        assert given["attention_mask"].tolist() == [[0, 1], [1, 1]]
        assert given["labels"].tolist() == [[5, -100], [7, 8]]


def test_the_mask_of_features_has_one_number_a_step():
    features = pack_sequence([torch.rand(1, 5), torch.rand(2, 5)], enforce_sorted=False)
    given = _for_generation(SimpleNamespace(main_input_name="features"), {"features": features})
    assert torch.equal(given["features"], packing.pad_left(features))
    assert given["attention_mask"].tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize(("collate", "loss_only"), [(padded_batch, False), (packed_batch, True), (padded_batch, True)])
def test_a_step_without_generation_or_packed_sequences_is_the_original_s_alone(collate, loss_only):
    patch = patch_of("transformers.trainer_seq2seq:Seq2SeqTrainer.prediction_step")
    given = []
    arguments = SimpleNamespace(predict_with_generate=True)
    trainer = SimpleNamespace(args=arguments, model=torch.nn.Linear(1, 1), label_smoother=None)
    arguments = (trainer, trainer.model, collate(rows(3)), loss_only)
    patch.make(lambda *args: given.append(args), patch)(*arguments)
    ((*found,),) = given
    assert all(ours is theirs for ours, theirs in zip(found, arguments, strict=True))


def test_rows_without_labels_are_generated_from(tmp_path):
    data = [{"input_ids": row["input_ids"]} for row in rows(4)]
    model = model_with()
    trainer = seq2seq(tmp_path, model, data, predict_with_generate=True)
    prediction = trainer.predict(data)
    assert prediction.label_ids is None
    assert prediction.predictions.shape == (4, 12)
    assert model.fed == []  # no loss, no forward
