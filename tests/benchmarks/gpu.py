"""On a GPU: packed against padded, for the layers alone and for a whole training run through the Trainer.

Times are those of the GPU: from one CUDA event to another around a step, and on the wall, with the GPU waited for,
around a training run. Packings and the padded tensors are on the GPU before the clock starts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from transformers import PrinterCallback, TrainingArguments

import hf_packfix
from hf_packfix import DataCollatorForPackedSequence
from tests.benchmarks import long_tailed
from tests.benchmarks.end_to_end import (
    BATCH,
    IN_FORWARD,
    LABELS,
    PACKED,
    PADDED,
    RATE,
    VOCABULARY,
    Batch,
    Collator,
    RecordingTrainer,
    new_model,
    with_mask,
    without_mask,
)
from tests.benchmarks.measure import Row, Samples, Table, interleave, ratio

__all__ = ["run"]

CELLS: dict[str, Callable[..., nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
SHAPES = ((8, 64), (32, 64), (32, 256), (64, 128), (64, 512), (256, 512))
LAYERS_PACKED, LAYERS_PADDED = "packed", "padded"


def timed(step: Callable[[], Any]) -> float:
    """Return the seconds that the GPU takes for a step."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    step()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1000


def layers(cell: str, sequences: int, width: int, rounds: int) -> Samples:
    """Return the seconds of forward and backward, over a new packing in every round."""
    generator = torch.Generator().manual_seed(0)
    layer = CELLS[cell](width, width).cuda()
    packings = []
    for _ in range(rounds + 1):
        rows = [torch.randn(n, width, device="cuda") for n in long_tailed.lengths(sequences, generator)]
        packings.append((pack_sequence(rows, enforce_sorted=False), pad_sequence(rows)))

    def packed(number: int) -> Tensor:
        batch = packings[number][0]
        output: Tensor = layer(batch._replace(data=batch.data.detach().requires_grad_()))[0].data
        return output

    def padded(number: int) -> Tensor:
        output: Tensor = layer(packings[number][1].detach().requires_grad_())[0]
        return output

    def seconds(forward: Callable[[int], Tensor]) -> Callable[[], float]:
        numbers = iter(range(rounds + 1))

        def sample() -> float:
            number = next(numbers)
            layer.zero_grad()
            gradient = torch.ones_like(forward(number))  # also the first use of this shape, which is not timed
            return timed(lambda: forward(number).backward(gradient))

        return sample

    return interleave({LAYERS_PACKED: seconds(packed), LAYERS_PADDED: seconds(padded)}, rounds)


def through_trainer(cell: str, rows: list[Batch], collate: Collator) -> tuple[float, list[float]]:
    """Train with the Trainer on the GPU; return the seconds on the wall and the losses."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=RATE,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        arguments._n_gpu = 1  # one GPU, however many there are
        trainer = RecordingTrainer(new_model(cell), arguments, train_dataset=rows, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.losses = []
        torch.cuda.synchronize()
        began = time.perf_counter()
        trainer.train()
        torch.cuda.synchronize()
        return time.perf_counter() - began, trainer.losses


def run(quick: bool) -> Table:
    """Compare the layers over long-tailed lengths, and training through the Trainer."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU: torch.cuda.is_available() is False")
    rounds, steps, repeats = (3, 20, 2) if quick else (15, 60, 3)
    torch.manual_seed(0)
    table: list[Row] = []
    for cell in CELLS:
        for sequences, width in SHAPES[:2] if quick else SHAPES:
            samples = layers(cell, sequences, width, rounds)
            label = f"{cell}, a step of {sequences} sequences, width {width}: packed"
            table.append(ratio(samples, LAYERS_PACKED, LAYERS_PADDED, label=label))

    rows = long_tailed.rows(steps * BATCH, VOCABULARY, LABELS)
    hf_packfix.enable()
    ways = {PACKED: DataCollatorForPackedSequence(), IN_FORWARD: with_mask, PADDED: without_mask}
    notes = []
    for cell in ("gru", "lstm"):
        losses: dict[str, list[float]] = {}

        def seconds(name: str, cell: str = cell, losses: dict[str, list[float]] = losses) -> float:
            taken, losses[name] = through_trainer(cell, rows, ways[name])
            return taken

        samples = interleave({name: lambda name=name: seconds(name) for name in ways}, repeats)
        table += [ratio(samples, PACKED, peer, label=f"{cell}: {PACKED}") for peer in (IN_FORWARD, PADDED)]
        for peer in (IN_FORWARD, PADDED):
            apart = max(abs(a - b) for a, b in zip(losses[PACKED], losses[peer], strict=True))
            notes.append(f"{cell}: losses packed and {peer}: at most {apart:.1e} apart")
    title = f"On a GPU, {torch.cuda.get_device_name()}: steps of the layers, and {steps} steps through the Trainer"
    return Table(title, table, notes)
