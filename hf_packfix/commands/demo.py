"""The demo: who is speaking? Real recordings, an unchanged ``transformers.Trainer``, packed beside padded.

The data are JapaneseVowels (Kudo, Toyama, Shimbo 1999; from the UCR/UEA archive, shipped with sktime). Nine speakers
utter two vowels; 270 training and 370 test series of 7 to 29 steps with 12 cepstrum coefficients.

Both models have the same weights. The packed one is ``RecurrentForSequenceClassification`` as it is; its GRU is that
of ``hf_packfix.rnn``. It would take the padding out of a padded batch with a mask, and run the same GRU. So the padded
model reads its batches as most models do: torch's GRU runs over every step, and the mask picks each row's last state.

They train in turns, some epochs each, and CPU time is measured: on a busy machine both wait, and the ratio of their
times stays that of a quiet one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_sequence
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainingArguments, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput

import hf_packfix
from hf_packfix.collator import DataCollatorForPackedSequence
from hf_packfix.commands import CommandError
from hf_packfix.models import RecurrentConfig, RecurrentForSequenceClassification
from hf_packfix.models.loss import sequence_loss
from hf_packfix.packing.packed import lengths

BATCH, TURNS = 32, 5

Row = dict[str, Any]


def run(seed: int, epochs: int, output_dir: Path, *, plot: bool = True) -> int:
    """Train on packed and on padded batches, compare, save, load and check; print the accuracy in the last line.

    Args:
        seed: of the weights and the shuffling.
        epochs: passes over the 270 training series.
        output_dir: receives ``model/``, and ``demo.png`` if ``plot``.
        plot: whether to draw the picture.

    Returns:
        The exit status: 0.

    Raises:
        CommandError: a package of the demo extra is missing, or ``output_dir`` cannot be written; hf_packfix is off.
    """
    started = time.monotonic()
    if not hf_packfix.is_enabled():
        raise CommandError(f"the demo needs the plugin, which is not enabled: {hf_packfix.status().reason}")
    torch.set_num_threads(1)  # these batches gain little from more, and lose much where other programs run
    _make_directory(output_dir)
    _require("sktime", "the demo needs sktime for its data")
    if plot:
        _require("matplotlib", "the picture needs matplotlib (--no-plot goes without)")
    train_rows, test_rows = _load()
    _show_the_problem(train_rows, output_dir)

    print(
        f"\nWith hf_packfix: {epochs} epochs on {len(train_rows)} recordings, packed and padded in turns:", flush=True
    )
    packed, padded = _train(train_rows, test_rows, output_dir, seed, epochs)

    saved = output_dir / "model"
    packed.trainer.save_model(str(saved))
    loaded = RecurrentForSequenceClassification.from_pretrained(saved)
    again = _trainer(loaded, _pack, [], output_dir, seed).predict(test_rows)  # type: ignore[arg-type]
    # Not to the last bit: kernels round by where the weights lie in memory.
    before, after = map(torch.as_tensor, (packed.predictions, again.predictions))
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-5):
        raise RuntimeError(f"the model loaded from {saved} does not predict what the trained one does")
    print(f"saved to {saved}, loaded with from_pretrained: the same {len(test_rows)} predictions")

    if plot:
        from hf_packfix.commands.demo_picture import draw

        picture = output_dir / "demo.png"
        draw(packed, padded, picture)
        print(f"picture: {picture}")
    print(f"{time.monotonic() - started:.0f} seconds")
    print(f"losses of the {len(packed.losses)} batches: differ by at most {packed.largest_difference(padded):.1e}")
    share = 1 - packed.steps / padded.steps
    print(f"steps computed: padded {padded.steps:,}, packed {packed.steps:,} ({share:.0%} saved)")
    print(
        f"CPU time of training, one thread: padded {padded.seconds:.1f} s (torch's GRU, padding included), packed "
        f"{packed.seconds:.1f} s (hf_packfix.rnn's GRU): {packed.seconds / padded.seconds:.0%}"
    )
    print(f"accuracy: {packed.accuracy:.3f} on {len(test_rows)} test recordings (padded: {padded.accuracy:.3f})")
    return 0


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".writable").touch()
        (directory / ".writable").unlink()
    except OSError as error:
        raise CommandError(f"--output-dir: cannot write to {directory}: {error.strerror}") from error


def _require(package: str, reason: str) -> None:
    try:
        import_module(package)
    except ImportError as error:
        raise CommandError(f"{reason}; install: pip install 'hf-packfix[demo]'") from error


def _load() -> tuple[list[Row], list[Row]]:
    """Return the training and the test rows: ``input_values`` float32 ``[T, 12]``, ``labels`` 0 to 8."""
    # Imported here: it is no requirement of the package, and `_require` has reported that it is missing.
    from sktime.datasets import load_japanese_vowels

    def rows_of(split: str) -> list[Row]:
        series, speakers = load_japanese_vowels(split=split, return_X_y=True, return_type="nested_univ")
        # `torch.tensor`, not `as_tensor`, which warns that pandas' arrays cannot be written.
        values = [torch.stack([torch.tensor(c.to_numpy()) for c in row], dim=1).float() for row in series.to_numpy()]
        return [{"input_values": x, "labels": int(s) - 1} for x, s in zip(values, speakers, strict=True)]

    train_rows, test_rows = rows_of("train"), rows_of("test")
    every_step = torch.cat([row["input_values"] for row in train_rows])
    mean, deviation = every_step.mean(0), every_step.std(0)
    for row in train_rows + test_rows:
        row["input_values"] = (row["input_values"] - mean) / deviation
    return train_rows, test_rows


def _show_the_problem(rows: list[Row], directory: Path) -> None:
    set_seed(0)
    trainer = _trainer(_model(RecurrentForSequenceClassification), _pack, rows, directory, seed=0)
    batch = _pack(rows[:2])
    print("Without hf_packfix, Trainer._prepare_inputs on a batch with a PackedSequence:")
    with hf_packfix.disabled():
        try:
            trainer._prepare_inputs(batch)
            print("  works: this version of transformers handles PackedSequence itself")
        except Exception as error:
            print(f"  {type(error).__name__}: {error}")


# --- training, packed and padded: the collator differs, and how the model reads a batch -------------------


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


_pack = DataCollatorForPackedSequence()


def _pad(rows: list[Row]) -> dict[str, Tensor]:
    values = [row["input_values"] for row in rows]
    masks = [torch.ones(len(value), dtype=torch.long) for value in values]
    return {
        "input_values": pad_sequence(values, batch_first=True),
        "attention_mask": pad_sequence(masks, batch_first=True),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


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


def _train(train_rows: list[Row], test_rows: list[Row], directory: Path, seed: int, epochs: int) -> list[Run]:
    """Train two new models, packed and padded, in turns, and predict the test rows with each."""
    turns, steps = min(TURNS, epochs), epochs * math.ceil(len(train_rows) / BATCH)
    ways: list[Any] = [(RecurrentForSequenceClassification, _pack), (_PaddedClassifier, _pad)]
    with tqdm(total=2 * steps, desc="training, packed and padded in turns") as bar:
        runs, hooks = [], []
        for model_class, collate in ways:
            set_seed(seed)
            model = _model(model_class)
            run = Run(_trainer(model, collate, train_rows, directory, seed), bar)
            hooks.append(model.register_forward_hook(run.record, with_kwargs=True))
            runs.append(run)
        for turn in range(turns):
            for run in runs:
                set_seed(seed + turn)  # so that both get the rows in the same order
                run.trainer.args.num_train_epochs = epochs // turns + (turn < epochs % turns)
                started = time.process_time()
                run.trainer.train()
                run.seconds += time.process_time() - started
    for run, hook in zip(runs, hooks, strict=True):
        hook.remove()
        prediction = run.trainer.predict(test_rows)  # type: ignore[arg-type]
        run.predictions = prediction.predictions
        run.accuracy = float(np.mean(run.predictions.argmax(-1) == prediction.label_ids))
    return runs


def _model(model_class: type[RecurrentForSequenceClassification]) -> RecurrentForSequenceClassification:
    """Return a model with random weights: in one direction, whose states right padding does not change."""
    return model_class(RecurrentConfig("gru", input_size=12, hidden_size=128, num_hidden_layers=2, num_labels=9))


def _trainer(
    model: torch.nn.Module, collate: Callable[[list[Row]], dict[str, Any]], rows: list[Row], directory: Path, seed: int
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
        use_cpu=True,  # there the times compare the layers; also turns off pinned memory and its warning
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.remove_callback(ProgressCallback)  # which has a bar for each turn, and prints the logs
    return trainer
