"""Run the behavioural tests on every pair of transformers and accelerate that is supported.

    python -m tests.tools.matrix [VERSION ...] [--part behaviour|conformance] [--jobs N]

The pairs are those of ``activation/versions.py``; VERSION names one by its transformers. Each pair gets a folder that
pip fills once; torch is this interpreter's own, linked. The oldest pair gets the oldest torch, wrapt,
importlib-metadata and packaging that ``pyproject.toml`` allows. Exits with 1 if a test fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
os.environ["HF_PACKFIX"] = "0"  # `versions` is all that is needed of the package here

from hf_packfix.activation.versions import TESTED  # noqa: E402

#: Where the tests are that upstream's release matters for; the marker `newest` leaves out what needs the newest.
FOLDERS = ("activation", "collator", "engine", "evaluation", "models", "packing", "patches", "test_conformance.py")
#: The parts of these tests, by their marks.
PARTS = {"behaviour": "not slow and not newest", "conformance": "conformance and not slow"}

#: Where the environments are.
CACHE = Path(tempfile.gettempdir()) / "hf_packfix_matrix"

#: The last release of the oldest torch that ``pyproject.toml`` allows; it was built for NumPy 1.
OLDEST_TORCH = "2.0.1"

#: What the tests import besides the pair itself.
TOOLS = ["datasets", "hypothesis", "optuna", "psutil", "pytest", "pytest-timeout", "pytest-xdist"]


def requirements(pair: dict[str, str]) -> list[str]:
    """Return what pip installs for a pair, accelerate aside."""
    needs = ["wrapt", "importlib-metadata", "packaging"]
    if pair == TESTED[0]:
        floors = re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        needs = [*(f"{name}=={dict(floors)[name]}" for name in needs), "numpy<2", "pyarrow<20"]
    return [f"transformers=={pair['transformers']}", *needs, *TOOLS]


def interpreter(torch: str | None = None) -> Path:
    """Return the Python of an environment that has torch and nothing else.

    pip installs the release that is given; by default, this interpreter's own is linked.
    """
    base = CACHE / f"torch-{torch or distribution('torch').version}"
    python = base / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    complete = base / "complete"
    if not complete.exists():
        venv.create(base, clear=True)
        site = next(base.glob("[Ll]ib/**/site-packages"))
        if torch is not None:
            command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", f"torch=={torch}"]
            subprocess.run([*command, "numpy<2"], check=True)
            complete.touch()
            return python
        for found in closure("torch"):
            for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
                link = site / top
                if not link.exists():
                    link.symlink_to(Path(str(found.locate_file(top))).resolve())
        complete.touch()
    return python


def closure(name: str) -> list[Distribution]:
    """Return an installed distribution and all that it requires."""
    found: dict[str, Distribution] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found[current] = distribution(current)
            needs = [Requirement(line) for line in found[current].requires or ()]
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return list(found.values())


def install(pair: dict[str, str]) -> Path:
    """Return a folder with the pair and its requirements, filled unless it is there."""
    # accelerate without its requirements, of which torch is the one that is missing: it would bring one of its own.
    return fill("-".join(pair.values()), requirements(pair), [f"accelerate=={pair['accelerate']}"])


def fill(name: str, needs: list[str], alone: list[str]) -> Path:
    """Return a folder with what pip installs, unless it is there: ``alone`` without their requirements."""
    # Under that name: dill, with which `datasets` takes fingerprints, pickles modules elsewhere by their contents.
    target = CACHE / name / "site-packages"
    complete, asked = target / "complete.json", [needs, alone]
    if complete.exists() and json.loads(complete.read_text(encoding="utf-8")) == asked:
        return target
    # `--python`: what is installed here has no say in what fits there.
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter()), "install", "--quiet", "--upgrade"]
    pip += ["--target", str(target)]
    subprocess.run([*pip, *needs], check=True)
    if alone:
        subprocess.run([*pip, "--no-deps", *alone], check=True)
    complete.write_text(json.dumps(asked), encoding="utf-8")
    return target


def environment(target: Path) -> dict[str, str]:
    """Return the environment variables of a program that imports what is installed in a folder, and this package."""
    inherited = {key: value for key, value in os.environ.items() if key != "HF_PACKFIX"}
    return inherited | {"PYTHONPATH": os.pathsep.join([str(target), str(ROOT)]), "OMP_NUM_THREADS": "1"}


def run(pair: dict[str, str], target: Path, part: str) -> tuple[str, subprocess.CompletedProcess[str]]:
    """Run a part of the tests on a pair that is installed in a folder; return versions and output."""
    torch = OLDEST_TORCH if pair == TESTED[0] else None
    files = [str(ROOT / "tests" / name) for name in FOLDERS]
    command = [str(interpreter(torch)), "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-m", PARTS[part], *files],
        cwd=ROOT,
        env=environment(target),
        capture_output=True,
        text=True,
        check=False,
    )
    versions = pair | ({} if torch is None else {"torch": torch})
    return ", ".join(f"{key} {value}" for key, value in versions.items()), done


def main() -> int:
    """Run, print what was skipped and how many tests passed, and return 1 where something failed."""
    known = [pair["transformers"] for pair in TESTED]
    parser = argparse.ArgumentParser(description="run the behavioural tests on every supported version")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--part", choices=list(PARTS), default="behaviour")
    parser.add_argument("--jobs", type=int, default=2, help="how many versions to test at a time")
    options = parser.parse_args()
    for version in options.versions:
        if version not in known:
            parser.error(f"{version} is not in activation/versions.py; expected one of {', '.join(known)}")
    pairs = [pair for pair in TESTED if pair["transformers"] in (options.versions or known)]
    installed = [(pair, install(pair)) for pair in pairs]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda found: run(*found, options.part), installed))
    for name, done in results:
        lines = (done.stdout + done.stderr).splitlines()
        summary = [line for line in lines if line.startswith("SKIPPED")] + lines[-1:]
        print(f"\n=== {name}", *(lines if done.returncode else summary), sep="\n")
    return int(any(done.returncode for _, done in results))


if __name__ == "__main__":
    sys.exit(main())
