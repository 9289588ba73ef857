"""Training a recurrent tagger on long-tailed lengths: packed, padded and packed in ``forward``, padded, bare.

All see the same rows in the same order, with the optimizer, the schedule and the clipping of the Trainer. The layers
are those of ``hf_packfix.rnn``, if it is not said that they are torch's own; over padding they run torch's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, get_linear_schedule_with_warmup

import hf_packfix
from hf_packfix import DataCollatorForPackedSequence, patches
from hf_packfix.models import RecurrentConfig, RecurrentForTokenClassification
from tests.benchmarks import long_tailed
from tests.benchmarks.measure import Row, Samples, Table, clock, interleave, ratio, summary
from tests.support import oracle

BATCH, VOCABULARY, LABELS = 32, 100, 10
RATE, CLIP = 1e-3, 1.0
Batch = dict[str, Any]
Collator = Callable[[list[Batch]], Batch]
PACKED = "packed, through the Trainer"
PACKED_OWN = "packed, torch's own layers"
IN_FORWARD = "padded, packed in forward"
PADDED = "padded, never packed"
BARE = "packed, bare PyTorch loop"


#: Rows with the mask by which the model packs them in ``forward``.
with_mask = oracle.padded_batch


def without_mask(features: list[Batch]) -> Batch:
    """Pad rows; the model, not knowing, runs over the padding, whose labels do not count."""
    return {key: value for key, value in with_mask(features).items() if key != "attention_mask"}


def new_model(cell: str, *, own: bool = False) -> RecurrentForTokenClassification:
    """Return the model of every run, with torch's own layers if asked."""
    torch.manual_seed(0)
    model = RecurrentForTokenClassification(
        RecurrentConfig(cell, vocab_size=VOCABULARY, hidden_size=64, pad_token_id=0, num_labels=LABELS)
    )
    if own:
        # Of a subclass, to which the models leave its own `forward`.
        model.base_model.rnn.__class__ = type("TorchsOwn", (getattr(nn, cell.upper()),), {})
    return model


class RecordingTrainer(Trainer):
    """Keeps the loss of every step."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def through_trainer(
    model: nn.Module, rows: list[Batch], collate: Collator, now: Callable[[], float] = clock, **changes: Any
) -> tuple[float, list[float]]:
    """Train over the rows once with the Trainer; return the seconds and the losses."""
    with tempfile.TemporaryDirectory() as directory:
        options = {"num_train_epochs": 1, "learning_rate": RATE, "max_grad_norm": CLIP, "logging_strategy": "no"}
        options |= {"per_device_train_batch_size": BATCH, "train_sampling_strategy": "sequential", **changes}
        arguments = oracle.arguments(directory, **options)
        arguments._n_gpu = min(arguments.n_gpu, 1)  # one GPU, however many there are
        trainer = RecordingTrainer(model, arguments, train_dataset=rows, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.losses = []
        began = now()
        trainer.train()
        return now() - began, trainer.losses


def bare(model: nn.Module, rows: list[Batch], collate: Collator) -> tuple[float, list[float]]:
    """Train with the few lines that one writes without a Trainer; return the seconds and the losses."""
    losses = []
    model.train()
    began = clock()
    batches = DataLoader(rows, BATCH, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(batches))
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return clock() - began, losses


def in_turn(
    cell: str, rows: list[Batch], ways: dict[str, tuple[Callable[..., Any], Collator]], repeats: int
) -> tuple[Samples, dict[str, list[float]]]:
    """Return the seconds of training in each way, and the losses of each way's last run."""
    losses: dict[str, list[float]] = {}

    def seconds(name: str) -> float:
        train, collate = ways[name]
        taken, losses[name] = train(new_model(cell, own=name == PACKED_OWN), rows, collate)
        return taken

    return interleave({name: partial(seconds, name) for name in ways}, repeats), losses


def furthest(losses: list[float], others: list[float]) -> float:
    """Return how far the losses of a step are apart at most."""
    return max(abs(ours - theirs) for ours, theirs in zip(losses, others, strict=True))


def patches_part(cell: str, rows: list[Batch], *, own: bool) -> float:
    """Return the part of a packed training run, in percent, that the patches of the Trainer add to the originals.

    What a wrapper takes, less what the original inside it takes, summed over all calls; a call inside the original
    counts on its own.
    """
    spent = 0.0

    def timed(function: Callable[..., Any], sign: int) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            began = clock()
            try:
                return function(*args, **kwargs)
            finally:
                spent += sign * (clock() - began)

        return timed

    wrappers = {}
    for patch in patches.PATCHES:
        name = patch.path.rpartition(".")[2]
        if patch.path.startswith("Trainer.") and patch.active:
            wrappers[name] = vars(Trainer)[name]
            setattr(Trainer, name, timed(patch.make(timed(wrappers[name].__wrapped__, -1), patch), 1))
    try:
        total, _ = through_trainer(new_model(cell, own=own), rows, DataCollatorForPackedSequence())
    finally:
        for name, wrapper in wrappers.items():
            setattr(Trainer, name, wrapper)
    return 100 * spent / total


def run(quick: bool) -> Table:
    """Train a GRU and an LSTM in all five ways."""
    steps, repeats = (20, 2) if quick else (200, 5)
    rows = long_tailed.rows(steps * BATCH, VOCABULARY, LABELS)
    hf_packfix.enable()
    packed = DataCollatorForPackedSequence()
    ways = {
        PACKED: (through_trainer, packed),
        PACKED_OWN: (through_trainer, packed),
        IN_FORWARD: (through_trainer, with_mask),
        PADDED: (through_trainer, without_mask),
        BARE: (bare, packed),
    }
    table: list[Row] = []
    notes = []
    for cell in ("gru", "lstm"):
        samples, losses = in_turn(cell, rows, ways, repeats)
        table += [
            ratio(samples, PACKED, IN_FORWARD, label=f"{cell}: {PACKED}", bar=1.05),
            ratio(samples, PACKED, PADDED, label=f"{cell}: {PACKED}", bar=0.75),
            ratio(samples, PACKED, BARE, label=f"{cell}: {PACKED}"),
            ratio(samples, IN_FORWARD, PADDED, label=f"{cell}: {IN_FORWARD}"),
            ratio(samples, PACKED_OWN, PADDED, label=f"{cell}: {PACKED_OWN}"),
        ]
        for against, own in (("the whole run, torch's own layers", True), ("the whole run", False)):
            shares = [patches_part(cell, rows, own=own) for _ in range(repeats)]
            # The same microseconds a step: a larger part of a run with the fast layers.
            bar = 0.5 if own else None
            table.append(summary(f"{cell}: the patches' own part", against, shares, unit="%", bar=bar))
        for other in (PACKED_OWN, IN_FORWARD, PADDED, BARE):
            apart = furthest(losses[PACKED], losses[other])
            verdict = "the same to 1e-5" if apart <= 1e-5 else "NOT the same to 1e-5"
            notes.append(f"{cell}: losses packed and {other}: {verdict} (at most {apart:.1e} apart)")
    lengths = [len(row["input_ids"]) for row in rows]
    title = f"End to end: {steps} steps of {BATCH} rows of {min(lengths)} to {max(lengths)} tokens"
    return Table(title, table, notes)
