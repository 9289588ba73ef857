"""The commands: ``hf-packfix`` and ``python -m hf_packfix``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_packfix._version import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; 2 for bad usage.

    Args:
        argv: the arguments after the program's name; those of the process by default.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command == "demo":
        # Imported here: the demo needs torch, transformers and the packages of the demo extra.
        from hf_packfix import demo

        try:
            return demo.run(options.seed, options.epochs, options.output_dir, plot=options.plot)
        except demo.DemoError as error:
            parser.error(str(error))
    parser.print_help()
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-packfix", description="PackedSequence batches in an unchanged Hugging Face Trainer."
    )
    parser.add_argument("--version", action="version", version=f"hf-packfix {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a recurrent speaker classifier on real recordings",
        description="Train a recurrent speaker classifier on JapaneseVowels (640 recordings, 9 speakers) with "
        "packed batches and an unchanged Trainer; write the model and a picture.",
    )
    demo.add_argument("--seed", type=_at_least(0), default=0, help="of weights and shuffling (default: 0)")
    demo.add_argument("--epochs", type=_at_least(1), default=30, help="passes over the data (default: 30)")
    demo.add_argument(
        "--output-dir", type=Path, default=Path("demo_output"), help="for the results (default: demo_output)"
    )
    demo.add_argument("--no-plot", dest="plot", action="store_false", help="do not write demo.png")
    return parser


class _at_least:  # noqa: N801 (argparse shows the name of a type in its errors)
    """An argparse type: a whole number from a minimum on."""

    def __init__(self, minimum: int) -> None:
        self.minimum = minimum

    def __call__(self, text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = self.minimum - 1
        if number < self.minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number from {self.minimum} on, found {text!r}")
        return number
