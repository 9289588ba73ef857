"""The demo: who is speaking? Real recordings, packed batches, an unchanged ``transformers.Trainer``.

JapaneseVowels (Kudo, Toyama, Shimbo 1999; from the UCR/UEA archive, shipped with sktime): nine speakers
utter two vowels; 270 training and 370 test series of 7 to 29 steps with 12 cepstrum coefficients.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

import hf_packfix
from hf_packfix.collator import DataCollatorForPackedSequence
from hf_packfix.models import RecurrentConfig, RecurrentForSequenceClassification

__all__ = ["DemoError", "run"]

BATCH_SIZE, CHANNELS, SPEAKERS = 16, 12, 9
Row = dict[str, Any]


class DemoError(Exception):
    """Something the user can mend: a missing package, a folder that cannot be written."""


def run(seed: int, epochs: int, output_dir: Path, *, plot: bool = True) -> int:
    """Train, evaluate, save, load and check; print what happens, the accuracy in the last line.

    Args:
        seed: of the weights, the dropout and the shuffling.
        epochs: passes over the 270 training series.
        output_dir: receives ``model/``, and ``demo.png`` if ``plot``.
        plot: whether to draw the picture.

    Returns:
        The exit status: 0.

    Raises:
        DemoError: a package of the demo extra is missing, or ``output_dir`` cannot be written; hf_packfix is off.
    """
    started = time.monotonic()
    if not hf_packfix.is_enabled():
        raise DemoError(f"the demo needs the plugin, which is not enabled: {hf_packfix.status().reason}")
    _make_directory(output_dir)
    if plot:
        _require_matplotlib()
    train_rows, test_rows = _load()
    _show_the_problem(train_rows, output_dir)

    print(f"\nWith hf_packfix, the same Trainer, {epochs} epochs on {len(train_rows)} recordings:")
    set_seed(seed)
    trainer = _trainer(_new_model(), train_rows, test_rows, output_dir, seed, epochs)
    trainer.train()
    predictions = trainer.predict(test_rows)  # type: ignore[arg-type]

    saved = output_dir / "model"
    trainer.save_model(str(saved))
    loaded = _trainer(
        RecurrentForSequenceClassification.from_pretrained(saved), train_rows, test_rows, output_dir, seed, epochs
    )
    again = loaded.predict(test_rows)  # type: ignore[arg-type]
    # Not to the last bit: kernels round by where the weights lie in memory.
    before, after = map(torch.as_tensor, (predictions.predictions, again.predictions))
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-5):
        raise RuntimeError(f"the model loaded from {saved} does not predict what the trained one does")
    print(f"saved to {saved}, loaded with from_pretrained: the same {len(test_rows)} predictions")

    if plot:
        picture = output_dir / "demo.png"
        _draw(trainer.state.log_history, train_rows[:BATCH_SIZE], picture)
        print(f"picture: {picture}")
    print(f"{time.monotonic() - started:.0f} seconds")
    print(f"accuracy: {_accuracy(again)['accuracy']:.3f}")
    return 0


def _new_model() -> RecurrentForSequenceClassification:
    config = RecurrentConfig(
        cell_type="gru", input_size=CHANNELS, hidden_size=64, bidirectional=True, num_labels=SPEAKERS
    )
    return RecurrentForSequenceClassification(config)


def _trainer(
    model: RecurrentForSequenceClassification,
    train_rows: list[Row],
    test_rows: list[Row],
    directory: Path,
    seed: int,
    epochs: int,
) -> Trainer:
    every_other_epoch = 2 * -(-len(train_rows) // BATCH_SIZE)
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=64,
        num_train_epochs=epochs,
        learning_rate=5e-3,
        weight_decay=0.01,
        logging_steps=every_other_epoch,
        eval_strategy="steps",
        eval_steps=every_other_epoch,
        save_strategy="no",
        report_to=[],
        seed=seed,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=test_rows,
        data_collator=DataCollatorForPackedSequence(),
        compute_metrics=_accuracy,
    )


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _load() -> tuple[list[Row], list[Row]]:
    """Return the training and the test rows: ``input_values`` float32 ``[T, 12]``, ``labels`` 0 to 8."""
    try:
        from sktime.datasets import load_japanese_vowels
    except ImportError as error:
        raise DemoError("the demo needs sktime for its data; install: pip install 'hf-packfix[demo]'") from error
    splits: list[list[Row]] = []
    for split in ("train", "test"):
        series, speakers = load_japanese_vowels(split=split, return_X_y=True, return_type="nested_univ")
        splits.append(
            [
                {
                    "input_values": torch.stack([torch.as_tensor(c.to_numpy()) for c in row], dim=1).float(),
                    "labels": int(speaker) - 1,
                }
                for row, speaker in zip(series.to_numpy(), speakers, strict=True)
            ]
        )
    every_step = torch.cat([row["input_values"] for row in splits[0]])
    mean, deviation = every_step.mean(0), every_step.std(0)
    for row in splits[0] + splits[1]:
        row["input_values"] = (row["input_values"] - mean) / deviation
    return splits[0], splits[1]


def _show_the_problem(rows: list[Row], directory: Path) -> None:
    trainer = _trainer(_new_model(), rows, rows, directory, seed=0, epochs=1)
    batch = DataCollatorForPackedSequence()(rows[:BATCH_SIZE])
    was_enabled = hf_packfix.is_enabled()
    hf_packfix.disable()
    print("Without hf_packfix, Trainer._prepare_inputs on a batch with a PackedSequence:")
    try:
        trainer._prepare_inputs(batch)
        print("  works: this version of transformers handles PackedSequence itself")
    except Exception as error:
        print(f"  {type(error).__name__}: {error}")
    finally:
        if was_enabled:
            hf_packfix.enable()


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".writable").touch()
        (directory / ".writable").unlink()
    except OSError as error:
        raise DemoError(f"--output-dir: cannot write to {directory}: {error.strerror}") from error


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DemoError(
            "the picture needs matplotlib; install: pip install 'hf-packfix[demo]', or pass --no-plot"
        ) from error


def _draw(history: list[dict[str, Any]], rows: list[Row], path: Path) -> None:
    """Draw the training curves, and one batch as sequences × steps."""
    # The object interface, so that no window system and no global state is involved.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch as Swatch

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    curves, batch = figure.subplots(1, 2)

    losses = [(entry["epoch"], entry["loss"]) for entry in history if "loss" in entry]
    scores = [(entry["epoch"], entry["eval_accuracy"]) for entry in history if "eval_accuracy" in entry]
    (loss_line,) = curves.plot(*zip(*losses, strict=True), color="#b5482f", marker="o", ms=4, label="training loss")
    curves.set(xlabel="epoch", ylabel="training loss", title="Training", ylim=(0, None))
    right = curves.twinx()
    (score_line,) = right.plot(*zip(*scores, strict=True), color="#2f6db5", marker="s", ms=4, label="test accuracy")
    worst = min(score for _, score in scores)
    right.set(ylabel="test accuracy on 370 recordings", ylim=(min(0.9, worst - 0.02), 1.0))
    curves.legend(handles=[loss_line, score_line], loc="center right")

    lengths = [len(row["input_values"]) for row in rows]
    longest, real = max(lengths), sum(lengths)
    for place, length in enumerate(lengths):
        batch.barh(place, longest - length, left=length, color="#e4e4e4", height=0.86)
        batch.pcolormesh(
            range(length + 1),
            [place - 0.43, place + 0.43],
            rows[place]["input_values"][:, :1].T.numpy(),
            cmap="viridis",
            vmin=-2.5,
            vmax=2.5,
        )
    batch.invert_yaxis()
    batch.set(xlabel="step", ylabel="sequence in the batch", xlim=(0, longest), yticks=range(0, len(rows), 3))
    padding = longest * len(lengths) - real
    batch.set_title(f"One batch: {real} steps are packed; padding would add {padding} ({padding / real:.0%})")
    batch.legend(
        handles=[
            Swatch(color="#2a788e", label="packed (first of the 12 channels)"),
            Swatch(color="#e4e4e4", label="padding"),
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=2,
        frameon=False,
    )
    figure.savefig(path, dpi=110)
