"""The command: ``python -m tests.benchmarks``."""

from __future__ import annotations

import argparse
import importlib
import platform
from collections.abc import Sequence
from importlib.metadata import version

#: Modules of this folder with a function ``run(quick) -> Table``.
NAMES = ("hot_path", "cold_patches", "startup", "end_to_end", "evaluation", "collating", "layers", "comparison")
#: One more, which needs a GPU, and runs only if it is named.
NAMED_ONLY = ("gpu",)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run benchmarks and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="What the plugin costs.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which (default: all but gpu): {', '.join(NAMES + NAMED_ONLY)}"
    )
    parser.add_argument("--quick", action="store_true", help="smaller and fewer repeats: does it run at all?")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in NAMES + NAMED_ONLY]
    if unknown:
        parser.error(f"no benchmark is named {unknown[0]!r}; there are {', '.join(NAMES + NAMED_ONLY)}")

    import torch

    torch.set_num_threads(1)
    packages = ("torch", "transformers", "accelerate", "wrapt", "numpy")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    print(", ".join(f"{name} {found}" for name, found in versions.items()), "; one thread", sep="")

    for name in options.names or NAMES:
        table = importlib.import_module(f"tests.benchmarks.{name}").run(options.quick)
        print(f"\n{table}", flush=True)


if __name__ == "__main__":
    main()
