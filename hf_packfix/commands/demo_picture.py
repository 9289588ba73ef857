"""The demo's picture: equal losses, fewer steps, less time, and one batch packed and padded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_packfix.commands.demo import Run

TITLE: dict[str, Any] = {"fontsize": 12, "fontweight": "bold"}
PADDED, PADDING, PACKED = "#d95f02", "#f7c9a3", "#1f5fa8"


def draw(packed: Run, padded: Run, path: Path) -> None:
    """Write a PNG of 1800 pixels' width, twice that at which it is mostly shown."""
    # The object interface, so that no window system and no global state is involved.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch as Swatch

    figure = Figure(figsize=(9, 9), layout="constrained")
    FigureCanvasAgg(figure)
    colours = {"padded, torch's GRU": PADDED, "its padding": PADDING, "packed, hf_packfix.rnn's GRU": PACKED}
    figure.legend(
        handles=[Swatch(color=colour, label=name) for name, colour in colours.items()],
        loc="outside upper center",
        ncols=len(colours),
        fontsize=11,
        frameon=False,
    )
    parts: Any = figure.subfigures(3, 1, height_ratios=[3.1, 2.2, 3.7])
    losses, savings, batch = parts
    _draw_losses(losses.subplots(), packed, padded)
    _draw_savings(savings.subplots(), packed, padded)
    _draw_batch(batch, packed.first_lengths)
    figure.savefig(path, dpi=200)


def _draw_losses(axes: Any, packed: Run, padded: Run) -> None:
    batches = range(1, len(packed.losses) + 1)
    axes.plot(batches, padded.losses, color=PADDED, alpha=0.55, linewidth=5)
    axes.plot(batches, packed.losses, color=PACKED, linewidth=1.3)
    axes.set(xlabel="training batch", ylabel="loss (log scale)", yscale="log")
    difference = packed.largest_difference(padded)
    axes.set_title(f"Packed and padded have the same loss at every batch (to {difference:.0e})", **TITLE)
    axes.margins(x=0.01)
    axes.grid(alpha=0.25)


def _draw_savings(axes: Any, packed: Run, padded: Run) -> None:
    """Draw steps and seconds as bars, both in percent of the padded run's."""
    steps, seconds = packed.steps / padded.steps, packed.seconds / padded.seconds
    bars = [
        # place, percent, colour, text
        (0.0, 100.0, PADDED, f"{padded.steps:,} steps"),
        (1.0, 100 * steps, PACKED, f"{packed.steps:,} steps"),
        (2.5, 100.0, PADDED, f"{padded.seconds:.1f} s, torch's GRU"),
        (3.5, 100 * seconds, PACKED, f"{packed.seconds:.1f} s, hf_packfix.rnn's GRU"),
    ]
    for place, percent, colour, text in bars:
        axes.barh(place, percent, color=colour, height=0.86)
        axes.text(percent + 1, place, text, va="center", fontsize=10)
    for place in (0.0, 2.5):  # of the time, padding has its share of the steps
        axes.barh(place, 100 * (1 - steps), left=100 * steps, color=PADDING, height=0.86)
    axes.invert_yaxis()
    axes.set(xlabel="percent of padded", xlim=(0, 1.3 * max(100, 100 * seconds)))
    axes.set_yticks([0.5, 3.0], ["steps computed", "CPU time"])
    axes.set_title(f"Packing computes {steps:.0%} of the steps and takes {seconds:.0%} of the time", **TITLE)


def _draw_batch(figure: Any, lengths: list[int]) -> None:
    """Draw the steps of each sequence: as they come with padding, and by length as a PackedSequence has them."""
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    longest, rows = max(lengths), range(len(lengths))
    padding = [longest - length for length in lengths]
    left.barh(rows, lengths, color=PADDED, height=0.8)
    left.barh(rows, padding, left=lengths, color=PADDING, height=0.8)
    right.barh(rows, sorted(lengths, reverse=True), color=PACKED, height=0.8)
    left.set(xlabel="step", ylabel="sequence", xlim=(0, longest))
    left.invert_yaxis()
    right.set(xlabel="step")
    left.set_title(f"padded: {longest * len(lengths):,} steps", fontsize=11)
    right.set_title(f"packed, longest first: {sum(lengths):,} steps", fontsize=11)
    figure.suptitle(f"In the first batch, packing leaves out {sum(padding):,} steps of padding", **TITLE)
