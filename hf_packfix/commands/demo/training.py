"""The demo's training, packed and padded: what differs is the collator, and how the model reads a batch.

Both models have the same weights. The packed one is ``RecurrentForSequenceClassification`` as it is; its GRU is that
of ``hf_packfix.rnn``. It would take the padding out of a padded batch with a mask, and run the same GRU. So the padded
model reads its batches as most models do: torch's GRU runs over every step, and the mask picks each row's last state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_sequence
from transformers import ProgressCallback, Trainer, TrainingArguments, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_packfix.collator import DataCollatorForPackedSequence
from hf_packfix.commands.demo.data import CHANNELS, SPEAKERS, Row
from hf_packfix.models import RecurrentConfig, RecurrentForSequenceClassification
from hf_packfix.models.loss import sequence_loss
from hf_packfix.packing.packed import lengths

__all__ = ["PACKED", "PADDED", "Run", "Way", "new_trainer", "train"]


class _PaddedClassifier(RecurrentForSequenceClassification):
    """The same model, with its GRU run over real steps and padding."""

    def forward(  # type: ignore[override]
        self,
        input_values: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **loss_kwargs: Any,
    ) -> SequenceClassifierOutput:
        states = self.recurrent(input_values=input_values, use_cache=False).last_hidden_state
        last = attention_mask.sum(1) - 1
        logits = self.classifier(states[torch.arange(len(last)), last])
        loss = None if labels is None else sequence_loss(logits, labels, self.config, num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _pad(rows: list[Row]) -> dict[str, Tensor]:
    values = [row["input_values"] for row in rows]
    masks = [torch.ones(len(value), dtype=torch.long) for value in values]
    return {
        "input_values": pad_sequence(values, batch_first=True),
        "attention_mask": pad_sequence(masks, batch_first=True),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


@dataclass(frozen=True)
class Way:
    """How to train: a name for the progress bar, a model and a collator."""

    name: str
    model_class: type[RecurrentForSequenceClassification]
    collate: Callable[[list[Row]], dict[str, Any]]

    def new_model(self) -> RecurrentForSequenceClassification:
        """Return a model with random weights: in one direction, whose states right padding does not change."""
        config = RecurrentConfig(
            cell_type="gru", input_size=CHANNELS, hidden_size=128, num_hidden_layers=2, num_labels=SPEAKERS
        )
        return self.model_class(config)


PACKED = Way("packed", RecurrentForSequenceClassification, DataCollatorForPackedSequence())
PADDED = Way("padded", _PaddedClassifier, _pad)


@dataclass
class Run:
    """A training and its test.

    Attributes:
        trainer: with the trained model.
        losses: of every training batch, in order.
        steps: that the model was given in training, padding included.
        first_lengths: the lengths of the first training batch, if it was packed.
        seconds: of training, without the test.
        predictions: float32 ``[370, 9]``, the logits of the test rows.
        accuracy: on the test rows.
    """

    trainer: Trainer
    losses: list[float] = field(default_factory=list)
    steps: int = 0
    first_lengths: list[int] = field(default_factory=list)
    seconds: float = 0.0
    predictions: Any = None
    accuracy: float = 0.0

    def record(self, model: torch.nn.Module, _: Any, inputs: dict[str, Any], output: Any) -> None:
        """Add a training batch: a forward hook, since the Trainer's logs round the losses in older releases."""
        if model.training:
            values = inputs["input_values"]
            if not self.losses and isinstance(values, PackedSequence):
                self.first_lengths = lengths(values).tolist()
            self.losses.append(float(output.loss.detach()))
            self.steps += values.data.shape[:-1].numel()  # `[N, 12]` or `[B, T, 12]`

    def largest_difference(self, other: Run) -> float:
        """Return the largest difference between the losses of two runs, batch by batch."""
        return max(abs(mine - theirs) for mine, theirs in zip(self.losses, other.losses, strict=True))


def train(way: Way, train_rows: list[Row], test_rows: list[Row], directory: Path, seed: int, epochs: int) -> Run:
    """Train a new model, and predict the test rows."""
    set_seed(seed)
    model = way.new_model()
    run = Run(new_trainer(way, model, train_rows, directory, seed, epochs))
    hook = model.register_forward_hook(run.record, with_kwargs=True)
    run.seconds = run.trainer.train().metrics["train_runtime"]
    hook.remove()
    prediction = run.trainer.predict(test_rows)  # type: ignore[arg-type]
    run.predictions = prediction.predictions
    run.accuracy = float(np.mean(run.predictions.argmax(-1) == prediction.label_ids))
    return run


def new_trainer(
    way: Way,
    model: RecurrentForSequenceClassification,
    train_rows: list[Row],
    directory: Path,
    seed: int,
    epochs: int,
) -> Trainer:
    """Return a stock Trainer."""
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        num_train_epochs=epochs,
        learning_rate=5e-3,
        weight_decay=0.01,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=True,  # where the times compare the layers; also turns off pinned memory and its warning
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=train_rows, data_collator=way.collate)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_ProgressBar(way.name))
    return trainer


class _ProgressBar(ProgressCallback):
    """The Trainer's progress bars with a name, and without the dictionaries of its logs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing."""
