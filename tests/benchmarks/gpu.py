"""On a GPU: packed layers, ours and torch's, against padded ones, and whole training runs through the Trainer.

A step of a layer is forward and backward over a packing that is new in every round; packings and padded tensors are on
the GPU before the clock starts, which is the one on the wall, with the GPU waited for. How long the GPU itself works,
and with how many kernels, copies and fills, is what torch's profiler counts in one more step. "Whatever it costs" is
our way where the cost model (``hf_packfix/rnn/held.py``) leaves a shape to torch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence
from torch.profiler import ProfilerActivity, profile

import hf_packfix
from hf_packfix import DataCollatorForPackedSequence
from hf_packfix.rnn import held, stack
from hf_packfix.rnn import run as run_layer
from tests.benchmarks import long_tailed
from tests.benchmarks.end_to_end import (
    BATCH,
    IN_FORWARD,
    LABELS,
    PACKED,
    PACKED_OWN,
    PADDED,
    VOCABULARY,
    Batch,
    furthest,
    in_turn,
    through_trainer,
    with_mask,
    without_mask,
)
from tests.benchmarks.measure import Row, Samples, Table, interleave, ratio

DEVICE = torch.device("cuda", 0)
OURS, FORCED, THEIRS, PADDED_LAYER = "ours", "whatever it costs", "torch's packed", "torch's padded"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Shape(NamedTuple):
    """A layer with as many inputs as units, and its batch: sequences of ``steps`` steps, or of long-tailed lengths."""

    cell: str
    sequences: int
    width: int
    layers: int = 1
    both: bool = False
    dtype: str = "float32"
    steps: int | None = None

    def __str__(self) -> str:
        words = [f"{self.cell} {self.sequences} x {self.width}"]
        words += [f"{self.layers} layers"] if self.layers > 1 else []
        words += ["both directions"] if self.both else []
        words += [f"{self.steps} steps each"] if self.steps else []
        return ", ".join([*words, self.dtype])


SHAPES = [
    Shape("LSTM", 32, 64),
    Shape("GRU", 32, 64),
    Shape("LSTM", 32, 128, 2, True),
    Shape("LSTM", 32, 64, dtype="float16"),
    Shape("LSTM", 2, 16),
    Shape("LSTM", 8, 64),
    Shape("LSTM", 128, 128),
    Shape("GRU", 32, 128, 2, True),
    *(Shape(cell, 256, width) for cell in ("LSTM", "GRU") for width in (64, 128)),
    *(Shape("LSTM", sequences, 192) for sequences in (32, 64, 128)),
    Shape("GRU", 32, 192),
    Shape("RNN", 32, 64),
    *(Shape("LSTM", *size) for size in ((512, 64), (32, 256), (64, 512), (256, 512))),
    # Where a call costs more than the steps save.
    *(Shape(cell, 32, 64, steps=steps) for cell in ("LSTM", "GRU") for steps in (16, 32, 48, 64)),
    Shape("LSTM", 32, 64, both=True, steps=24),
    *(
        Shape("LSTM", *size, dtype=dtype)
        for dtype in DTYPES
        for size in ((32, 64), (32, 192), (32, 256), (64, 512), (64, 1024), (32, 256, 2), (32, 256, 2, True))
    ),
    *(Shape("GRU", 32, width, dtype="float16") for width in (64, 192, 256)),
]
#: Of these, the kernels are counted as well.
COUNTED = SHAPES[:4]


def wait() -> None:
    """Wait for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def now() -> float:
    """Return the time on the wall when the GPU has done what it was given."""
    wait()
    return time.perf_counter()


@contextlib.contextmanager
def whatever_it_costs() -> Iterator[None]:
    """Switch off the cost model."""
    asked = stack.is_held_faster
    stack.is_held_faster = lambda mode, *_: mode in ("LSTM", "GRU")
    try:
        yield
    finally:
        stack.is_held_faster = asked


