"""The recurrent encoder-decoder: training in every layout, and generation."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import PackedSequence
from transformers import Seq2SeqTrainer

from hf_packfix.models import RecurrentEncoderDecoder, RecurrentEncoderDecoderConfig
from hf_packfix.models.upstream import CACHE_NAME
from tests.support.layouts import (
    CELLS,
    LAYOUTS,
    arrange,
    assert_first_step,
    assert_same_step,
    new_model,
    run,
    smoothed,
    tokens,
)
from tests.support.oracle import assert_training_equals_padded, new_trainer, packed_batch, stock, train

PAD, BOS, EOS, H = 0, 1, 2, 6
SOURCES, TARGETS = tokens((3, 7, 1, 5), low=3), tokens((4, 2, 6, 1), seed=1, low=3)
TARGETS[2][3] = -100


def build(*args, **changes):
    return new_model(RecurrentEncoderDecoder, *args, **changes)


def decode(model, source, target):
    """Return the logits ``[T, V]`` at every step of one target, computed cell by cell."""
    _, finals = run(model.encoder.rnn, model.encoder.embeddings.weight[source])
    last = finals[-2:].flatten() if model.config.bidirectional else finals[-1]
    states = torch.tanh(model.bridge.weight @ last + model.bridge.bias).reshape(-1, H)
    layers = model.config.num_hidden_layers
    start = (states[:layers], states[layers:]) if model.config.cell_type == "lstm" else (states, None)
    return run(model.decoder.rnn, model.decoder.embeddings.weight[target], start)[0] @ model.lm_head.weight.T


def teach(model, source, labels):
    """Return the logits ``[T, V]`` that predict labels, each from those before it."""
    read = torch.cat([torch.tensor([BOS]), labels[:-1]])
    return decode(model, source, read.where(read != -100, PAD))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("items", [None, 31])
def test_loss_and_logits_equal_a_loop_over_steps(cell, layers, bidirectional, layout, items):
    model = build(cell, layers, bidirectional=bidirectional)
    inputs, mask = arrange(layout, SOURCES)
    labels, real = arrange("packed" if layout == "packed" else "right", TARGETS, fill=-100)
    output = model(inputs, mask, labels=labels, num_items_in_batch=items)
    logits = [teach(model, source, target) for source, target in zip(SOURCES, TARGETS, strict=True)]
    loss = cross_entropy(torch.cat(logits), torch.cat(TARGETS), reduction="mean" if items is None else "sum")
    assert_same_step(model, output, real, logits, loss / (items or 1))


def sharp(cell):
    model = build(cell, layers=2).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight *= 1 if "bridge" in name or "embeddings" in name else 4
    return model


@torch.no_grad()
def greedy(model, source, count):
    target = [BOS]
    while len(target) <= count and EOS not in target:
        target.append(int(decode(model, source, torch.tensor(target))[-1].argmax()))
    return target


def until_end(row):
    row = row.tolist()
    return row[: row.index(EOS) + 1] if EOS in row else row


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_searching_equals_each_source_alone_with_everything_computed_again(cell, layout, use_cache, beams):
    model, (inputs, mask) = sharp(cell), arrange(layout, SOURCES)
    options = {"max_new_tokens": 9, "do_sample": False, **beams}
    found = model.generate(input_ids=inputs, attention_mask=mask, use_cache=use_cache, **options)
    expected = [row for source in SOURCES for row in model.generate(source[None], use_cache=False, **options)]
    assert list(map(until_end, found)) == list(map(until_end, expected))
    assert len(set(map(str, expected))) > 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_do_not_depend_on_the_padding_of_the_source(layout):
    model, found = sharp("lstm"), []
    for place in ("left", layout):
        inputs, mask = arrange(place, SOURCES)
        torch.manual_seed(5)
        options = {"max_new_tokens": 9, "do_sample": True, "num_return_sequences": 2}
        found.append(model.generate(input_ids=inputs, attention_mask=mask, **options))
    assert torch.equal(*found)


def test_a_target_that_ends_with_padding_is_not_continued():
    model, (inputs, mask) = sharp("gru"), arrange("right", SOURCES[:2])
    target, real = arrange("right", [torch.tensor([BOS, 5]), torch.tensor([BOS, 5, 6, 7])])
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    with pytest.raises(ValueError, match="decoder_attention_mask ends with padding in row 0"):
        model.generate(inputs, decoder_input_ids=target[:, :4], decoder_attention_mask=real[:, :4], **options)


def test_encoder_outputs_stand_in_for_the_source():
    model, (inputs, mask) = sharp("gru"), arrange("right", SOURCES[:2])
    encoded = model.get_encoder()(inputs, mask, return_dict=True)
    labels = torch.full((2, 3), 5)
    expected = model(inputs, mask, labels=labels)
    assert torch.equal(model(encoder_outputs=encoded, labels=labels).loss, expected.loss)
    read = torch.tensor([[BOS, 5, 5]] * 2)
    assert torch.equal(model(inputs, mask, decoder_input_ids=read).logits, expected.logits)
    generated = model.generate(input_ids=inputs, attention_mask=mask, max_new_tokens=4, do_sample=False)
    encoded = model.get_encoder()(inputs, mask, return_dict=True)
    again = model.generate(encoder_outputs=encoded, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(again, generated)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"pad_token_id": None}, "pad_token_id is missing"),
        ({"decoder_start_token_id": 13}, "decoder_start_token_id must be .* below vocab_size=13, found 13"),
        ({"cell_type": "cnn"}, "cell_type must be one of 'rnn', 'lstm', 'gru', found 'cnn'"),
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1, found 0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder must be True"),
    ],
)
def test_an_impossible_configuration_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RecurrentEncoderDecoderConfig(**{"vocab_size": 13, "pad_token_id": 0, **fields})


def test_a_call_without_a_target_is_refused():
    with pytest.raises(ValueError, match="expected decoder_input_ids or labels, found neither"):
        build()(torch.stack(tokens((3, 3), low=3)))


# --- in the Trainer -------------------------------------------------------------------------------------


def padded_pair(features):
    inputs, mask = arrange("left", [row["input_ids"] for row in features])
    labels, _ = arrange("right", [row["labels"] for row in features], fill=-100)
    return {"input_ids": inputs, "attention_mask": mask, "labels": labels}


PAIRS = [
    {"input_ids": source, "labels": target}
    for source, target in zip(
        SOURCES + tokens((2, 9), seed=2, low=3), TARGETS + tokens((3, 8), seed=3, low=3), strict=True
    )
]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_packed_training_equals_padded_training(tmp_path, accumulation):
    options = {"padded": padded_pair, "gradient_accumulation_steps": accumulation}
    assert_training_equals_padded(tmp_path, build, PAIRS, **options)


def of_the_collator(model):
    """Return a collator that adds ``decoder_input_ids``, as ``DataCollatorForSeq2Seq`` does."""

    def collate(features):
        batch = padded_pair(features)
        return {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}

    return collate


@pytest.mark.parametrize("layout", ["packed", "padded", "collator"])
@pytest.mark.parametrize("generates", [False, True])
def test_label_smoothing_equals_a_loop_over_steps(tmp_path, layout, generates):
    model = build()
    collate = {"packed": packed_batch, "padded": padded_pair, "collator": of_the_collator(model)}[layout]
    changes = {"label_smoothing_factor": 0.2, "predict_with_generate": generates, "generation_max_length": 9}
    changes |= {"max_steps": 1, "per_device_train_batch_size": 6, "per_device_eval_batch_size": 6}
    # With metrics: without, nothing is generated.
    changes |= {"trainer": Seq2SeqTrainer, "options": {"compute_metrics": lambda _: {}}}
    trainer = new_trainer(tmp_path, model, PAIRS, collate, **changes)
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.train()
    model = build()
    logits = [teach(model, row["input_ids"], row["labels"]) for row in PAIRS]
    expected = smoothed(torch.cat(logits), torch.cat([row["labels"] for row in PAIRS]), 0.2)
    assert_first_step(trainer, model, expected)
    assert evaluated == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("collate", [packed_batch, padded_pair])
def test_a_loss_function_of_the_user_gets_logits_and_labels_that_fit(tmp_path, collate):
    def loss(outputs, labels, num_items_in_batch=None):
        logits, targets = (x.data if isinstance(x, PackedSequence) else x for x in (outputs.logits, labels))
        return cross_entropy(logits.flatten(0, -2), targets.flatten())

    changes = {"max_steps": 1, "per_device_train_batch_size": 6}
    found = train(tmp_path, build(), PAIRS, collate, options={"compute_loss_func": loss}, **changes)
    expected = train(tmp_path, build(), PAIRS, collate, **changes)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


def test_without_the_plugin_smoothing_says_what_to_do(tmp_path):
    trainer = new_trainer(tmp_path, build(), PAIRS, padded_pair, label_smoothing_factor=0.1)
    with stock(), pytest.raises(ValueError, match=r"turn hf_packfix on, or add decoder_input_ids=model\.prepare_"):
        trainer.train()


def test_predict_with_generate_returns_what_the_loop_generates(tmp_path):
    model = sharp("gru")
    options = {"trainer": Seq2SeqTrainer, "predict_with_generate": True, "generation_max_length": 9}
    found = new_trainer(tmp_path, model, PAIRS, padded_pair, **options).predict(PAIRS).predictions
    for row, target in zip(found.tolist(), [greedy(model, row["input_ids"], 8) for row in PAIRS], strict=True):
        assert row == target + [PAD] * (len(row) - len(target))


def test_no_state_is_returned_if_the_configuration_says_so():
    model, ids = build(), torch.tensor([[3, 4, 5]])
    assert CACHE_NAME in model(ids, labels=ids)
    model.config.use_cache = False  # as the Trainer of recent releases sets it
    assert CACHE_NAME not in model(ids, labels=ids)
    assert CACHE_NAME in model(ids, labels=ids, use_cache=True)
