"""The demo: who is speaking? Real recordings, an unchanged ``transformers.Trainer``, packed beside padded."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path

import torch
from transformers import set_seed

import hf_packfix
from hf_packfix.commands.demo.data import Row, load
from hf_packfix.commands.demo.picture import draw
from hf_packfix.commands.demo.training import PACKED, Run, new_trainer, train
from hf_packfix.models import RecurrentForSequenceClassification


class DemoError(Exception):
    """Something the user can mend: a missing package, a folder that cannot be written."""


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
        DemoError: a package of the demo extra is missing, or ``output_dir`` cannot be written; hf_packfix is off.
    """
    started = time.monotonic()
    if not hf_packfix.is_enabled():
        raise DemoError(f"the demo needs the plugin, which is not enabled: {hf_packfix.status().reason}")
    torch.set_num_threads(1)  # these batches gain little from more, and lose much where other programs run
    _make_directory(output_dir)
    _require("sktime", "the demo needs sktime for its data")
    if plot:
        _require("matplotlib", "the picture needs matplotlib (--no-plot goes without)")
    train_rows, test_rows = load()
    _show_the_problem(train_rows, output_dir)

    print(
        f"\nWith hf_packfix: {epochs} epochs on {len(train_rows)} recordings, packed and padded in turns:",
        flush=True,
    )
    packed, padded = train(train_rows, test_rows, output_dir, seed, epochs)

    saved = output_dir / "model"
    packed.trainer.save_model(str(saved))
    loaded = RecurrentForSequenceClassification.from_pretrained(saved)
    again = new_trainer(PACKED, loaded, [], output_dir, seed).predict(test_rows)  # type: ignore[arg-type]
    # Not to the last bit: kernels round by where the weights lie in memory.
    before, after = map(torch.as_tensor, (packed.predictions, again.predictions))
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-5):
        raise RuntimeError(f"the model loaded from {saved} does not predict what the trained one does")
    print(f"saved to {saved}, loaded with from_pretrained: the same {len(test_rows)} predictions")

    if plot:
        picture = output_dir / "demo.png"
        draw(packed, padded, picture)
        print(f"picture: {picture}")
    print(f"{time.monotonic() - started:.0f} seconds")
    _compare(packed, padded)
    print(f"accuracy: {packed.accuracy:.3f} on {len(test_rows)} test recordings (padded: {padded.accuracy:.3f})")
    return 0


def _compare(packed: Run, padded: Run) -> None:
    """Print three lines: what is equal, and what packing saves."""
    saved = 1 - packed.steps / padded.steps
    print(f"losses of the {len(packed.losses)} batches: differ by at most {packed.largest_difference(padded):.1e}")
    print(f"steps computed: padded {padded.steps:,}, packed {packed.steps:,} ({saved:.0%} saved)")
    print(
        f"CPU time of training, one thread: padded {padded.seconds:.1f} s (torch's GRU, padding included), packed "
        f"{packed.seconds:.1f} s (hf_packfix.rnn's GRU): {packed.seconds / padded.seconds:.0%}"
    )


def _show_the_problem(rows: list[Row], directory: Path) -> None:
    set_seed(0)
    trainer = new_trainer(PACKED, PACKED.new_model(), rows, directory, seed=0)
    batch = PACKED.collate(rows[:2])
    hf_packfix.disable()
    print("Without hf_packfix, Trainer._prepare_inputs on a batch with a PackedSequence:")
    try:
        trainer._prepare_inputs(batch)
        print("  works: this version of transformers handles PackedSequence itself")
    except Exception as error:
        print(f"  {type(error).__name__}: {error}")
    finally:
        hf_packfix.enable()


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".writable").touch()
        (directory / ".writable").unlink()
    except OSError as error:
        raise DemoError(f"--output-dir: cannot write to {directory}: {error.strerror}") from error


def _require(package: str, reason: str) -> None:
    try:
        import_module(package)
    except ImportError as error:
        raise DemoError(f"{reason}; install: pip install 'hf-packfix[demo]'") from error
