"""What evaluation and prediction report for packed batches equals what they report for padded ones."""

from __future__ import annotations

import functools
import os
from unittest import mock

import accelerate
import pytest
import torch
import torch.distributed.utils
from accelerate.utils import operations
from packaging.version import Version
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers import EarlyStoppingCallback, Trainer
from transformers.modeling_outputs import TokenClassifierOutput

from hf_packfix.packing import jagged
from hf_packfix.packing import packed as packing
from tests.support.oracle import (
    HIDDEN,
    DropsIndices,
    OracleConfig,
    PlainTagger,
    Tagger,
    TupleTagger,
    accuracy,
    assert_training_equals_padded,
    by_length,
    compiles,
    counted_samples,
    logged,
    new_model,
    new_trainer,
    packed_batch,
    padded_batch,
    rows,
    sorted_packed_batch,
    stock,
    transformers_from,
)
from tests.support.reports import (
    Recorder,
    Stream,
    assert_evaluation_equals_padded,
    assert_same_report,
    assert_same_tree,
    messages,
    report,
)

# --- shapes of outputs and labels -----------------------------------------------------------------------


@pytest.mark.needs_patch(
    "transformers.trainer_pt_utils:nested_detach", "accelerate.utils.operations:pad_across_processes"
)
@pytest.mark.parametrize("model", [Tagger, PlainTagger, TupleTagger])
def test_outputs_of_every_kind_are_reported_as_padded_ones(tmp_path, model):
    metrics, calls, prediction = assert_evaluation_equals_padded(tmp_path, model, rows())
    assert metrics["eval_accuracy"] > 0
    assert calls[0].predictions.shape == (14, 9, 4)
    assert prediction.label_ids.shape == (14, 9)


def test_nested_outputs_are_reported_as_padded_ones(tmp_path):
    torch.manual_seed(0)
    model = Tagger(OracleConfig(output_hidden_states=True))
    _, calls, _ = assert_evaluation_equals_padded(tmp_path, model, rows())
    logits, (states, (again,)) = calls[0].predictions
    assert logits.shape == (14, 9, 4)
    assert states.shape == again.shape == (14, 9, HIDDEN)


class PaddedLogits(Tagger):
    """Packed inputs and labels, padded logits."""

    def forward(self, input_ids=None, labels=None, attention_mask=None, **kwargs):
        output = super().forward(input_ids, labels, attention_mask, **kwargs)
        if isinstance(output.logits, PackedSequence):
            output.logits = packing.pad(output.logits, -100)
        return output


class PaddedLabels(Tagger):
    """Packed inputs and logits, padded labels."""

    def forward(self, input_ids=None, labels=None, attention_mask=None, **kwargs):
        if isinstance(input_ids, PackedSequence) and labels is not None:
            real = torch.arange(labels.shape[1]) < packing.lengths(input_ids)[:, None]
            flat = jagged.from_jagged(labels[real], packing.lengths(input_ids))
            return super().forward(input_ids, flat, attention_mask, **kwargs)
        return super().forward(input_ids, labels, attention_mask, **kwargs)


@pytest.mark.parametrize("model", [PaddedLogits, PaddedLabels])
def test_packed_beside_padded_logits_or_labels_are_reported_alike(tmp_path, model):
    def collate(features):
        labels = (padded_batch if model is PaddedLabels else packed_batch)(features)["labels"]
        return {**packed_batch(features), "labels": labels}

    assert_evaluation_equals_padded(tmp_path, model, rows(), packed=collate)


class TwoTargets(Tagger):
    def forward(self, input_ids=None, labels=None, weight_labels=None, row_labels=None, attention_mask=None):
        output = super().forward(input_ids, labels, attention_mask)
        return TokenClassifierOutput(loss=output.loss + row_labels.float().mean(), logits=output.logits)


