"""What an installed plugin costs an interpreter that starts, and what importing it costs a program.

Each figure is the CPU time of whole processes, started in turn. The environments hold compiled bytecode, as
those of users do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.benchmarks.measure import Row, Samples, Table, interleave, ratio
from tests.support.installed import Environment, wheel


def environment(directory: Path, *packages: str) -> Path:
    """Return the interpreter of a new virtual environment with these packages in it, and not even pip."""
    fresh = Environment(directory)
    if packages:
        fresh.pip("install", "--quiet", *packages)
    fresh.run("-m", "compileall", "-q", str(directory))
    return fresh.python


def spawn(python: str | Path, code: str, variables: Mapping[str, str]) -> Callable[[], float]:
    """Return a function that runs code in a fresh interpreter and returns the CPU seconds that it took."""
    command = [str(python), "-c", code]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_PACKFIX"))}
    values = {**inherited, **variables}

    def once() -> float:
        _, status, usage = os.wait4(os.posix_spawn(command[0], command, values), 0)
        if status:
            raise RuntimeError(f"{command} ended with status {status}")
        return usage.ru_utime + usage.ru_stime

    return once


def interpreter(built: str, directory: Path, repeats: int) -> tuple[Samples, list[str]]:
    """Return samples of ``python -c pass`` in environments without and with the start-up files."""
    none = environment(directory / "none")
    plugin = environment(directory / "plugin", "--no-deps", built)
    cases = {
        "none": spawn(none, "pass", {}),
        "off": spawn(plugin, "pass", {}),
        "on": spawn(plugin, "pass", {"HF_PACKFIX": "1"}),
    }
    notes = []
    try:
        autowrapt = environment(directory / "autowrapt", "autowrapt")
    except subprocess.CalledProcessError:
        notes.append("autowrapt could not be installed: not measured")
    else:
        # A group without entry points: the least that it can do when it is on.
        cases["autowrapt off"] = spawn(autowrapt, "pass", {})
        cases["autowrapt on"] = spawn(autowrapt, "pass", {"AUTOWRAPT_BOOTSTRAP": "nothing.to.wrap"})
    return interleave(cases, repeats), notes


def program(built: str, directory: Path, repeats: int) -> Samples:
    """Return samples of importing the Trainer, alone and with the plugin, as a library of this interpreter."""
    target = directory / "library"
    for command in (
        ["pip", "install", "--quiet", "--no-deps", "--target", target, built],
        ["compileall", "-q", target],
    ):
        subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    trainer = "from transformers import Trainer"
    variables = {"PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}  # not the source tree of the working directory
    return interleave(
        {
            "from transformers import Trainer": spawn(sys.executable, trainer, variables),
            "import hf_packfix as well": spawn(sys.executable, f"import hf_packfix; {trainer}", variables),
        },
        repeats,
    )


def run(quick: bool) -> Table:
    """Measure start-up off, on, and by import."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        samples, notes = interpreter(str(wheel()), directory, 20 if quick else 300)
        imports = program(str(wheel()), directory, 4 if quick else 25)
    rows: list[Row] = [
        ratio(samples, "off", "none", label="installed, HF_PACKFIX unset", bar=1.05),
        ratio(samples, "on", "none", label="installed, HF_PACKFIX=1", bar=1.10),
    ]
    if "autowrapt on" in samples:
        rows += [
            ratio(samples, "autowrapt off", "none"),
            ratio(samples, "autowrapt on", "none"),
            ratio(samples, "on", "autowrapt on", label="installed, HF_PACKFIX=1"),
        ]
    rows.append(ratio(imports, "import hf_packfix as well", "from transformers import Trainer", bar=1.01))
    return Table("Start-up: CPU time of a process", rows, notes)
