"""How everything here is measured: interleaved repeats, medians, and the spread of the ratios.

Times are CPU seconds of this process, on one thread: the same as on the wall of an idle machine, and not
disturbed by what else a busy one runs.
"""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

clock = time.process_time
Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """One measured figure: the median and the quartiles over the repeats, against a peer.

    Attributes:
        unit: "x" for a ratio to the peer, or the unit of a difference.
        seconds: the median time of ``what`` and of ``peer``; None where it is not time that is compared.
        bar: what the value is to stay at or below; None where nothing is promised.
    """

    what: str
    peer: str
    value: float
    quartiles: tuple[float, float]
    unit: str = "x"
    seconds: tuple[float, float] | None = None
    bar: float | None = None


@dataclass
class Table:
    """The rows of one benchmark, and notes of what was checked on the way."""

    title: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"## {self.title}",
            "",
            "| what | against | median | quartiles | took | bar | |",
            "|---|---|---:|---:|---:|---:|---|",
        ]
        for row in self.rows:
            value, low, high = (_figure(figure, row.unit) for figure in (row.value, *row.quartiles))
            took = "" if row.seconds is None else " / ".join(map(_duration, row.seconds))
            bar = "" if row.bar is None else f"<= {_figure(row.bar, row.unit)}"
            verdict = "" if row.bar is None else "holds" if row.value <= row.bar else "does not hold"
            lines.append(f"| {row.what} | {row.peer} | {value} | {low} to {high} | {took} | {bar} | {verdict} |")
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)


def per_call(statement: str, number: int, **names: Any) -> Callable[[], float]:
    """Return a function that runs a statement ``number`` times and returns the seconds of one time.

    The statement is compiled into the loop, so that no call but its own is timed.
    """
    timer = timeit.Timer(statement, timer=clock, globals=names)
    return lambda: timer.timeit(number) / number


def interleave(cases: Mapping[str, Callable[[], float]], repeats: int, *, warm_up: bool = True) -> Samples:
    """Return samples of every case, taken in turn, so that a slow moment of the machine meets them all.

    Every round begins with another case. When each has been first, the order is reversed, and so on: whoever follows
    another case on the same batch finds it in the cache. With ``warm_up``, one more round before these does not count.
    """
    names = list(cases)
    samples: Samples = {name: [] for name in names}
    for repeat in range(-1 if warm_up else 0, repeats):
        start = repeat % len(names)
        order = names[start:] + names[:start]
        for name in order if repeat // len(names) % 2 else reversed(order):
            value = cases[name]()
            if repeat >= 0:
                samples[name].append(value)
    return samples


def ratio(samples: Samples, what: str, peer: str, *, bar: float | None = None, label: str | None = None) -> Row:
    """Return the row of how long ``what`` took for every second of ``peer`` in the same round."""
    ratios = [ours / theirs for ours, theirs in zip(samples[what], samples[peer], strict=True)]
    seconds = (statistics.median(samples[what]), statistics.median(samples[peer]))
    return summary(label or what, peer, ratios, seconds=seconds, bar=bar)


def summary(
    what: str,
    peer: str,
    values: Sequence[float],
    *,
    unit: str = "x",
    seconds: tuple[float, float] | None = None,
    bar: float | None = None,
) -> Row:
    """Return the row of the median and the quartiles of some values."""
    low, median, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else 3 * list(values)
    return Row(what, peer, median, (low, high), unit, seconds, bar)


def _figure(value: float, unit: str) -> str:
    return f"{value:.3f}" if unit == "x" else f"{value:.2f} {unit}"


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
