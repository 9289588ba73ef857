"""The commands: ``hf-packfix`` and ``python -m hf_packfix``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_packfix._version import __version__

__all__ = ["main"]

RUN_USAGE = "\n       ".join(
    f"hf-packfix run {program} [ARGS...]" for program in ("SCRIPT", "-m MODULE", "-c CODE", "-")
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; 2 for bad usage.

    What a command needs is imported when it is asked for: the demo loads torch and transformers, ``run`` must
    leave that to the program it runs.

    Args:
        argv: the arguments after the program's name; those of the process by default.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["run"]:
        return _run(words[1:])
    parser = _parser()
    options = parser.parse_args(words)
    if options.command == "doctor":
        from hf_packfix.commands import doctor

        return doctor.run(options.modules, as_json=options.as_json)
    if options.command == "docs":
        from hf_packfix.commands import pages

        try:
            return pages.run(options.page)
        except pages.UnknownPageError as error:
            parser.error(f"argument PAGE: {error}")
    if options.command == "demo":
        from hf_packfix.commands import demo

        try:
            return demo.run(options.seed, options.epochs, options.output_dir, plot=options.plot)
        except demo.DemoError as error:
            parser.error(str(error))
    parser.print_help()
    return 2


def _run(words: Sequence[str]) -> int:
    from hf_packfix.commands import run

    parser = argparse.ArgumentParser(
        prog="hf-packfix run",
        usage=RUN_USAGE,
        description="Run a program as Python would, with the plugin on in it and in its child processes, even if "
        "HF_PACKFIX=0 is set; for places where start-up files do not work (--target folders, zip applications, -S).",
    )
    parser.add_argument("-m", metavar="MODULE", help="run a module, as `python -m` does")
    parser.add_argument("-c", metavar="CODE", help="run code, as `python -c` does")
    parser.add_argument("SCRIPT", help="a script, a folder or a zip file with a __main__, or - for standard input")
    parser.add_argument("ARGS", help="handed to the program")
    option, target, arguments = _program(parser, words)
    try:
        run.run(target, arguments, option=option)
    except run.RunError as error:
        parser.error(str(error))
    return 0


def _program(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[str, str, Sequence[str]]:
    """Return the option, the program and its arguments; as Python does, take every word after the program for them.

    Not by argparse, which would take options of the program's for its own.
    """
    if not words:
        parser.error("the following arguments are required: SCRIPT")
    first, rest = words[0], words[1:]
    option, joined = first[:2], first[2:]
    if option in ("-m", "-c"):
        if not joined and not rest:
            parser.error(f"argument {option}: expected one argument")
        return (option, joined, rest) if joined else (option, rest[0], rest[1:])
    if first == "--" and rest:
        return "", rest[0], rest[1:]
    if first in ("-h", "--help"):
        parser.print_help()
        parser.exit()
    if first.startswith("-") and first != "-":
        parser.error(
            f"unrecognized arguments: {first}; options of Python stand before: python {first} -m hf_packfix run"
        )
    return "", first, rest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-packfix", description="PackedSequence batches in an unchanged Hugging Face Trainer."
    )
    parser.add_argument("-V", "--version", action="version", version=f"hf-packfix {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    commands.add_parser("run", help="run a script, a module or code with the plugin on")  # see `_run`

    doctor = commands.add_parser(
        "doctor",
        help="say whether the plugin works here, and why not",
        description="Show where every patch stands, check the start-up files and train one step on a packed batch. "
        "Exit status: 0 healthy, 1 not, 2 bad usage.",
    )
    doctor.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        default=[],
        help="import a module and list every Trainer subclass with the patched methods it overrides, and whether they "
        "call super() (repeatable)",
    )
    doctor.add_argument("--json", dest="as_json", action="store_true", help="for machines")

    demo = commands.add_parser(
        "demo",
        help="train a recurrent speaker classifier on real recordings, packed and padded",
        description="Train a recurrent speaker classifier on JapaneseVowels (640 recordings, 9 speakers) with an "
        "unchanged Trainer, on packed and on padded batches; compare the two, and write the model and a picture.",
    )
    demo.add_argument("--seed", type=_at_least(0), default=0, help="of weights and shuffling (default: 0)")
    demo.add_argument("--epochs", type=_at_least(1), default=30, help="passes over the data (default: 30)")
    demo.add_argument(
        "--output-dir", type=Path, default=Path("demo_output"), help="for the results (default: demo_output)"
    )
    demo.add_argument("--no-plot", dest="plot", action="store_false", help="do not write demo.png")

    docs = commands.add_parser(
        "docs",
        help="print a page of the documentation",
        description="Print a page of the documentation as it is, in Markdown; without PAGE, list the pages.",
    )
    docs.add_argument("page", metavar="PAGE", nargs="?", help="its name, such as performance")
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
