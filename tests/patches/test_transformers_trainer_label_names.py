"""Evaluation without a loss, since ``label_names`` does not name the target: the warning, and what it advises."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Trainer

import hf_packfix
from tests.support.oracle import Classifier, PlainTagger, Row, new_trainer, packed_batch, padded_batch, rows, stock
from tests.support.reports import messages


def renaming(**names: str) -> Callable[[Callable[[list[Row]], Any]], Callable[[list[Row]], Any]]:
    """Return what gives the keys of a collator's batch other names."""
    return lambda collate: lambda features: {names.get(k, k): v for k, v in collate(features).items()}


class OtherNames(PlainTagger):
    def forward(self, x, targets=None, attention_mask=None):
        return super().forward(x, targets, attention_mask)


class RowTargets(Classifier):
    """A transformers model; its target is a tensor ``[B]``, its input packed."""

    def forward(self, x=None, targets=None, attention_mask=None):
        return super().forward(x, targets, attention_mask)


@pytest.mark.needs_patch(
    "transformers.trainer:Trainer.evaluation_loop", "transformers.trainer:Trainer.prediction_step"
)
@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize(("model", "labels"), [(OtherNames, "tokens"), (RowTargets, "row")])
def test_the_target_is_named_and_the_advice_gives_the_loss(tmp_path, model, labels, metrics):
    data = rows(labels=labels)
    rename = renaming(input_ids="x", labels="targets")
    options = {"compute_metrics": lambda p: {"n": len(p.label_ids)}} if metrics else {}

    def build(collate: Any, **changes: Any) -> Trainer:
        return new_trainer(
            tmp_path, model, data, rename(collate), remove_unused_columns=False, options=options, **changes
        )

    trainer = build(packed_batch)
    (message,) = messages(trainer, "evaluate", None)
    assert "label_names is [], the batch has the keys ['x', 'targets']" in message
    assert "name the target: TrainingArguments(label_names=['targets'])" in message
    assert "eval_loss" not in trainer.evaluate()
    followed = build(packed_batch, label_names=ast.literal_eval(re.findall(r"label_names=(\[[^\]]*\])\)", message)[0]))
    assert messages(followed, "evaluate", None) == []
    with stock():
        expected = build(padded_batch, label_names=["targets"]).evaluate()
    found = followed.evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert found.get("eval_n") == expected.get("eval_n") == (len(data) if metrics else None)


class SignatureAlone(PlainTagger):
    """A model of which only the signature of its ``forward`` matters."""

    def forward(self, x):
        raise NotImplementedError

    def __call__(self, **inputs):
        return {"logits": torch.zeros(len(inputs))}


#: The model's ``forward``, the keys of the batch, what the warning says, and ``label_names`` if they are given.
CASES: dict[str, tuple[Any, ...]] = {
    # What the model does not take is the target.
    "taken out by the Trainer": (lambda x, mask=None: None, "x mask gold", "name the target: .*'gold'"),
    "a required parameter": (lambda x, gold: None, "x gold", "if 'gold' is the target, name it: .*'gold'"),
    "two of them": (lambda x, a=None, b=None: None, "x a b", r"if 'a' or 'b' is the target, name it: .*=\['b'\]"),
    "beside inputs that one may leave out": (
        lambda x, gold=None, token_type_ids=None, inputs_embeds=None: None,
        "x token_type_ids inputs_embeds gold",
        r"name the target: .*label_names=\['gold'\]",
    ),
    "the target first": (lambda x, targets: None, "targets x", r"name the target: .*\['targets'\]"),
    "the main input last": (lambda gold=None, x=None: None, "gold x", r"name the target: .*\['gold'\]"),
    "positions": (
        lambda x, **kwargs: None,
        "x start_positions end_positions",
        r"label_names is \['labels'\], .* name the target: .*label_names=\['start_positions', 'end_positions'\]",
        ["labels"],
    ),
    "one of two names": (
        lambda x, labels=None, next_label=None: None,
        "x labels",
        r"label_names is \['labels', 'next_label'\], .* name the target: .*label_names=\['labels'\]",
        ["labels", "next_label"],
    ),
    "no target": (lambda x: None, "x", "none of them looks like a target: let the collator return it"),
    "a model of any keys": (lambda **kwargs: None, "x more", "if 'more' is the target"),
    "no signature": (type, "x gold", "if 'gold' is the target, name it"),
}


@pytest.mark.parametrize("case", CASES)
def test_which_key_is_advised(tmp_path, case):
    forward, keys, message, *label_names = CASES[case]

    def collate(features: list[Row]) -> Any:
        packed = packed_batch(features)
        return {key: packed["input_ids"] if key == "x" else torch.ones(len(features)) for key in keys.split()}

    options = {"remove_unused_columns": False} | ({"label_names": label_names[0]} if label_names else {})
    trainer = new_trainer(tmp_path, SignatureAlone, rows(4), collate, **options)
    trainer.model.forward = forward
    if case == "the main input last":
        trainer.model.main_input_name = "x"
    (found,) = messages(trainer, "evaluate", None)
    assert re.search(message, found), found
    assert "'x'" not in found.partition("; ")[2]


def test_a_model_that_returns_a_loss_without_labels(tmp_path):
    class Contrastive(PlainTagger):
        def forward(self, input_ids, return_loss=True):
            logits = super().forward(input_ids)["logits"]
            return {"loss": logits.data.mean(), "logits": logits}

    def collate(features: list[Row]) -> Any:
        return {"input_ids": packed_batch(features)["input_ids"]}

    trainer = new_trainer(tmp_path, Contrastive, rows(), collate)
    assert messages(trainer, "evaluate", None) == []
    assert "eval_loss" in trainer.evaluate()

    def without(features: list[Row]) -> Any:
        return {**collate(features), "return_loss": False}

    (message,) = messages(new_trainer(tmp_path, Contrastive, rows(), without), "evaluate", None)
    assert "none of them looks like a target" in message


def test_no_word_where_there_is_nothing_to_say(tmp_path):
    rename = renaming(input_ids="x", labels="targets")
    trainer, padded = (
        new_trainer(tmp_path, OtherNames, rows(), rename(collate), remove_unused_columns=False)
        for collate in (packed_batch, padded_batch)
    )
    assert messages(trainer, "predict", rows()) == []
    assert messages(padded, "evaluate", None) == []
    covered = new_trainer(tmp_path, PlainTagger, rows(), packed_batch, label_names=["labels"])
    assert messages(covered, "evaluate", None) == []
    with warnings.catch_warnings():  # a step outside of an evaluation
        warnings.simplefilter("error", hf_packfix.HFPackfixWarning)
        trainer.prediction_step(trainer.model, rename(packed_batch)(rows(3)), False)