def forwards(shape: Shape, rounds: int) -> dict[str, Callable[[int], Tensor]]:
    """Return what computes the outputs of one of the packings in each way, for a new gradient of the data."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layer = getattr(nn, shape.cell)(shape.width, shape.width, shape.layers, bidirectional=shape.both).to(DEVICE)
    packings: list[tuple[PackedSequence, Tensor]] = []
    for _ in range(rounds + 1):
        lengths = [shape.steps] * shape.sequences if shape.steps else long_tailed.lengths(shape.sequences, generator)
        rows = [torch.randn(length, shape.width, device=DEVICE) for length in lengths]
        packings.append((pack_sequence(rows, enforce_sorted=False), pad_sequence(rows)))

    def packed(number: int) -> PackedSequence:
        batch = packings[number][0]
        layer.zero_grad()
        return batch._replace(data=batch.data.detach().requires_grad_())

    def ours(number: int) -> Tensor:
        batch = packed(number)
        return (run_layer(layer, batch) or layer(batch))[0].data

    def forced(number: int) -> Tensor:
        with whatever_it_costs():
            return ours(number)

    def padded(number: int) -> Tensor:
        layer.zero_grad()
        return layer(packings[number][1].detach().requires_grad_())[0]

    ways: dict[str, Callable[[int], Tensor]] = {OURS: ours}
    with autocast(shape):
        if run_layer(layer, packed(0)) is None:
            with whatever_it_costs():
                if run_layer(layer, packed(0)) is not None:
                    ways[FORCED] = forced
    return {**ways, THEIRS: lambda number: layer(packed(number))[0].data, PADDED_LAYER: padded}


def autocast(shape: Shape) -> Any:
    """Return the autocast of a shape."""
    dtype = DTYPES.get(shape.dtype)
    return torch.autocast(DEVICE.type, dtype) if dtype else contextlib.nullcontext()


def samples_of(shape: Shape, ways: dict[str, Callable[[int], Tensor]], rounds: int) -> Samples:
    """Return the seconds of forward and backward in each way."""

    def seconds(forward: Callable[[int], Tensor]) -> Callable[[], float]:
        numbers = iter(range(rounds + 1))

        def sample() -> float:
            number = next(numbers)

            def step() -> None:
                with autocast(shape):
                    output = forward(number)
                output.backward(gradient)

            with autocast(shape):
                gradient = torch.ones_like(forward(number))  # also the first use of these sizes, which is not timed
            held._kept = (None, None)
            began = now()
            step()
            return now() - began

        return sample

    return interleave({name: seconds(forward) for name, forward in ways.items()}, rounds)


def on_the_gpu(shape: Shape, forward: Callable[[int], Tensor]) -> tuple[int, float]:
    """Return the number of kernels, copies and fills of a step, and their seconds."""
    with autocast(shape):
        gradient = torch.ones_like(forward(0))
    held._kept = (None, None)
    wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        with autocast(shape):
            output = forward(0)
        output.backward(gradient)
        wait()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return len(events), sum(event.time_range.elapsed_us() for event in events) / 1e6


def of_layers(shapes: list[Shape], rounds: int) -> tuple[list[Row], list[str]]:
    """Return the rows of the layers alone, and what the GPU did in each way."""
    table: list[Row] = []
    notes = []
    for shape in shapes:
        ways = forwards(shape, rounds)
        samples = samples_of(shape, ways, rounds)
        label = f"{shape}: ours{', left to torch' if FORCED in ways or shape.cell == 'RNN' else ''}"
        table += [ratio(samples, OURS, peer, label=label) for peer in (THEIRS, PADDED_LAYER)]
        if FORCED in ways:
            table.append(ratio(samples, FORCED, THEIRS, label=f"{shape}: {FORCED}"))
        if shape in COUNTED:
            found = {name: on_the_gpu(shape, forward) for name, forward in ways.items()}
            counts = ", ".join(f"{name} {1e6 * busy:.0f} µs in {count}" for name, (count, busy) in found.items())
            notes.append(f"{shape}: kernels, copies and fills on the GPU: {counts}")
    return table, notes


def of_training(cell: str, rows: list[Batch], repeats: int) -> tuple[list[Row], list[str]]:
    """Return the rows of training runs through the Trainer, and how far their losses are apart."""
    train = partial(through_trainer, now=now, use_cpu=DEVICE.type == "cpu")
    collators = {PACKED: DataCollatorForPackedSequence(), IN_FORWARD: with_mask, PADDED: without_mask}
    collators[PACKED_OWN] = collators[PACKED]
    ways = {name: (train, collate) for name, collate in collators.items()}
    samples, losses = in_turn(cell, rows, ways, repeats)
    peers = (PACKED_OWN, IN_FORWARD, PADDED)
    table = [ratio(samples, PACKED, peer, label=f"{cell}: {PACKED}") for peer in peers]
    table.append(ratio(samples, PACKED_OWN, PADDED, label=f"{cell}: {PACKED_OWN}"))
    apart = {peer: furthest(losses[PACKED], losses[peer]) for peer in peers}
    return table, [f"{cell}: losses packed and {peer}: at most {value:.1e} apart" for peer, value in apart.items()]


def run(quick: bool) -> Table:
    """Compare the layers over long-tailed lengths, and training through the Trainer."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU: torch.cuda.is_available() is False")
    return measured(quick, torch.cuda.get_device_name())


def measured(quick: bool, name: str) -> Table:
    """Return the table; on another ``DEVICE``, to find mistakes in what measures."""
    rounds, steps, repeats = (3, 20, 2) if quick else (15, 40, 3)
    hf_packfix.enable()
    torch.manual_seed(0)
    # As fast as it is written: TF32 would round to three digits.
    torch.backends.cudnn.allow_tf32 = False
    table, notes = of_layers(COUNTED if quick else SHAPES, rounds)
    rows = long_tailed.rows(steps * BATCH, VOCABULARY, LABELS)
    for cell in ("gru", "lstm"):
        of_cell, apart = of_training(cell, rows, repeats)
        table, notes = table + of_cell, notes + apart
    return Table(f"On a GPU, {name}: steps of the layers, and {steps} steps through the Trainer", table, notes)
