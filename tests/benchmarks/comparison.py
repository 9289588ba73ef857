"""Four ways to train a recurrent classifier on rows of different lengths: what each costs, on the same rows.

Padding with a mask, packing in ``forward``, packing in the collator with hf_packfix (with torch's layers and with the
fast ones), and packing in the collator with Lightning, if that is installed. The code between the comments
``# lines:`` and ``# end`` is what somebody writes for a way; its lines are counted.
"""

from __future__ import annotations

import inspect
import logging
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_sequence
from torch.utils.data import DataLoader

import hf_packfix
from tests.benchmarks import long_tailed
from tests.benchmarks.end_to_end import BATCH, CLIP, RATE, Batch, through_trainer
from tests.benchmarks.measure import Row, Table, clock, interleave, ratio, summary

try:
    import lightning
except ImportError:
    lightning = None

FEATURES, CLASSES, HIDDEN = 16, 5, 64
MASK, IN_FORWARD = "padding with a mask", "packing in forward"
PLUGIN, FAST, LIGHTNING = "hf_packfix", "hf_packfix, fast layers", "Lightning, packing in the collator"


class Classifier(nn.Module):
    """What the ways share: the layers, and the loss of the last states of both directions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(FEATURES, HIDDEN, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * HIDDEN, CLASSES)

    def output(self, last: Tensor, labels: Tensor) -> Batch:
        logits = self.head(last)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


# lines: padding with a mask
def collate_with_mask(rows: list[Batch]) -> Batch:
    series = [row["x"] for row in rows]
    return {
        "x": pad_sequence(series, batch_first=True),
        "mask": pad_sequence([torch.ones(len(one), dtype=torch.long) for one in series], batch_first=True),
        "labels": torch.stack([row["labels"] for row in rows]),
    }


class WithMask(Classifier):
    def forward(self, x: Tensor, mask: Tensor, labels: Tensor) -> Batch:
        states, _ = self.lstm(x)
        ends = (mask.sum(1) - 1)[:, None, None].expand(-1, 1, HIDDEN)
        forwards = states[..., :HIDDEN].gather(1, ends).squeeze(1)
        backwards = states[:, 0, HIDDEN:]  # has read the padding first, which no mask can undo
        return self.output(torch.cat([forwards, backwards], 1), labels)


# end
# lines: packing in forward
def collate_with_lengths(rows: list[Batch]) -> Batch:
    series = [row["x"] for row in rows]
    return {
        "x": pad_sequence(series, batch_first=True),
        "lengths": torch.tensor([len(one) for one in series]),
        "labels": torch.stack([row["labels"] for row in rows]),
    }


class PackingInForward(Classifier):
    def forward(self, x: Tensor, lengths: Tensor, labels: Tensor) -> Batch:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        return self.output(torch.cat([last[0], last[1]], 1), labels)


# end
# lines: hf_packfix
# `import hf_packfix` is one more line
def collate_packed(rows: list[Batch]) -> Batch:
    x = pack_sequence([row["x"] for row in rows], enforce_sorted=False)
    return {"x": x, "labels": torch.stack([row["labels"] for row in rows])}


class Packed(Classifier):
    def forward(self, x: Any, labels: Tensor) -> Batch:
        _, (last, _) = self.lstm(x)
        return self.output(torch.cat([last[0], last[1]], 1), labels)


# end


def lightning_module() -> Any:
    """Return the model of Lightning, with the collator and the ``forward`` of hf_packfix."""

    # lines: Lightning, packing in the collator
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Packed()

        def training_step(self, batch: Batch) -> Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), RATE, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, self.trainer.estimated_stepping_batches)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    # end
    return Module()


WAYS: dict[str, tuple[Callable[[], nn.Module], Callable[[list[Batch]], Batch]]] = {
    MASK: (WithMask, collate_with_mask),
    IN_FORWARD: (PackingInForward, collate_with_lengths),
    PLUGIN: (Packed, collate_packed),
    FAST: (Packed, collate_packed),
    LIGHTNING: (Packed, collate_packed),
}


def turn_on_for(way: str) -> None:
    """Turn the plugin on or off, as the way has it."""
    hf_packfix.disable()
    if way in (PLUGIN, FAST):
        hf_packfix.enable(fast_rnn=way == FAST)


def train(way: str, rows: list[Batch]) -> float:
    """Train over the rows once; return the seconds."""
    turn_on_for(way)
    new_model, collate = WAYS[way]
    if way != LIGHTNING:
        return through_trainer(new_model(), rows, collate)[0]
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module, loader = lightning_module(), DataLoader(rows, BATCH, collate_fn=collate)
    began = clock()
    trainer.fit(module, loader)
    return clock() - began


def kept(way: str, batch: list[Batch]) -> int:
    """Return the bytes of a batch and of what its forward keeps for the backward."""
    turn_on_for(way)
    new_model, collate = WAYS[way]
    model, inputs, storages = new_model(), collate(batch), {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    for value in inputs.values():
        count(getattr(value, "data", value))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(**inputs)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for address, (size, _) in storages.items() if address not in weights)


@torch.no_grad()
def deviation(way: str, batch: list[Batch]) -> float:
    """Return how far the logits of a row at most are from those that it has alone, as a share of their spread."""
    turn_on_for(way)
    new_model, collate = WAYS[way]
    model = new_model().eval()
    together = model(**collate(batch))["logits"]
    alone = torch.cat([model(**collate([row]))["logits"] for row in batch])
    return float(((together - alone).abs() / alone.std(0)).max())


def lines(way: str) -> int:
    """Return the lines that are written for a way, beside what all share."""
    source = inspect.getsource(inspect.getmodule(lines))  # type: ignore[arg-type]
    code = source.partition(f"# lines: {PLUGIN if way == FAST else way}\n")[2].partition("# end\n")[0]
    own = sum(bool(line.strip()) for line in code.splitlines())
    return own + (lines(PLUGIN) - 1 if way == LIGHTNING else 0)


def run(quick: bool) -> Table:
    """Compare the ways."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    steps, repeats = (4, 2) if quick else (40, 5)
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"x": torch.randn(length, FEATURES, generator=generator), "labels": torch.tensor(length % CLASSES)}
        for length in long_tailed.lengths(steps * BATCH, generator)
    ]
    ways = [way for way in WAYS if way != LIGHTNING or lightning is not None]
    try:
        samples = interleave({way: lambda way=way: train(way, rows) for way in ways}, repeats)
        table: list[Row] = [ratio(samples, way, MASK) for way in ways[1:]]
        batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)][:20]
        memory = {way: [float(kept(way, batch)) for batch in batches] for way in ways}
        for way in ways[1:]:
            shares = [ours / theirs for ours, theirs in zip(memory[way], memory[MASK], strict=True)]
            table.append(summary(f"{way}: bytes of a batch and for its backward", MASK, shares))
        notes = [f"{way}: {lines(way)} lines" for way in ways]
        for way in ways:
            apart = max(deviation(way, batch) for batch in batches[:4])
            notes.append(f"{way}: logits in a batch and alone differ by up to {apart:.1e} of their spread")
    finally:
        hf_packfix.enable(fast_rnn=False)
    if lightning is None:
        notes.append("Lightning is not installed, and left out")
    lengths = [len(row["x"]) for row in rows]
    title = f"Four ways: {steps} steps of {BATCH} rows of {min(lengths)} to {max(lengths)}, median "
    return Table(f"{title}{statistics.median(lengths):.0f}, a bidirectional LSTM of width {HIDDEN}", table, notes)
