"""The README's table of troubles: each text is that of the error, and what the table advises cures it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import IterableDataset
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

import hf_packfix
from hf_packfix import DataCollatorForPackedSequence
from hf_packfix.activation import versions
from hf_packfix.models import RecurrentConfig, RecurrentForSequenceClassification

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
TABLE = README.partition("| error | cause | cure |")[2].partition("\n\n")[0]
ROWS = [{"x": torch.ones(2 + number, 3), "labels": number % 2} for number in range(4)]
SHORT = [{"x": row["x"][:2], "labels": row["labels"]} for row in ROWS]
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


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


@pytest.fixture
def trainer(tmp_path):
    """Return a function that makes a Trainer."""

    def make(model=None, rows=ROWS, collator=None, cls=Trainer, **arguments: Any) -> Trainer:
        options = {"max_steps": 2, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        return cls(
            model=Model() if model is None else model,
            args=TrainingArguments(str(tmp_path), **{**options, **arguments}),
            data_collator=collator or DataCollatorForPackedSequence(),
            train_dataset=rows,
            eval_dataset=rows,
        )

    return make


def fails_with(text: str, function: Callable[[], Any]) -> None:
    """Check that the table has the text and that the function fails with it."""
    assert text in TABLE
    with pytest.raises(Exception, match=re.escape(text)):
        function()


def test_without_the_plugin(trainer):
    hf_packfix.disable()
    fails_with("Expected data to be a list or tuple of length 2", trainer().train)
    fails_with("'PackedSequence' object has no attribute 'numel'", trainer(cls=HandMade).train)
    fails_with("'TensorInformation' object has no attribute 'device'", trainer(rows=Stream(), cls=HandMade).train)
    hf_packfix.enable()
    trainer().train()
    trainer(cls=HandMade).train()
    trainer(rows=Stream()).train()


def test_code_that_takes_it_for_a_tensor(trainer):
    pooled = trainer(Model(lambda steps, labels: {"loss": steps.mean(1)}))
    fails_with("'PackedSequence' object has no attribute 'mean'", pooled.train)
    for name in re.findall(r"`(\w+)`", TABLE.partition("'mean'")[2].partition("|")[0]):
        assert not hasattr(PACKED, name), name
    last = trainer(Model(lambda steps, labels: {"loss": steps[:, -1]}))
    fails_with("tuple indices must be integers or slices, not tuple", last.train)


def test_layers_that_take_tensors():
    linear, embedding = nn.Linear(3, 4), nn.Embedding(3, 4)
    fails_with("linear(): argument 'input' (position 1) must be Tensor, not PackedSequence", lambda: linear(PACKED))
    assert PACKED._replace(data=linear(PACKED.data)).data.shape == (len(PACKED.data), 4)
    for name, layer, packed in (("embedding()", embedding, IDS), ("relu()", nn.ReLU(), PACKED)):
        assert f"`{name}`" in TABLE
        with pytest.raises(TypeError, match="must be Tensor, not PackedSequence"):
            layer(packed)


def test_packed_labels(trainer):
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

    trainer(rows=named, collator=collate, remove_unused_columns=False).train()


def test_no_eval_loss(trainer):
    assert "no `eval_loss`" in TABLE
    rows = [{"x": row["x"], "targets": row["labels"]} for row in ROWS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hf_packfix.HFPackfixWarning)
        assert "eval_loss" not in trainer(WithTargets(), rows).evaluate()
    assert "eval_loss" in trainer(WithTargets(), rows, label_names=["targets"]).evaluate()


def test_several_gpus_in_one_process(trainer):
    alone = trainer()
    alone.args._n_gpu = 2
    start, _, end = re.search(r"`(nn\.DataParallel) (\.\.\.) (cannot [^`]*)`", TABLE).groups()
    with pytest.raises(ValueError, match=f"{re.escape(start)}.*{re.escape(end)}"):
        alone.train()


def test_neftune(trainer):
    model = RecurrentForSequenceClassification(RecurrentConfig(vocab_size=9, hidden_size=4))
    rows = [{"input_ids": [1, 2, 3], "labels": 1}] * 4
    assert "`IndexError: Dimension out of range` with NEFTune" in TABLE
    with pytest.raises(IndexError, match="Dimension out of range"):
        trainer(model, rows, neftune_noise_alpha=5.0).train()


def test_inconsistent(trainer):
    broken = PackedSequence(torch.ones(5, 3), torch.tensor([2, 2]))
    batch = {"x": broken, "labels": torch.tensor([0, 1])}
    fails_with("this PackedSequence is inconsistent", trainer(collator=lambda rows: batch).train)


def test_too_old(monkeypatch):
    monkeypatch.setitem(versions.MINIMUM, "transformers", "99.0")
    assert "`UnsupportedVersionError`" in TABLE
    with pytest.raises(hf_packfix.UnsupportedVersionError):
        hf_packfix.enable()
    hf_packfix.enable(force=True)


def test_the_table_is_long_enough():
    assert len(TABLE.strip().splitlines()) - 1 >= 10