def test_several_label_names_of_mixed_kinds_are_reported_alike(tmp_path):
    data = [
        {**row, "weight_labels": row["labels"].float() / 3, "row_labels": torch.tensor(i)}
        for i, row in enumerate(rows())
    ]
    found = assert_evaluation_equals_padded(
        tmp_path, TwoTargets, data, label_names=["labels", "weight_labels", "row_labels"]
    )
    assert [array.shape for array in found[2].label_ids] == [(14, 9), (14, 9), (14,)]


# --- arguments of the evaluation loop -------------------------------------------------------------------


LEGACY = pytest.mark.skipif(
    transformers_from("5.0") or not transformers_from("4.47"),
    reason="the legacy prediction loop went with transformers 5.0; in 4.46 it fails on padded batches, too",
)


@pytest.mark.parametrize(
    "changes",
    [
        *(
            pytest.param({"use_legacy_prediction_loop": True, **more}, marks=LEGACY)
            for more in ({}, {"eval_accumulation_steps": 1}, {"eval_accumulation_steps": 2})
        ),
        {"eval_accumulation_steps": 1},
        {"eval_accumulation_steps": 2},
        {"batch_eval_metrics": True},
        {"eval_do_concat_batches": False},
        {"eval_do_concat_batches": False, "eval_accumulation_steps": 2},
        {"eval_use_gather_object": True},
        {"include_for_metrics": ["loss"]},
        {"prediction_loss_only": True},
        {"per_device_eval_batch_size": 1},
        {"per_device_eval_batch_size": 4},
        {"per_device_eval_batch_size": 13},
        {"per_device_eval_batch_size": 99},
    ],
    ids=str,
)
def test_any_argument_of_the_loop_reports_what_the_padded_run_reports(tmp_path, changes):
    if "eval_use_gather_object" in changes and Version(accelerate.__version__) <= Version("0.30.0"):
        pytest.skip(f"accelerate {accelerate.__version__} has no gather_object for it; 0.30.1 is the first with it")
    assert_evaluation_equals_padded(tmp_path, Tagger, rows(), **changes)


@pytest.mark.parametrize(
    "data",
    [
        sorted(rows(), key=lambda row: len(row["input_ids"]), reverse=True),
        sorted(rows(), key=lambda row: len(row["input_ids"])),
        rows(5, longest=1),
    ],
    ids=["the last batch is shorter", "the last batch is longer", "steps alone"],
)
def test_sequences_of_every_length_are_reported_alike(tmp_path, data):
    assert_evaluation_equals_padded(tmp_path, Tagger, data)


@pytest.mark.parametrize("changes", [{}, {"batch_eval_metrics": True}, {"eval_accumulation_steps": 1}], ids=str)
def test_metrics_get_the_inputs_padded(tmp_path, changes):
    data = rows()
    found = report(tmp_path, Tagger, packed_batch, data, include_for_metrics=["inputs", "loss"], **changes)
    with stock():
        expected = report(tmp_path, Tagger, padded_batch, data, include_for_metrics=["inputs", "loss"], **changes)
    assert_same_report(found, expected)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        left, right = ours.inputs, theirs.inputs
        if changes.get("batch_eval_metrics"):
            left, right = left["input_ids"], right["input_ids"]
        assert left.shape == right.shape
        left, right = torch.as_tensor(left), torch.as_tensor(right)
        # Token ids start at 1: the padded collator fills with 0, and the Trainer with -100.
        torch.testing.assert_close(left.clamp(min=0), right.clamp(min=0))
        assert (left[right < 1] == -100).all()


@pytest.mark.needs_patch("transformers.trainer_pt_utils:find_batch_size")
def test_sequences_are_the_samples_of_a_data_set_without_a_length(tmp_path):
    data = rows()
    trainer = new_trainer(
        tmp_path, Tagger, data, packed_batch, accelerator_config={"dispatch_batches": False, "split_batches": False}
    )
    trainer.eval_dataset = Stream(data)
    loop = trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation", prediction_loss_only=True)
    assert loop.num_samples == len(data)
    with counted_samples() as counted:
        trainer.evaluate()
    assert counted == [len(data)]


