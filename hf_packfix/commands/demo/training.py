"""The demo's training, packed and padded: what differs is the collator, and how the model reads a batch.

Both models have the same weights. The packed one is ``RecurrentForSequenceClassification`` as it is; its GRU is that
of ``hf_packfix.rnn``. It would take the padding out of a padded batch with a mask, and run the same GRU. So the padded
model reads its batches as most models do: torch's GRU runs over every step, and the mask picks each row's last state.

They train in turns, some epochs each, and what is measured is CPU time: on a busy machine both wait, and the ratio of
their times stays that of a quiet one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_sequence
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainingArguments, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_packfix.collator import DataCollatorForPackedSequence
from hf_packfix.commands.demo.data import CHANNELS, SPEAKERS, Row
from hf_packfix.models import RecurrentConfig, RecurrentForSequenceClassification
from hf_packfix.models.loss import sequence_loss
from hf_packfix.packing.packed import lengths

BATCH, TURNS = 32, 5


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
    """How to train: a model and a collator."""

    model_class: type[RecurrentForSequenceClassification]
    collate: Callable[[list[Row]], dict[str, Any]]

    def new_model(self) -> RecurrentForSequenceClassification:
        """Return a model with random weights: in one direction, whose states right padding does not change."""
        config = RecurrentConfig(
            cell_type="gru", input_size=CHANNELS, hidden_size=128, num_hidden_layers=2, num_labels=SPEAKERS
        )
        return self.model_class(config)


PACKED = Way(RecurrentForSequenceClassification, DataCollatorForPackedSequence())
PADDED = Way(_PaddedClassifier, _pad)


@dataclass
class Run:
    """A training and its test.

    Attributes:
        trainer: with the trained model.
        bar: the progress bar.
        losses: of every training batch, in order.
        steps: that the model was given in training, padding included.
        first_lengths: the lengths of the first training batch, if it was packed.
        seconds: of CPU time in training, without the test.
        predictions: float32 ``[370, 9]``, the logits of the test rows.
        accuracy: on the test rows.
    """

    trainer: Trainer
    bar: tqdm[Any]
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
            self.bar.update()
            self.steps += values.data.shape[:-1].numel()  # `[N, 12]` or `[B, T, 12]`

    def largest_difference(self, other: Run) -> float:
        """Return the largest difference between the losses of two runs, batch by batch."""
        return max(abs(mine - theirs) for mine, theirs in zip(self.losses, other.losses, strict=True))


def train(train_rows: list[Row], test_rows: list[Row], directory: Path, seed: int, epochs: int) -> tuple[Run, Run]:
    """Train two new models, packed and padded, in turns, and predict the test rows with each."""
    turns, steps = min(TURNS, epochs), epochs * math.ceil(len(train_rows) / BATCH)
    with tqdm(total=2 * steps, desc="training, packed and padded in turns") as bar:
        runs, hooks = [], []
        for way in (PACKED, PADDED):
            set_seed(seed)
            model = way.new_model()
            run = Run(new_trainer(way, model, train_rows, directory, seed), bar)
            hooks.append(model.register_forward_hook(run.record, with_kwargs=True))
            runs.append(run)
        for turn in range(turns):
            for run in runs:
                set_seed(seed + turn)  # so that both get the rows in the same order
                run.trainer.args.num_train_epochs = epochs // turns + (turn < epochs % turns)
                started = time.process_time()
                run.trainer.train()
                run.seconds += time.process_time() - started
    for hook in hooks:
        hook.remove()
    for run in runs:
        prediction = run.trainer.predict(test_rows)  # type: ignore[arg-type]
        run.predictions = prediction.predictions
        run.accuracy = float(np.mean(run.predictions.argmax(-1) == prediction.label_ids))
    return runs[0], runs[1]


def new_trainer(
    way: Way,
    model: RecurrentForSequenceClassification,
    train_rows: list[Row],
    directory: Path,
    seed: int,
) -> Trainer:
    """Return a stock Trainer."""
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="constant",  # so that turns make one training
        weight_decay=0.01,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=True,  # where the times compare the layers; also turns off pinned memory and its warning
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=train_rows, data_collator=way.collate)
    trainer.remove_callback(ProgressCallback)  # which has a bar for each turn, and prints the logs
    return trainer
