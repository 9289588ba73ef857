"""What an installed plugin costs an interpreter that starts, and what importing it costs a program.

Each figure is the CPU time of whole processes, started in turn. The environments hold compiled bytecode, as
those of users do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.benchmarks.measure import Row, Samples, Table, interleave, ratio

ROOT = Path(__file__).parents[2]


def quietly(*command: str | Path) -> None:
    """Run a command that says something only when it fails."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT)
    if result.returncode:
        raise RuntimeError(f"{command} failed:\n{result.stdout}{result.stderr}")


def environment(directory: Path, *packages: str) -> Path:
    """Return the interpreter of a new virtual environment with these packages in it, and not even pip."""
    venv.create(directory)
    python = directory / "bin" / "python"
    if packages:
        quietly(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *packages)
    quietly(python, "-m", "compileall", "-q", directory)
    return python


def build_wheel(directory: Path) -> str:
    """Build the wheel and return its path."""
    quietly(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory, ROOT)
    (wheel,) = directory.glob("*.whl")
    return str(wheel)


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


def interpreter(wheel: str, directory: Path, repeats: int) -> tuple[Samples, list[str]]:
    """Return samples of ``python -c pass`` in environments without and with the start-up files."""
    none = environment(directory / "none")
    plugin = environment(directory / "plugin", "--no-deps", wheel)
    cases = {
        "none": spawn(none, "pass", {}),
        "off": spawn(plugin, "pass", {}),
        "on": spawn(plugin, "pass", {"HF_PACKFIX": "1"}),
    }
    notes = []
    try:
        autowrapt = environment(directory / "autowrapt", "autowrapt")
    except RuntimeError:
        notes.append("autowrapt could not be installed: not measured")
    else:
        # A group without entry points: the least that it can do when it is on.
        cases["autowrapt off"] = spawn(autowrapt, "pass", {})
        cases["autowrapt on"] = spawn(autowrapt, "pass", {"AUTOWRAPT_BOOTSTRAP": "nothing.to.wrap"})
    return interleave(cases, repeats), notes


def program(wheel: str, directory: Path, repeats: int) -> Samples:
    """Return samples of importing the Trainer, alone and with the plugin, as a library of this interpreter."""
    target = directory / "library"
    quietly(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel)
    quietly(sys.executable, "-m", "compileall", "-q", target)
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
        wheel = build_wheel(directory / "dist")
        samples, notes = interpreter(wheel, directory, 20 if quick else 300)
        imports = program(wheel, directory, 4 if quick else 25)
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
