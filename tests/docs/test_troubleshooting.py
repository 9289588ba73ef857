"""The page of troubles, and the README's table: each text is that of the error, and what the row advises cures it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers import PretrainedConfig, PreTrainedModel, Trainer

import hf_packfix
from hf_packfix import DataCollatorForPackedSequence, batch_size, concatenate, with_data
from hf_packfix.activation import versions
from hf_packfix.models import RecurrentCache, RecurrentConfig, RecurrentForSequenceClassification
from tests.support.interpreters import python
from tests.support.oracle import new_trainer
from tests.support.reports import Stream

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "hf_packfix/docs/troubleshooting.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8").partition("| error | cause | cure |")[2].partition("\n\n")[0]
ROWS = [{"x": torch.ones(2 + number, 3), "labels": number % 2} for number in range(4)]
PACKED = pack_sequence([row["x"] for row in reversed(ROWS)])
IDS = pack_sequence([torch.tensor([1, 2])])

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="the texts are those of recent releases"
)


class Model(PreTrainedModel):
    config_class = PretrainedConfig
    main_input_name = "x"

    def __init__(self, body: Callable[..., Any] | None = None) -> None:
        super().__init__(PretrainedConfig())
        self.gru, self.head, self.body = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2), body
        self.post_init()

    def forward(self, x, labels=None):
        if self.body is not None:
            return self.body(self.gru(x)[0], labels)
        logits = self.head(self.gru(x)[1][-1])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class WithTargets(Model):
    def forward(self, x, targets=None):
        return super().forward(x, targets)


class HandMade(Trainer):
    """The fix that many write."""

    def _prepare_input(self, data):
        if isinstance(data, PackedSequence):
            return PackedSequence(super()._prepare_input(data.data), *data[1:])
        return super()._prepare_input(data)


@pytest.fixture
def trainer(tmp_path):
    """Return a function that makes a Trainer."""

    def make(model=None, rows=ROWS, collator=None, cls=Trainer, **arguments: Any) -> Trainer:
        usual = {"max_steps": 2, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
        collator = collator or DataCollatorForPackedSequence()
        return new_trainer(tmp_path, model or Model(), rows, collator, trainer=cls, **{**usual, **arguments})

    return make


def rows_of(text: str) -> list[str]:
    """Return the rows of tables in a page."""
    rows = [line.replace("hf_packfix/docs/", "") for line in text.splitlines() if line.startswith("| ")]
    return [row for row in rows if row != "| error | cause | cure |"]


def fails_with(text: str, function: Callable[[], Any]) -> None:
    """Check that a row has the text and that the function fails with it."""
    assert text in PAGE
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the text is compared below, with the name of the class)
        function()
    assert text in f"{type(caught.value).__name__}: {caught.value}"


def test_the_errors_of_stock_are_gone_with_the_plugin(trainer):
    hf_packfix.disable()
    fails_with("Expected data to be a list or tuple of length 2", trainer().train)
    fails_with("'PackedSequence' object has no attribute 'numel'", trainer(cls=HandMade).train)
    fails_with("'TensorInformation' object has no attribute 'device'", trainer(rows=Stream(ROWS), cls=HandMade).train)
    hf_packfix.enable()
    trainer().train()
    trainer(cls=HandMade).train()
    trainer(rows=Stream(ROWS)).train()


def test_code_that_takes_it_for_a_tensor_fails_as_the_page_says(trainer):
    pooled = trainer(Model(lambda steps, labels: {"loss": steps.mean(1)}))
    fails_with("'PackedSequence' object has no attribute 'mean'", pooled.train)
    for name in re.findall(r"`(\w+)`", PAGE.partition("'mean'")[2].partition("|")[0]):
        assert not hasattr(PACKED, name), name
    last = trainer(Model(lambda steps, labels: {"loss": steps[:, -1]}))
    fails_with("tuple indices must be integers or slices, not tuple", last.train)


def test_layers_that_take_tensors_take_the_data():
    linear, embedding = nn.Linear(3, 4), nn.Embedding(3, 4)
    fails_with("linear(): argument 'input' (position 1) must be Tensor, not PackedSequence", lambda: linear(PACKED))
    assert with_data(PACKED, linear(PACKED.data)).data.shape == (len(PACKED.data), 4)
    for name, layer, packed in (("embedding()", embedding, IDS), ("relu()", nn.ReLU(), PACKED)):
        assert f"`{name}`" in PAGE
        with pytest.raises(TypeError, match="must be Tensor, not PackedSequence"):
            layer(packed)


def test_packed_labels_stack_as_the_page_says(trainer):
    rows = [{**row, "labels": [0.0, 1.0]} for row in ROWS]
    text = "cross_entropy_loss(): argument 'target' (position 2) must be Tensor, not PackedSequence"
    fails_with(text, trainer(rows=rows).train)
    trainer(rows=rows, collator=DataCollatorForPackedSequence(tensor_keys=["labels"])).train()


def test_batches_that_cannot_be_made(trainer):
    default = transformers.default_data_collator
    fails_with("stack expects each tensor to be equal size", trainer(collator=default).train)
    trainer().train()
    rows = [row["x"] for row in ROWS]
    fails_with("`lengths` array must be sorted in decreasing order", lambda: pack_sequence(rows))
    pack_sequence(rows, enforce_sorted=False)
    empty = torch.empty(0, 3)
    fails_with(
        "Length of all samples has to be greater than 0", lambda: pack_sequence([rows[0], empty], enforce_sorted=False)
    )
    fails_with(
        "is empty: there is nothing to pack", lambda: DataCollatorForPackedSequence()([{"x": empty}, {"x": rows[0]}])
    )


def test_columns_that_the_trainer_drops(trainer):
    named = [{"features": row["x"], "labels": row["labels"]} for row in ROWS]
    fails_with("forward() missing 1 required positional argument", trainer(rows=named).train)

    def collate(rows):
        return DataCollatorForPackedSequence()([{"x": row["features"], "labels": row["labels"]} for row in rows])

    fails_with("KeyError: 'features'", trainer(rows=named, collator=collate).train)
    trainer(rows=named, collator=collate, remove_unused_columns=False).train()


def test_columns_that_the_trainer_keeps(trainer):
    numbered = [{**row, "id": 7} for row in ROWS]
    text = "forward() got an unexpected keyword argument 'id'"
    fails_with(text, trainer(rows=numbered, remove_unused_columns=False).train)
    without = Dataset.from_list(numbered).remove_columns("id").with_format("torch")
    trainer(rows=without, remove_unused_columns=False).train()


def test_arithmetic_of_tuples():
    fails_with('can only concatenate tuple (not "int") to tuple', lambda: PACKED + 1)
    fails_with("'tuple' object has no attribute 'dim'", lambda: nn.GRU(3, 4)(PACKED * 2))
    assert torch.equal(with_data(PACKED, PACKED.data + 1).data, PACKED.data + 1)
    fails_with(
        "expected Tensor as element 0 in argument 0, but got PackedSequence", lambda: torch.cat([PACKED, PACKED])
    )
    assert with_data(PACKED, torch.cat([PACKED.data, PACKED.data], -1)).data.shape == (len(PACKED.data), 6)
    assert batch_size(concatenate([PACKED, PACKED])) == 8


@pytest.mark.parametrize(
    ("enforce_sorted", "text"),
    [(False, "INDICES element is out of DATA bounds"), (True, "Expected hidden size (1, 5, 2), got [1, 4, 2]")],
)
def test_an_initial_state_for_len_sequences(enforce_sorted, text):
    rows = [torch.ones(5 - number, 3) for number in range(5)]
    x = pack_sequence(rows if enforce_sorted else rows[::-1], enforce_sorted=enforce_sorted)
    gru = nn.GRU(3, 2)
    fails_with(text, lambda: gru(x, torch.zeros(1, len(x), 2)))
    gru(x, torch.zeros(1, batch_size(x), 2))


def test_float64_rows_fail_until_they_are_cast(trainer):
    x = pack_sequence([torch.from_numpy(np.ones((2, 3)))])
    fails_with("RNN input dtype (torch.float64) does not match weight dtype (torch.float32)", lambda: nn.GRU(3, 4)(x))
    fails_with("mat1 and mat2 must have the same dtype, but got Double and Float", lambda: nn.LSTM(3, 4)(x))
    assert nn.LSTM(3, 4)(x.float())[0].data.shape == (2, 4)
    double = [{**row, "x": row["x"].double().numpy()} for row in ROWS]
    fails_with("RNN input dtype (torch.float64) does not match", trainer(rows=double).train)
    trainer(rows=[{**row, "x": row["x"].astype("float32")} for row in double]).train()


def test_rows_without_labels_need_a_model_without_them(trainer):
    class NeedsLabels(Model):
        def forward(self, x, labels):
            return super().forward(x, labels)

    class Optional(Model):
        def forward(self, x, labels=None):
            logits = self.head(self.gru(x)[1][-1])
            return {"logits": logits} if labels is None else super().forward(x, labels)

    class NoLoss(Optional):
        def forward(self, x, labels=None):
            return {"loss": None, **super().forward(x, labels)}

    unlabelled = [{"x": row["x"]} for row in ROWS]
    text = "forward() missing 1 required positional argument: 'labels'"
    fails_with(text, lambda: trainer(NeedsLabels()).predict(unlabelled))
    fails_with("holds a NoneType, which cannot be joined", lambda: trainer(NoLoss()).predict(unlabelled))
    assert trainer(Optional()).predict(unlabelled).predictions.shape == (4, 2)


def test_compiled_code_needs_with_data(trainer):
    class Replaced(Model):
        def forward(self, x, labels=None):
            return super().forward(x._replace(data=x.data * 2), labels)

    class WithData(Model):
        def forward(self, x, labels=None):
            return super().forward(with_data(x, x.data * 2), labels)

    eager = {"torch_compile_backend": "eager"}  # compiles nothing, but traces
    fails_with("not enough values to unpack (expected 4, got 0)", trainer(Replaced(), **eager).train)
    trainer(WithData(), **eager).train()


def test_outputs_that_cannot_be_joined_are_left_out_or_kept_apart(trainer):
    class Attentive(Model):
        def forward(self, x, labels=None):
            states = hf_packfix.pad(self.gru(x)[0])
            return {**super().forward(x, labels), "attentions": states @ states.mT}

    class WithCache(Model):
        def forward(self, x, labels=None):
            return {**super().forward(x, labels), "memory": RecurrentCache(torch.zeros(1, 2, 4))}

    class WithState(Model):
        def forward(self, x, labels=None):
            return {**super().forward(x, labels), "state": self.gru(x)[1]}

    small = {"per_device_eval_batch_size": 2}
    rows = [*reversed(ROWS)]
    fails_with(
        "has steps of shape [3] in batch 1 of the evaluation, but [5]",
        lambda: trainer(Attentive(), **small).predict(rows),
    )
    predicted = trainer(Attentive(), **small).predict(rows, ignore_keys=["loss", "attentions"])
    assert predicted.predictions.shape == (4, 2)
    apart = trainer(Attentive(), eval_do_concat_batches=False, **small).predict(rows).predictions
    assert [maps.shape for _, maps in apart] == [(2, 5, 5), (2, 3, 3)]
    fails_with("holds a RecurrentCache, which cannot be joined", lambda: trainer(WithCache(), **small).predict(rows))
    assert trainer(WithCache(), **small).predict(rows, ignore_keys=["loss", "memory"]).predictions.shape == (4, 2)
    assert "`has shape [1, 2, 4] in a batch of 2 rows`" in PAGE
    with pytest.warns(hf_packfix.HFPackfixWarning, match=r"has shape \[1, 2, 4\] in a batch of 2 rows"):
        trainer(WithState(), **small).predict(rows)


def test_rows_are_grouped_by_length_with_the_plugin(trainer):
    grouped = {"train_sampling_strategy": "group_by_length"}
    text = "Can only automatically infer lengths for datasets whose items are dictionaries with an 'input_ids' key"
    with hf_packfix.disabled():
        fails_with(text, lambda: trainer(**grouped).get_train_dataloader())
    trainer(**grouped).train()


def test_a_saved_model_loads_with_the_plugin_or_the_models(tmp_path):
    RecurrentForSequenceClassification(RecurrentConfig(vocab_size=9, hidden_size=4)).save_pretrained(tmp_path)
    program = "from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1])"
    text = "model type `recurrent` but Transformers does not recognize this architecture"
    assert text in PAGE
    for before, expected in (("", text), ("import hf_packfix; ", ""), ("import hf_packfix.models; ", "")):
        done = python("-c", f"import sys; {before}{program}", tmp_path)
        assert (expected in done.stderr) if expected else done.returncode == 0, done.stderr


def test_label_names_bring_the_eval_loss_back(trainer):
    assert "no `eval_loss`" in PAGE
    rows = [{"x": row["x"], "targets": row["labels"]} for row in ROWS]
    assert "`HFPackfixWarning`" in PAGE
    with pytest.warns(hf_packfix.HFPackfixWarning, match="label_names"):
        assert "eval_loss" not in trainer(WithTargets(), rows).evaluate()
    assert "eval_loss" in trainer(WithTargets(), rows, label_names=["targets"]).evaluate()


def test_several_gpus_in_one_process_are_refused(trainer):
    alone = trainer()
    alone.args._n_gpu = 2
    start, _, end = re.search(r"`(nn\.DataParallel) (\.\.\.) (cannot [^`]*)`", PAGE).groups()
    with pytest.raises(ValueError, match=f"{re.escape(start)}.*{re.escape(end)}"):
        alone.train()


def test_neftune_fails_as_the_page_says(trainer):
    model = RecurrentForSequenceClassification(RecurrentConfig(vocab_size=9, hidden_size=4))
    rows = [{"input_ids": [1, 2, 3], "labels": 1}] * 4
    assert "`IndexError: Dimension out of range` with NEFTune" in PAGE
    with pytest.raises(IndexError, match="Dimension out of range"):
        trainer(model, rows, neftune_noise_alpha=5.0).train()


def test_inconsistent_fields_are_named(trainer):
    broken = PackedSequence(torch.ones(5, 3), torch.tensor([2, 2]))
    batch = {"x": broken, "labels": torch.tensor([0, 1])}
    fails_with("this PackedSequence is inconsistent", trainer(collator=lambda rows: batch).train)


def test_an_old_release_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(versions.MINIMUM, "transformers", "99.0")
    assert "`UnsupportedVersionError`" in PAGE
    with pytest.raises(hf_packfix.UnsupportedVersionError):
        hf_packfix.enable()
    hf_packfix.enable(force=True)


def test_every_row_is_shown_by_a_test():
    """Each row has a text that a function above names; the README's rows are among those of the page."""
    texts = {
        node.value
        for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 10
    }
    rows = rows_of(PAGE)
    assert len(rows) >= 25
    for row in rows:
        error = row.split(" | ")[0]
        assert "DataParallel" in error or any(text in error for text in texts), row
    assert len(rows_of(README)) >= 8
    assert set(rows_of(README)) <= set(rows)