class OwnPredictionStep(Trainer):
    """Overrides the step without calling ``super()`` and returns packed outputs."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            outputs = model(**inputs)
        return outputs["loss"], outputs["logits"], inputs["labels"]


class OwnStepWithSuper(Trainer):
    def prediction_step(self, *args, **kwargs):
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        return loss, (logits, {"again": logits}), labels


@pytest.mark.parametrize("trainer", [OwnPredictionStep, OwnStepWithSuper])
def test_subclasses_are_served(tmp_path, trainer):
    assert_evaluation_equals_padded(tmp_path, Tagger, rows(), trainer=trainer)


def test_best_model_and_early_stopping_are_those_of_the_padded_run(tmp_path):
    options = {"options": {"compute_metrics": accuracy, "callbacks": [EarlyStoppingCallback(1)]}, "learning_rate": 0.2}
    options |= dict.fromkeys(("eval_strategy", "save_strategy"), "steps") | {"eval_steps": 2, "save_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "num_train_epochs": 8}
    found, expected = assert_training_equals_padded(tmp_path, Tagger, rows(), tolerance=1e-4, **options)
    evaluated = [[entry for entry in logged(run.trainer) if "eval_loss" in entry] for run in (found, expected)]
    assert len(evaluated[0]) == len(evaluated[1]) > 1
    for left, right in zip(*evaluated, strict=True):
        assert left == pytest.approx(right, rel=1e-4)
    assert found.state.best_metric == pytest.approx(expected.state.best_metric)
    assert found.state.global_step == expected.state.global_step < 40  # it did stop early
    assert found.state.best_model_checkpoint.split("-")[-1] == expected.state.best_model_checkpoint.split("-")[-1]


def test_a_hyperparameter_search_finds_what_the_padded_one_finds(tmp_path):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def search(directory, collate):
        trainer = new_trainer(directory, Tagger, rows(), collate, options={"model_init": None}, eval_strategy="epoch")
        trainer.model_init = lambda trial=None: new_model(Tagger)
        trainer.compute_metrics = Recorder()
        values = []
        best = trainer.hyperparameter_search(
            hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.01, 0.1)},
            compute_objective=lambda metrics: values.append(metrics["eval_loss"]) or metrics["eval_loss"],
            n_trials=2,
            direction="minimize",
            backend="optuna",
            sampler=optuna.samplers.RandomSampler(seed=0),
        )
        return best, values

    best, values = search(tmp_path / "packed", packed_batch)
    with stock():
        expected, also = search(tmp_path / "padded", padded_batch)
    assert best.run_id == expected.run_id
    assert best.hyperparameters == expected.hyperparameters
    assert values == pytest.approx(also, rel=1e-4)
    assert best.objective == pytest.approx(expected.objective, rel=1e-4)


# --- what would be wrong in silence ---------------------------------------------------------------------


class BareTagger(PlainTagger):
    """Returns its logits alone."""

    def forward(self, input_ids, attention_mask=None):
        return PlainTagger.forward(self, input_ids, None, attention_mask)["logits"]


class LossOutside(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        logits = model(**inputs)
        packed = isinstance(logits, PackedSequence)
        flat = (logits.data, labels.data) if packed else (logits.flatten(0, 1), labels.flatten())
        loss = torch.nn.functional.cross_entropy(*flat)
        # Upstream cuts the first row off a bare tensor, too: what it expects beside a loss is a tuple.
        return (loss, logits if packed else (loss, logits)) if return_outputs else loss


@pytest.mark.parametrize("own", [False, True])
def test_a_bare_packed_sequence_of_a_model_is_its_logits(tmp_path, own):
    def predict(collate):
        trainer = new_trainer(
            tmp_path, BareTagger, rows(), collate, trainer=LossOutside, label_names=["labels"],
            remove_unused_columns=False,
        )  # fmt: skip
        if own:  # a method that somebody set on the object
            trainer.compute_loss = functools.partial(LossOutside.compute_loss, trainer)
        output = trainer.predict(rows())
        assert ("compute_loss" in vars(trainer)) == own
        return output

    found = predict(packed_batch)
    with stock():
        expected = predict(padded_batch)
    real = expected.label_ids != -100
    assert found.predictions.shape == expected.predictions.shape
    torch.testing.assert_close(found.predictions[real], expected.predictions[real], rtol=1e-5, atol=1e-6)
    assert_same_tree(found.label_ids, expected.label_ids)


def test_a_model_that_drops_the_index_tensors_is_warned_of(tmp_path):
    options = {"label_names": ["labels"], "options": {"compute_metrics": Recorder()}}
    trainer = new_trainer(tmp_path, DropsIndices, rows(), packed_batch, **options)
    found = messages(trainer, "evaluate", None)
    assert len(found) == 2
    assert "the model's output has the lengths of 'input_ids', but only one of them has index tensors" in found[0]
    assert "the model's output has the lengths of 'labels'" in found[1]
    assert all("the output sorted by length" in message for message in found)
    for collate, model in ((by_length(sorted_packed_batch), DropsIndices), (packed_batch, PlainTagger)):
        assert messages(new_trainer(tmp_path, model, rows(), collate, **options), "evaluate", None) == []


class WordsAndCharacters(PlainTagger):
    """A tagger of words that also reads the characters of every word."""

    def forward(self, input_ids, characters, labels=None):
        return super().forward(input_ids, labels)


def words_and_characters(features):
    batch = packed_batch(features)
    words = int(batch["input_ids"].data.shape[0])
    batch["characters"] = pack_sequence([torch.ones(1 + n % 3) for n in range(words)], enforce_sorted=False)
    return batch


def test_the_first_of_keys_with_different_numbers_of_sequences_has_the_rows(tmp_path):
    options = {"label_names": ["labels"], "remove_unused_columns": False, "max_steps": 1}
    options["accelerator_config"] = {"dispatch_batches": False, "split_batches": False}

    def evaluate(collate, model=WordsAndCharacters):
        return new_trainer(tmp_path, model, Stream(rows()), collate, **options).evaluate()["eval_loss"]

    trainer = new_trainer(tmp_path, WordsAndCharacters, rows(), words_and_characters, **options)
    (message,) = messages(trainer, "evaluate", None)
    assert "'input_ids' has 3 sequences, 'characters' has" in message
    assert "let the collator put the key first whose sequences are the rows of the data set" in message
    with stock():
        expected = evaluate(padded_batch, PlainTagger)
    assert evaluate(words_and_characters) == pytest.approx(expected, rel=1e-5)


def test_keys_with_different_numbers_of_rows_are_not_cut():
    words = words_and_characters(rows(3))
    with pytest.raises(ValueError, match=r"'input_ids' has 3, 'labels' has 3, 'characters' has "):
        operations.slice_tensors(words, slice(0, 2))
    # 15 words of 4 sentences: the tensor would be cut by sentence, silently.
    batch = {**packed_batch(rows(4)), "words": torch.ones(15, 2), "temperature": torch.tensor(0.5)}
    with pytest.raises(ValueError, match="'input_ids' has 4, 'labels' has 4, 'words' has 15"):
        operations.slice_tensors(batch, slice(0, 2))
    batch["words"] = torch.ones(4, 2)
    del batch["temperature"]  # which accelerate cannot cut
    assert operations.slice_tensors(batch, slice(0, 2))["words"].shape == (2, 2)


@pytest.mark.skipif(not compiles(), reason="this torch does not compile here")
def test_a_compiled_model_is_evaluated_alike(tmp_path):
    # The backend does not matter here: torch leaves the graph around every RNN.
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    # transformers 4 asks for it with variables, which would have every later Trainer compile its model.
    with mock.patch.dict(os.environ):
        compiled = report(tmp_path, Tagger, packed_batch, rows(), **options)
    with stock():
        expected = report(tmp_path, Tagger, padded_batch, rows())
    assert_same_report(compiled, expected)
