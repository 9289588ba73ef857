"""The recurrent models: one meaning in every layout, and what transformers expects of a model."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import SequentialSampler
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Seq2SeqTrainer,
    Trainer,
)

import hf_packfix.models
from hf_packfix.models import (
    RecurrentConfig,
    RecurrentEncoderDecoder,
    RecurrentForCausalLM,
    RecurrentForSequenceClassification,
    RecurrentForTokenClassification,
    RecurrentModel,
)
from tests.support.layouts import (
    CELLS,
    CLOSE,
    LAYOUTS,
    arrange,
    assert_first_step,
    assert_same_step,
    new_model,
    run,
    sequences_of,
    smoothed,
    tokens,
)
from tests.support.oracle import (
    assert_same_run,
    assert_training_equals_padded,
    compiles,
    new_trainer,
    packed_batch,
    padded_batch,
    rows,
    stock,
    train,
)

V, H, C = 13, 6, 3
SHAPES = [(1, False), (2, False), (1, True), (2, True)]


# --- the same in every layout ---------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("layers", "bidirectional"), SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bare_model_equals_a_loop_over_steps(cell, layers, bidirectional, layout):
    model = new_model(RecurrentModel, cell, layers, bidirectional=bidirectional)
    ids = tokens()
    inputs, mask = arrange(layout, ids)
    output = model(inputs, mask)
    expected = [run(model.rnn, model.embeddings.weight[row]) for row in ids]
    found = sequences_of(output.last_hidden_state, mask)
    torch.testing.assert_close(found, [steps for steps, _ in expected], **CLOSE)
    finals = torch.stack([final for _, final in expected], dim=1)
    torch.testing.assert_close(output.past_key_values.hidden_state, finals, **CLOSE)
    last = torch.stack([final[-2:].flatten() if bidirectional else final[-1] for _, final in expected])
    torch.testing.assert_close(output.pooler_output, last, **CLOSE)
    if layout == "packed":
        assert torch.equal(output.last_hidden_state.sorted_indices, inputs.sorted_indices)
        assert torch.equal(output.last_hidden_state.batch_sizes, inputs.batch_sizes)
    else:
        assert output.last_hidden_state.shape == (*mask.shape, model.config.output_size)
        assert not output.last_hidden_state[mask == 0].any()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("layers", "bidirectional"), SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_classifier_equals_a_loop_over_steps(cell, layers, bidirectional, layout):
    model = new_model(RecurrentForTokenClassification, cell, layers, bidirectional=bidirectional)
    ids, labels = tokens(), tokens(seed=1, high=C)
    labels[1][2] = labels[4][0] = -100
    inputs, mask = arrange(layout, ids)
    # Labels at padding must not count, whatever they are.
    output = model(inputs, mask, labels=arrange(layout, labels, fill=1)[0])
    logits = [model.classifier(run(model.recurrent.rnn, model.recurrent.embeddings.weight[row])[0]) for row in ids]
    assert_same_step(model, output, mask, logits, cross_entropy(torch.cat(logits), torch.cat(labels)))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("items", [None, 50])
def test_a_language_model_equals_a_loop_over_steps(cell, layers, layout, items):
    model = new_model(RecurrentForCausalLM, cell, layers)
    ids = tokens()
    labels = [row.clone() for row in ids]
    labels[1][3] = -100
    inputs, mask = arrange(layout, ids)
    padded_labels = arrange(layout, labels, fill=2)[0]
    output = model(inputs, mask, labels=padded_labels, num_items_in_batch=items)
    logits = [model.lm_head(run(model.recurrent.rnn, model.recurrent.embeddings.weight[row])[0]) for row in ids]
    predictions, targets = torch.cat([x[:-1] for x in logits]), torch.cat([x[1:] for x in labels])
    count = items or targets.ne(-100).sum()
    loss = cross_entropy(predictions, targets, reduction="sum") / count
    assert_same_step(model, output, mask, logits, loss)


PROBLEMS = {
    "single_label_classification": (C, torch.tensor([0, 2, 1, 1, 0]), cross_entropy),
    "multi_label_classification": (
        C,
        torch.randint(2, (5, C), generator=torch.Generator().manual_seed(3)).float(),
        binary_cross_entropy_with_logits,
    ),
    "regression": (1, torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0]), lambda x, y: mse_loss(x[:, 0], y)),
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("layers", "bidirectional"), SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_sequence_classifier_equals_a_loop_over_steps(cell, layers, bidirectional, layout, problem):
    count, labels, criterion = PROBLEMS[problem]
    model = new_model(RecurrentForSequenceClassification, cell, layers, bidirectional=bidirectional, num_labels=count)
    ids = tokens()
    inputs, mask = arrange(layout, ids)
    output = model(inputs, mask, labels=labels)
    finals = [run(model.recurrent.rnn, model.recurrent.embeddings.weight[row])[1] for row in ids]
    last = torch.stack([x[-2:].flatten() if bidirectional else x[-1] for x in finals])
    logits = model.classifier(last)
    assert_same_step(model, output, mask, [*logits], criterion(logits, labels))
    assert model.config.problem_type == problem


@pytest.mark.parametrize("problem", PROBLEMS)
def test_sequence_classification_divides_by_the_items(problem):
    count, labels, criterion = PROBLEMS[problem]
    model = new_model(RecurrentForSequenceClassification, num_labels=count, problem_type=problem)
    inputs, _ = arrange("packed", tokens())
    output = model(inputs, labels=labels, num_items_in_batch=torch.tensor(40))
    torch.testing.assert_close(output.loss, criterion(output.logits, labels) * labels.numel() / 40, **CLOSE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_are_read_in_the_dtype_of_the_weights(layout, dtype):
    model = new_model(RecurrentForSequenceClassification, "lstm", vocab_size=None, embedding_size=None, input_size=12)
    assert model.main_input_name == "input_values"
    values = [torch.randn(n, 12, dtype=dtype) for n in (3, 5, 1)]
    inputs, mask = arrange(layout, values)
    found = model(input_values=inputs, attention_mask=mask).logits
    finals = [run(model.recurrent.rnn, row.float())[1][-1] for row in values]
    torch.testing.assert_close(found, model.classifier(torch.stack(finals)), **CLOSE)


def test_no_mask_and_a_mask_of_ones_read_every_step():
    model = new_model(RecurrentModel)
    ids = torch.stack(tokens((4, 4)))
    expected = torch.stack([run(model.rnn, model.embeddings.weight[row])[0] for row in ids])
    for mask in (None, torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool)):
        torch.testing.assert_close(model(ids, mask).last_hidden_state, expected, **CLOSE)


def test_reading_in_two_parts_equals_reading_at_once():
    for cell in CELLS:
        model = new_model(RecurrentModel, cell, layers=2)
        ids = torch.stack(tokens((6, 6, 6)))
        whole = model(ids)
        first = model(ids[:, :4])
        state = first.past_key_values.hidden_state.clone()
        second = model(ids[:, 4:], past_key_values=first.past_key_values)
        torch.testing.assert_close(second.last_hidden_state, whole.last_hidden_state[:, 4:], **CLOSE)
        assert second.past_key_values.get_seq_length() == 6
        # The first part can be continued again: nothing was changed in place.
        assert torch.equal(first.past_key_values.hidden_state, state)


def test_dropout_acts_between_layers_while_training():
    model = new_model(RecurrentModel, layers=2, dropout=0.5)
    inputs, _ = arrange("packed", tokens())
    outputs = [model.train()(inputs).last_hidden_state.data for _ in range(2)]
    assert not torch.equal(*outputs)
    outputs = [model.eval()(inputs).last_hidden_state.data for _ in range(2)]
    assert torch.equal(*outputs)


# --- labels that do not fit -----------------------------------------------------------------------------


def test_packed_labels_in_another_order_are_set_right():
    model = new_model(RecurrentForTokenClassification)
    ids, labels = tokens((4, 7, 4, 7)), tokens((4, 7, 4, 7), seed=1, high=C)
    inputs = pack_sequence(ids, enforce_sorted=False)
    expected = model(inputs, labels=pack_sequence(labels, enforce_sorted=False)).loss
    # The same sequences, those of one length in another order than torch chose for the inputs.
    order = torch.tensor([3, 1, 2, 0])
    assert not torch.equal(order, inputs.sorted_indices)
    again = pack_sequence([labels[i] for i in order])
    again = PackedSequence(again.data, again.batch_sizes, order)
    torch.testing.assert_close(model(inputs, labels=again).loss, expected)


@pytest.mark.parametrize("kind", [RecurrentForTokenClassification, RecurrentForCausalLM])
def test_labels_of_other_lengths_or_layouts_are_refused(kind):
    model, ids = new_model(kind), tokens((3, 1))
    packed, (padded, mask) = pack_sequence(ids), arrange("right", ids)
    with pytest.raises(
        ValueError, match=r"packed labels must have the lengths of the inputs, \[3, 1\], found \[3, 2\]"
    ):
        model(packed, labels=pack_sequence(tokens((3, 2))))
    with pytest.raises(ValueError, match="labels must be packed as the inputs are, found padded labels"):
        model(packed, labels=padded)
    with pytest.raises(ValueError, match="labels must be padded as the inputs are, found packed labels"):
        model(padded, mask, labels=packed)
    with pytest.raises(ValueError, match=r"one label a step, \[2, 5\], found \[2, 4\]"):
        model(padded, mask, labels=padded[:, 1:])


@pytest.mark.parametrize(
    ("problem", "count", "labels"),
    [
        ("regression", 3, torch.zeros(2)),
        ("regression", 1, torch.zeros(3)),
        ("multi_label_classification", 3, torch.zeros(2)),
        ("single_label_classification", 3, torch.zeros(2, 3)),
        ("single_label_classification", 3, pack_sequence([torch.zeros(2), torch.zeros(1)])),
    ],
)
def test_sequence_labels_of_another_shape_are_refused(problem, count, labels):
    model = new_model(RecurrentForSequenceClassification, num_labels=count, problem_type=problem)
    with pytest.raises(ValueError, match=f"labels for {problem} must have shape"):
        model(torch.zeros(2, 4, dtype=torch.int64), labels=labels)


# --- inputs that do not fit -----------------------------------------------------------------------------


FEATURES = {"vocab_size": None, "embedding_size": None, "input_size": 12}
IDS, VALUES = torch.zeros(2, 3).long(), torch.zeros(2, 3, 12)
PACKED_IDS = pack_sequence([IDS[0]])


@pytest.mark.parametrize(
    ("fields", "inputs", "message"),
    [
        ({}, {}, "reads input_ids alone, found neither"),
        ({}, {"input_values": VALUES}, "reads input_ids alone, found input_values"),
        ({}, {"input_ids": IDS, "input_values": VALUES}, "reads input_ids alone, found input_ids and input_values"),
        ({}, {"input_ids": IDS[0]}, r"input_ids must be a tensor of shape \[B, T\], found \[3\]"),
        ({}, {"input_ids": pack_sequence([VALUES[0]])}, r"packed with data of shape \[N\], found \[3, 12\]"),
        (FEATURES, {"input_values": VALUES[..., :11]}, r"a tensor of shape \[B, T, 12\], found \[2, 3, 11\]"),
        (FEATURES, {"input_values": pack_sequence([VALUES[0, :, :11]])}, r"of shape \[N, 12\], found \[3, 11\]"),
        ({}, {"input_ids": IDS, "attention_mask": torch.ones(1, 3)}, r"\[2, 3\], found \[1, 3\]"),
        ({}, {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 0], [0, 0, 0]])}, "has no real step in row 1"),
        ({}, {"input_ids": PACKED_IDS, "attention_mask": torch.ones(1, 3)}, "a padded attention_mask beside inputs"),
        ({}, {"input_ids": IDS, "attention_mask": PACKED_IDS}, "a packed attention_mask beside inputs that are not"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(fields, inputs, message):
    with pytest.raises(ValueError, match=message):
        new_model(RecurrentModel, **fields)(**inputs)


def test_a_bidirectional_model_cannot_continue():
    model = new_model(RecurrentModel, bidirectional=True)
    ids = torch.stack(tokens((4, 4)))
    with pytest.raises(ValueError, match="bidirectional model cannot continue from a recurrent state"):
        model(ids, past_key_values=model(ids).past_key_values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cell_type": "transformer"}, "cell_type must be one of 'rnn', 'lstm', 'gru', found 'transformer'"),
        ({"vocab_size": None}, "exactly one of vocab_size .* found vocab_size=None and input_size=None"),
        ({"input_size": 3}, "exactly one of vocab_size .* found vocab_size=13 and input_size=3"),
        ({"vocab_size": None, "input_size": 3, "embedding_size": 4}, "embedding_size=4 needs a vocab_size"),
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1, found 0"),
        ({"hidden_size": 2.0}, "hidden_size must be an integer of at least 1, found 2.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer of at least 1, found True"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, found 1.0"),
        ({"pad_token_id": 13}, "pad_token_id must be at least 0 and below vocab_size=13, found 13"),
        ({"eos_token_id": [3, -1]}, "eos_token_id must be at least 0 and below vocab_size=13, found -1"),
        ({"problem_type": "ranking"}, "problem_type must be one of 'regression', .* found 'ranking'"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "num_labels"),
        ({"tie_word_embeddings": True, "embedding_size": 4}, "tie_word_embeddings needs .* embedding_size=4"),
        ({"tie_word_embeddings": True, "bidirectional": True}, "tie_word_embeddings needs .*bidirectional=True"),
    ],
)
def test_an_impossible_configuration_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RecurrentConfig(**{"vocab_size": 13, "hidden_size": 8, **fields})


@pytest.mark.parametrize("fields", [{"bidirectional": True}, {"vocab_size": None, "input_size": 3}])
def test_a_language_model_reads_tokens_in_one_direction(fields):
    config = RecurrentConfig(**{"vocab_size": 13, "hidden_size": 8, **fields})
    with pytest.raises(ValueError, match="causal language model needs a vocab_size and bidirectional=False"):
        RecurrentForCausalLM(config)


# --- what transformers expects of a model ---------------------------------------------------------------

AUTO = {
    RecurrentModel: AutoModel,
    RecurrentForSequenceClassification: AutoModelForSequenceClassification,
    RecurrentForTokenClassification: AutoModelForTokenClassification,
    RecurrentForCausalLM: AutoModelForCausalLM,
    RecurrentEncoderDecoder: AutoModelForSeq2SeqLM,
}


@pytest.mark.parametrize(("kind", "auto"), AUTO.items())
@pytest.mark.parametrize("cell", CELLS)
def test_a_saved_model_loads_with_its_weights_and_configuration(tmp_path, kind, auto, cell):
    start = {"decoder_start_token_id": 0} if kind is RecurrentEncoderDecoder else {}
    fields = {"dropout": 0.1, "pad_token_id": 0, "eos_token_id": [1, 2], **start}
    model = new_model(kind, cell, 2, **fields).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = auto.from_pretrained(tmp_path).eval()
    assert type(loaded) is kind
    assert loaded.config.to_dict().keys() == AutoConfig.from_pretrained(tmp_path).to_dict().keys()
    for field in ("cell_type", "vocab_size", "embedding_size", "hidden_size", "num_hidden_layers", *fields):
        assert getattr(loaded.config, field) == getattr(model.config, field)
    assert not start or loaded.generation_config.decoder_start_token_id == 0
    # To the last bit the weights are the same, but not what kernels make of them: that depends on where they lie.
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    ids, _ = arrange("packed", tokens())
    given = {"input_ids": ids, **({"labels": ids} if start else {})}
    torch.testing.assert_close(loaded(**given)[0].data, model(**given)[0].data)


def test_loading_a_body_into_a_classifier_draws_a_new_head(tmp_path):
    body = new_model(RecurrentModel)
    body.save_pretrained(tmp_path)
    torch.manual_seed(1)
    model = RecurrentForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    assert torch.equal(model.recurrent.rnn.weight_hh_l0, body.rnn.weight_hh_l0)
    assert model.classifier.weight.shape == (4, H)
    assert 0 < model.classifier.weight.abs().max() <= H**-0.5


def test_tied_embeddings_stay_tied_when_loaded(tmp_path):
    model = new_model(RecurrentForCausalLM, embedding_size=H, tie_word_embeddings=True)
    assert model.lm_head.weight is model.recurrent.embeddings.weight
    model.save_pretrained(tmp_path)
    loaded = RecurrentForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is loaded.recurrent.embeddings.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (RecurrentForCausalLM, {"embedding_size": H}),
        (RecurrentForCausalLM, {"embedding_size": H, "tie_word_embeddings": True}),
        (RecurrentEncoderDecoder, {}),
    ],
)
def test_resized_embeddings_keep_the_logits_of_the_old_tokens(kind, fields):
    model, ids, new = new_model(kind, **fields).eval(), torch.stack(tokens((4, 4))), torch.full((1, 2), V + 2)
    before = model(ids, labels=ids).logits
    model.resize_token_embeddings(V + 3, mean_resizing=False)
    assert {module.config.vocab_size for module in model.modules() if hasattr(module, "config")} == {V + 3}
    torch.testing.assert_close(model(ids, labels=ids).logits[..., :V], before, **CLOSE)
    assert model(new, labels=new).logits.shape == (1, 2, V + 3)


def test_gradient_checkpointing_is_refused(tmp_path):
    model = new_model(RecurrentForTokenClassification)
    trainer = new_trainer(tmp_path, model, rows(), packed_batch, gradient_checkpointing=True)
    with pytest.raises(ValueError, match=r"RecurrentForTokenClassification does not support \w+ checkpointing"):
        trainer.train()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_gives_nearly_the_same_loss(cell, layout):
    model = new_model(RecurrentForCausalLM, cell, layers=2).eval()
    inputs, mask = arrange(layout, tokens())
    expected = model(inputs, mask, labels=inputs).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(inputs, mask, labels=inputs).loss
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    half = model.to(torch.bfloat16)
    output = half(inputs, mask, labels=inputs)
    assert output.logits.data.dtype == torch.bfloat16
    torch.testing.assert_close(output.loss, expected, rtol=0.05, atol=0.05)


@pytest.mark.skipif(not compiles(), reason="this torch does not compile here")
@pytest.mark.parametrize("layout", ["packed", "left"])
def test_a_compiled_model_gives_the_same_numbers(layout):
    model = new_model(RecurrentForCausalLM).eval()
    inputs, mask = arrange(layout, tokens())
    expected = model(inputs, mask, labels=inputs)
    compiled = torch.compile(model, backend="eager")
    found = compiled(inputs, mask, labels=inputs)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    torch.testing.assert_close(found.logits.data, expected.logits.data, **CLOSE)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0


def test_return_dict_false_gives_a_plain_tuple():
    model = new_model(RecurrentForSequenceClassification)
    inputs, _ = arrange("packed", tokens())
    found = model(inputs, labels=torch.zeros(5).long(), return_dict=False)
    expected = model(inputs, labels=torch.zeros(5).long())
    assert isinstance(found, tuple)
    assert torch.equal(found[0], expected.loss)
    assert torch.equal(found[1], expected.logits)


# --- in the Trainer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (RecurrentForTokenClassification, "tokens"),
        (RecurrentForCausalLM, "inputs"),
        (RecurrentForSequenceClassification, "row"),
    ],
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_packed_training_equals_padded_training(tmp_path, kind, labels, accumulation):
    data = rows(labels="row" if labels == "row" else "tokens")
    if labels == "inputs":
        data = [{**row, "labels": row["input_ids"]} for row in data]
    options = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.1}

    def model():
        return new_model(kind, vocab_size=17, num_labels=4)

    # A Trainer without this attribute also counts the first label of each row, which is never predicted.
    if labels == "inputs" and "_loss_shifts_labels" not in inspect.getsource(Trainer):
        packed = train(tmp_path, model(), data, packed_batch, **options)
        assert_same_run(packed, train(tmp_path, model(), data, padded_batch, **options))
    else:
        assert_training_equals_padded(tmp_path, model, data, **options)


class InOrder(Seq2SeqTrainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


# Sequences of very different lengths, some of which have nothing to predict.
SENTENCES = tokens((1, 9, 2, 7, 3, 12, 1, 4, 5, 8))
DATA = [{"input_ids": row} for row in SENTENCES]
BATCHES = [SENTENCES[start : start + 3] for start in (0, 3, 6, 9)]


def labels_of(row, high):
    return row.where(row != 3, -100) if high is None else row % high


def collator(layout, fill=-100, high=None):
    """Return a collator of ``SENTENCES`` in a layout; ``fill`` is what labels have at padding.

    ``high`` is the number of classes of a token classifier; None for a language model.
    """

    def collate(features):
        ids = [feature["input_ids"] for feature in features]
        labels = [labels_of(row, high) for row in ids]
        inputs, mask = arrange(layout, ids, fill=2)
        batch = {"input_ids": inputs, "labels": arrange(layout, labels, fill=fill)[0]}
        return batch if mask is None else {**batch, "attention_mask": mask}

    return collate


@pytest.mark.parametrize(("kind", "high"), [(RecurrentForCausalLM, None), (RecurrentForTokenClassification, C)])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fill", [-100, 2])
def test_the_loss_of_a_step_is_the_mean_over_all_its_predictions(tmp_path, kind, high, accumulation, layout, fill):
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 1, "trainer": InOrder}
    trainer = new_trainer(tmp_path, new_model(kind), DATA, collator(layout, fill, high), **options)
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.train()
    model = new_model(kind)

    def loss(sentences):
        logits, targets = (
            [model(row[None]).logits[0] for row in sentences],
            [labels_of(row, high) for row in sentences],
        )
        if high is None:
            logits, targets = [row[:-1] for row in logits], [row[1:] for row in targets]
        return cross_entropy(torch.cat(logits), torch.cat(targets))

    assert_first_step(trainer, model, loss(SENTENCES[: 3 * accumulation]))
    assert evaluated == pytest.approx(torch.stack(list(map(loss, BATCHES))).mean().item(), rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_in_loss_are_those_that_the_logits_predict(layout):
    model, ids = new_model(RecurrentForCausalLM), tokens()
    ids[1][3] = 3
    batch = collator(layout, fill=2)([{"input_ids": row} for row in ids])
    found = model.labels_in_loss(batch)
    labels = [row.where(row != 3, -100) for row in ids]
    expected = [torch.cat([row[1:], torch.tensor([-100])]) for row in labels]
    mask = batch.get("attention_mask")
    assert all(map(torch.equal, sequences_of(found, mask), expected))
    assert mask is None or (found[mask == 0] == -100).all()
    logits = model(batch["input_ids"], mask).logits.data.flatten(0, -2)
    torch.testing.assert_close(model(**batch).loss, cross_entropy(logits, found.data.flatten()), **CLOSE)


@pytest.mark.needs_patch("transformers.trainer:Trainer.compute_loss")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fill", [-100, 2])
@pytest.mark.parametrize("generates", [False, True])
def test_label_smoothing_smooths_the_next_token(tmp_path, layout, fill, generates):
    changes = {"max_steps": 1, "label_smoothing_factor": 0.2, "predict_with_generate": generates}
    # With metrics: without, nothing is generated.
    changes |= {"generation_max_length": 20, "trainer": InOrder, "options": {"compute_metrics": lambda _: {}}}
    model = new_model(RecurrentForCausalLM, pad_token_id=0)
    trainer = new_trainer(tmp_path, model, DATA, collator(layout, fill), **changes)
    smoother = trainer.label_smoother
    evaluated = trainer.evaluate()["eval_loss"]
    assert trainer.label_smoother is smoother
    trainer.train()
    model, losses = new_model(RecurrentForCausalLM, pad_token_id=0), []
    for batch in BATCHES:
        logits = [model(row[None]).logits[0, :-1] for row in batch]
        targets = [labels_of(row, None)[1:] for row in batch]
        losses.append(smoothed(torch.cat(logits), torch.cat(targets), 0.2))
    assert_first_step(trainer, model, losses[0])
    assert evaluated == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_a_loss_function_of_the_user_gets_the_count_of_upstream(tmp_path):
    counts = []

    def loss(outputs, labels, num_items_in_batch=None):
        counts.append(int(num_items_in_batch))
        return outputs.logits.sum()

    changes = {"max_steps": 1, "options": {"compute_loss_func": loss}}
    train(tmp_path, new_model(RecurrentForCausalLM), DATA, collator("left", 2), **changes)
    with stock():
        train(tmp_path, new_model(RecurrentForCausalLM), DATA, collator("left", 2), **changes)
    assert counts[0] == counts[1]


def test_evaluation_returns_logits_alone(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in tokens((3, 5, 2))]
    trainer = new_trainer(tmp_path, new_model(RecurrentForCausalLM), data, padded_batch)
    assert trainer.predict(data).predictions.shape == (3, 5, V)


def test_registering_the_models_twice_is_harmless():
    importlib.reload(hf_packfix.models)
    assert type(AutoConfig.for_model("recurrent", vocab_size=3)) is RecurrentConfig
