"""Run the start-up tests, or the conformance tests, on any Python interpreter.

    python -m tests.tools.pythons INTERPRETER [--part startup|conformance]

INTERPRETER is a path or a command, such as ``python3.15``; its ``venv`` module must work. pytest runs on that
interpreter, in a virtual environment that is kept for the next run; any interpreter will do, such as one of a
distribution's container or chroot. The start-up tests need neither torch nor transformers. For the conformance tests,
pip installs this package and what it requires, torch included; ``PIP_CONSTRAINT`` pins any of it. This script needs
only the standard library. It exits with the status of pytest.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Where the virtual environments are.
CACHE = Path(tempfile.gettempdir()) / "hf_packfix_pythons"


#: The parts of the tests: what pip installs, the arguments of pytest, and environment variables.
PARTS = {
    # No conftest: it imports torch. HF_PACKFIX=0: otherwise importing hf_packfix activates it, which requires
    # transformers. The tests set the variable themselves for the interpreters that they start.
    "startup": (
        ["pytest", "pytest-timeout", "pytest-xdist"],
        ["--noconftest", "tests/startup/test_startup.py"],
        {"HF_PACKFIX": "0"},
    ),
    # Without the extra `test`: not all that it names has been released for the newest Python.
    "conformance": (
        [str(ROOT), "pytest", "pytest-timeout", "pytest-xdist"],
        ["-m", "conformance", "tests/test_conformance.py", "tests/patches/test_drift.py"],
        {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    ),
}


def main() -> int:
    """Install what is missing, print the versions, run the tests, and return the exit status of pytest."""
    parser = argparse.ArgumentParser(description="run the start-up or conformance tests on any Python interpreter")
    parser.add_argument("interpreter", help="path or command, such as python3.15")
    parser.add_argument("--part", choices=list(PARTS), default="startup")
    options = parser.parse_args()
    interpreter = shutil.which(options.interpreter)
    if interpreter is None:
        parser.error(f"{options.interpreter} is not an interpreter; expected a path or a command, such as python3.15")
    interpreter = os.path.abspath(interpreter)
    requirements, arguments, variables = PARTS[options.part]
    directory = CACHE / (re.sub(r"[^\w.]+", "-", interpreter).strip("-") + f"-{options.part}")
    subprocess.run([interpreter, "-m", "venv", str(directory)], check=True)
    python = str(directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", *requirements], check=True)
    subprocess.run([python, "-VV"], check=True)
    freeze = [*pip, "list", "--format=freeze"]
    installed = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout
    print(*re.findall(r"(?m)^(?:pytest|torch|transformers|accelerate|wrapt)==.*", installed), sep="\n", flush=True)
    inherited = {key: value for key, value in os.environ.items() if key not in ("HF_PACKFIX", "PYTHONPATH")}
    variables = {**inherited, **variables, "HF_PACKFIX_TEST_PYTHON": interpreter}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
