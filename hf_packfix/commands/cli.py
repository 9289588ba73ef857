"""The commands: ``hf-packfix`` and ``python -m hf_packfix``."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from hf_packfix._version import __version__
from hf_packfix.commands import CommandError

RUN_USAGE = "\n       ".join(
    f"hf-packfix run [--status] {program} [ARGS...]" for program in ("SCRIPT", "-m MODULE", "-c CODE", "-")
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
    parser, commands = _parser()
    if words and words[0] not in commands and (hint := _hint(words, commands)):
        parser.exit(2, f"hf-packfix: error: {words[0]!r} is not a command; did you mean: hf-packfix {hint}\n")
    options, unknown = parser.parse_known_args(words)
    if options.command is None and not unknown:
        parser.print_help()
        return 2
    command = commands.get(options.command, parser)
    if unknown:
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if options.command == "doctor":
            from hf_packfix.commands import doctor

            return doctor.run(options.modules, as_json=options.as_json, verbose=options.verbose)
        if options.command == "docs":
            from hf_packfix.commands import pages

            return pages.run(options.page)
        from hf_packfix.commands import demo

        return demo.run(options.seed, options.epochs, options.output_dir, plot=options.plot)
    except CommandError as error:
        command.error(str(error))


def _hint(words: Sequence[str], commands: Iterable[str]) -> str:
    """Return what may be meant by words that do not begin with a command: a program to run, or a misspelt command."""
    first = words[0]
    if first[:2] in ("-m", "-c") or first.endswith((".py", ".pyc")) or os.path.exists(first):
        return f"run {shlex.join(words)}"
    return " ".join(difflib.get_close_matches(first, commands, n=1))


def _run(words: Sequence[str]) -> int:
    from hf_packfix.commands import run

    parser = argparse.ArgumentParser(
        prog="hf-packfix run",
        usage=RUN_USAGE,
        description="Run a program as Python would, with the plugin on in it and in its child processes, even if "
        "HF_PACKFIX=0 is set; for places where start-up files do not work (--target folders, zip applications, -S).",
    )
    parser.add_argument("--status", action="store_true", help="show on stderr, at the end, what was patched in it")
    parser.add_argument("-m", metavar="MODULE", help="run a module, as `python -m` does")
    parser.add_argument("-c", metavar="CODE", help="run code, as `python -c` does")
    parser.add_argument("SCRIPT", help="a script, a folder or a zip file with a __main__, or - for standard input")
    parser.add_argument("ARGS", help="handed to the program")
    show_status = words[:1] == ["--status"]
    option, target, arguments = _program(parser, words[show_status:])
    try:
        run.run(target, arguments, option=option, show_status=show_status)
    except CommandError as error:
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


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser, and that of each command by its name."""
    parser = argparse.ArgumentParser(
        prog="hf-packfix", description="PackedSequence batches in an unchanged Hugging Face Trainer."
    )
    parser.add_argument("-V", "--version", action="version", version=f"hf-packfix {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    commands.add_parser("run", help="run a script, a module or code with the plugin on")  # see `_run`

    doctor = commands.add_parser(
        "doctor",
        help="check whether the plugin works here, and if not, why",
        description="Examine every patch, check the start-up files, train one step on a packed batch and try the "
        "recurrent models. Exit status: 0 healthy, 1 not healthy, 2 bad usage, 3 off (HF_PACKFIX=0).",
    )
    doctor.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        default=[],
        help="import a module, also one in the working directory, and list every Trainer subclass with the patched "
        "methods it overrides, and whether they call super() (repeatable)",
    )
    doctor.add_argument("-v", "--verbose", action="store_true", help="list every patch and every file")
    doctor.add_argument("--json", dest="as_json", action="store_true", help="print everything as JSON")

    demo = commands.add_parser(
        "demo",
        help="train a recurrent speaker classifier on real recordings, packed and padded",
        description="Train a recurrent speaker classifier on JapaneseVowels (640 recordings, 9 speakers) with an "
        "unchanged Trainer, on packed and on padded batches; compare the two, and write the model and a picture.",
    )
    demo.add_argument("--seed", type=partial(_at_least, 0), default=0, help="of weights and shuffling (default: 0)")
    demo.add_argument("--epochs", type=partial(_at_least, 1), default=30, help="passes over the data (default: 30)")
    demo.add_argument(
        "--output-dir", type=Path, default=Path("demo_output"), help="for the results (default: demo_output)"
    )
    demo.add_argument("--no-plot", dest="plot", action="store_false", help="do not write demo.png")

    docs = commands.add_parser(
        "docs",
        help="print a page of the documentation",
        description="Print a page of the documentation as it is, in Markdown; without PAGE, list the pages.",
    )
    docs.add_argument("page", metavar="PAGE", nargs="?", help="its name, such as troubleshooting")
    return parser, commands.choices


def _at_least(minimum: int, text: str) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"expected a whole number from {minimum} on, found {text!r}")
    return int(text)
