"""Recurrent layers over long-tailed lengths: those of ``hf_packfix.rnn``, torch's packed, torch's padded, the floor.

A new packing in every round, as in training: oneDNN, to which torch gives padded LSTMs, compiles a primitive for every
new shape. The floor is the layer's matrix products alone, of all real steps at once: one in the forward, two of the
same size in the backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from hf_packfix.rnn.layers import call
from tests.benchmarks import long_tailed
from tests.benchmarks.measure import Row, Table, clock, interleave, ratio

OURS, PACKED, PADDED, FLOOR = "hf_packfix.rnn", "torch, packed", "torch, padded", "the matrix products"
CELLS: dict[str, Callable[..., nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
#: Against torch's packed and torch's padded layer, in training, of 32 to 64 sequences.
BARS = {"LSTM": (0.33, 0.65), "GRU": (0.45, 0.60), "RNN": (0.45, 0.50)}


@dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        sequences: B.
        width: D, and H unless it is given.
        options: of the layer.
        lengths: what they are instead of long-tailed.
        barred: whether the bars of long-tailed training hold for it.
        rounds: how many packings are measured.
        hidden: H; the width by default.
    """

    sequences: int
    width: int
    options: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    barred: bool = False
    rounds: int = 8
    hidden: int = 0

    def __str__(self) -> str:
        lengths = f"lengths {min(self.lengths)} to {max(self.lengths)}, " if self.lengths else ""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        width = f"{self.width} to {self.hidden}" if self.hidden else self.width
        return f"{self.sequences} sequences, {lengths}width {width}{options}"

    def batches(self, count: int) -> Iterator[PackedSequence]:
        """Yield packings, each with lengths of its own, unless these are given."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            lengths = list(self.lengths) or long_tailed.lengths(self.sequences, generator)
            yield pack_sequence([torch.randn(n, self.width) for n in lengths], enforce_sorted=False)


TWO = {"num_layers": 2, "bidirectional": True}
TRAINED = (
    Case(32, 64, barred=True),
    Case(64, 128, barred=True),
    Case(8, 64),
    Case(64, 256),
    Case(32, 64, TWO, hidden=128, barred=True),
    Case(64, 512, rounds=4),
)
HOSTILE = (
    Case(32, 32, lengths=tuple(range(1, 33)), rounds=24),
    Case(2, 16, lengths=(2, 1), rounds=24),
    Case(16, 16, lengths=(8,) * 8 + (7,) * 8, rounds=24),
    Case(32, 64, lengths=(50,) * 32, rounds=24),
    Case(1, 64, lengths=(300,), rounds=24),
)


@contextmanager
def threads(count: int) -> Iterator[Callable[[], float]]:
    """Run with so many threads; gives the clock: with more than one, time on the wall."""
    torch.set_num_threads(count)
    try:
        yield clock if count == 1 else time.perf_counter
    finally:
        torch.set_num_threads(1)


def products(layer: nn.RNNBase, rows: int, train: bool) -> Callable[[], None]:
    """Return the floor of a layer over so many real steps."""
    sizes = [(layer.weight_ih_l0.shape[1] + layer.hidden_size, layer.weight_ih_l0.shape[0])]
    directions = 2 if layer.bidirectional else 1
    inner = (directions * layer.hidden_size + layer.hidden_size, sizes[0][1])
    sizes = sizes * directions + [inner] * directions * (layer.num_layers - 1)
    operands = [(torch.randn(rows, i), torch.randn(i, o), torch.randn(rows, o)) for i, o in sizes]

    def multiply() -> None:
        for data, weight, gradient in operands:
            torch.mm(data, weight)
            if train:
                torch.mm(data.t(), gradient)
                torch.mm(gradient, weight.t())

    return multiply


def measure(cell: str, case: Case, train: bool, now: Callable[[], float], quick: bool) -> dict[str, list[float]]:
    """Return the seconds of all four over new packings."""
    rounds = min(3, case.rounds) if quick else case.rounds
    layer = CELLS[cell](case.width, case.hidden or case.width, **case.options)
    batches = list(case.batches(rounds + 1))
    # So that a sample takes milliseconds.
    repeats = max(1, 200 // len(batches[0].batch_sizes) // max(1, case.width // 32))

    def taking(function: Callable[[PackedSequence], Tensor] | None) -> Callable[[], float]:
        following = iter(batches)

        def seconds() -> float:
            sequences = next(following)
            multiply = products(layer, len(sequences.data), train)
            layer.zero_grad()
            began = now()
            for _ in range(repeats):
                if function is None:
                    multiply()
                elif train:
                    data = sequences.data.detach().requires_grad_()
                    output = function(sequences._replace(data=data))
                    output.backward(torch.ones_like(output))
                else:
                    with torch.no_grad():
                        function(sequences)
            return (now() - began) / repeats

        return seconds

    cases: dict[str, Callable[[PackedSequence], Tensor] | None] = {
        OURS: lambda sequences: call(layer, sequences)[0].data,
        PACKED: lambda sequences: layer(sequences)[0].data,
        PADDED: lambda sequences: layer(pad_packed_sequence(sequences)[0])[0],
        FLOOR: None,
    }
    return interleave({name: taking(function) for name, function in cases.items()}, rounds)


def run(quick: bool) -> Table:
    """Compare the layers in training on one and two threads, on hostile shapes, and in inference."""
    torch.manual_seed(0)
    table: list[Row] = []

    def add(
        cell: str, case: Case, *, train: bool = True, count: int = 1, bars: tuple[Any, Any] = (None, None)
    ) -> None:
        with threads(count) as now:
            samples = measure(cell, case, train, now, quick)
        how = ("training" if train else "inference") + (f", {count} threads" if count > 1 else "")
        label = f"{cell}, {how}: {case}"
        table.append(ratio(samples, OURS, PACKED, label=label, bar=bars[0]))
        table.append(ratio(samples, OURS, PADDED, label=label, bar=bars[1]))
        if train and count == 1 and not case.lengths:
            table.append(ratio(samples, OURS, FLOOR, label=label))

    for cell in CELLS:
        for case in TRAINED[:2] if quick else TRAINED:
            add(cell, case, bars=BARS[cell] if case.barred else (1.05, None))
        for case in HOSTILE:
            add(cell, case, bars=(1.05, None))
        for case in TRAINED[:2]:
            add(cell, case, count=2)
        add(cell, replace(TRAINED[0], rounds=24), train=False, bars=(1.05, None))
    return Table("Recurrent layers over packed sequences", table)
