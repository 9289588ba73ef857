"""Batches of rows of similar lengths: grouped as stock groups the same rows under the key ``input_ids``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from hf_packfix import DataCollatorForPackedSequence
from tests.support.oracle import new_trainer, stock

LENGTHS = torch.randint(1, 60, (40,), generator=torch.Generator().manual_seed(0)).tolist()
if "group_by_length" in TrainingArguments.__dataclass_fields__:
    GROUPED: dict[str, Any] = {"group_by_length": True}
else:
    GROUPED = {"train_sampling_strategy": "group_by_length"}


class Net(nn.Module):
    main_input_name = "signal"

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(2, 4), nn.Linear(4, len(LENGTHS))

    def forward(self, signal: Any = None, input_ids: Any = None, labels: Any = None) -> Any:
        logits = self.head(self.gru(signal if input_ids is None else input_ids)[1][-1])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class OfTokens(Net):
    main_input_name = "input_ids"


def rows(key: str) -> list[dict[str, Any]]:
    return [{key: torch.ones(n, 2), "labels": number} for number, n in enumerate(LENGTHS)]


def batches(tmp_path, data: Any, model: type[Net] = Net, loader: str = "train", **changes: Any) -> list[list[int]]:
    """Return the numbers of the rows, batch by batch."""
    trainer = new_trainer(tmp_path, model(), data, DataCollatorForPackedSequence(), **GROUPED, **changes)
    torch.manual_seed(0)
    return [batch["labels"].tolist() for batch in getattr(trainer, f"get_{loader}_dataloader")()]


@pytest.mark.needs_patch(
    "transformers.trainer:Trainer._get_train_sampler", "transformers.trainer:Trainer._get_eval_sampler"
)
def test_rows_are_grouped_by_the_main_input_of_the_model(tmp_path):
    for loader in ("train", "eval"):
        found = batches(tmp_path, rows("signal"), loader=loader)
        with stock():
            assert found == batches(tmp_path, rows("input_ids"), OfTokens, loader)
        assert sorted(row for batch in found for row in batch) == list(range(len(LENGTHS)))


def test_grouped_rows_train(tmp_path):
    trainer = new_trainer(tmp_path, Net(), rows("signal"), DataCollatorForPackedSequence(), **GROUPED)
    assert trainer.train().training_loss > 0
    assert trainer.processing_class is None


@pytest.mark.parametrize("name", ["length", "n"])
def test_a_column_of_lengths_that_forward_does_not_take(tmp_path, name):
    datasets = pytest.importorskip("datasets")
    listed = [
        {**row, "signal": row["signal"].tolist(), name: n} for row, n in zip(rows("signal"), LENGTHS, strict=True)
    ]
    found = batches(tmp_path, datasets.Dataset.from_list(listed), length_column_name=name)
    assert found == batches(tmp_path, rows("signal"))


def test_rows_without_the_main_input_fail_as_in_stock(tmp_path):
    for model, data in ((Net, rows("other")), (OfTokens, rows("signal"))):
        with pytest.raises(ValueError, match=r"infer lengths for datasets whose items .* with an 'input_ids' key"):
            batches(tmp_path, data, model)
