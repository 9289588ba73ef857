"""Run the behavioural tests on every pair of transformers and accelerate that is supported.

    python -m tests.tools.matrix [VERSION ...] [--pre] [--part behaviour|conformance] [--cache DIR] [--jobs N]

The pairs are those of ``activation/versions.py``; VERSION names one by its transformers. ``newest`` is what pip
resolves today, with ``--pre`` pre-releases as well. Each pair gets a folder that pip fills once, and ``newest`` one
that it fills every time; torch is this interpreter's own, linked. The oldest pair gets the oldest torch, wrapt,
importlib-metadata and packaging that ``pyproject.toml`` allows. Exits with 1 if a test fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
os.environ["HF_PACKFIX"] = "0"  # `versions` is all that is needed of the package here

from hf_packfix.activation.versions import TESTED  # noqa: E402

#: Where the tests are that upstream's release matters for; the marker `newest` leaves out what needs the newest.
FOLDERS = ("activation", "collator", "engine", "evaluation", "models", "packing", "patches", "test_conformance.py")
#: The parts of these tests, by their marks.
PARTS = {"behaviour": "not slow and not newest", "conformance": "conformance and not slow"}

#: Where the environments are by default.
CACHE = Path(tempfile.gettempdir()) / "hf_packfix_matrix"

#: The last release of the oldest torch that ``pyproject.toml`` allows; it was built for NumPy 1.
OLDEST_TORCH = "2.0.1"

#: What the tests import besides the pair itself.
TOOLS = ["datasets", "hypothesis", "psutil", "pytest", "pytest-timeout", "pytest-xdist"]


@dataclass(frozen=True)
class Result:
    """What pytest reported on one pair; a run without a report counts as one failure."""

    name: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    reasons: tuple[str, ...]
    output: str


def requirements(pair: dict[str, str]) -> list[str]:
    """Return what pip installs for a pair, accelerate aside."""
    needs = ["wrapt", "importlib-metadata", "packaging"]
    if pair == TESTED[0]:
        floors = re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        needs = [*(f"{name}=={dict(floors)[name]}" for name in needs), "numpy<2", "pyarrow<20"]
    return [f"transformers=={pair['transformers']}", *needs, *TOOLS]


def interpreter(cache: Path, torch: str | None = None) -> Path:
    """Return the Python of an environment that has torch and nothing else.

    pip installs the release that is given; by default, this interpreter's own is linked.
    """
    base = cache / f"torch-{torch or distribution('torch').version}"
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


def install(pair: dict[str, str], cache: Path) -> Path:
    """Return a folder with the pair and its requirements, filled unless it is there."""
    # accelerate without its requirements, of which torch is the one that is missing: it would bring one of its own.
    return fill(cache, "-".join(pair.values()), requirements(pair), [f"accelerate=={pair['accelerate']}"])


def newest(cache: Path, *, pre: bool) -> tuple[dict[str, str], Path]:
    """Install what pip resolves today, with or without pre-releases; return the pair that it is, and the folder."""
    name = "newest-pre" if pre else "newest"
    shutil.rmtree(cache / name, ignore_errors=True)
    flags = ["--pre"] if pre else []
    needs = ["transformers", "wrapt", "importlib-metadata", "packaging", *TOOLS]
    target = fill(cache, name, [*flags, *needs], [*flags, "accelerate"])
    found = {item.name: item.version for item in distributions(path=[str(target)])}
    return {package: found[package] for package in TESTED[-1]}, target


def fill(cache: Path, name: str, needs: list[str], alone: list[str]) -> Path:
    """Return a folder with what pip installs, unless it is there: ``alone`` without their requirements."""
    # Under that name: dill, with which `datasets` takes fingerprints, pickles modules elsewhere by their contents.
    target = cache / name / "site-packages"
    complete, asked = target / "complete.json", [needs, alone]
    if complete.exists() and json.loads(complete.read_text(encoding="utf-8")) == asked:
        return target
    # `--python`: what is installed here has no say in what fits there.
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter(cache)), "install", "--quiet", "--upgrade"]
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


def run(pair: dict[str, str], target: Path, part: str, cache: Path) -> Result:
    """Run a part of the tests on a pair that is installed in a folder."""
    torch = OLDEST_TORCH if pair == TESTED[0] else None
    python = interpreter(cache, torch)
    report = cache / f"{'-'.join(pair.values())}-{part}.xml"
    report.unlink(missing_ok=True)
    files = [str(ROOT / "tests" / name) for name in FOLDERS]
    command = [str(python), "-m", "pytest", "-q", "--tb=short", "-m", PARTS[part], f"--junitxml={report}"]
    command += ["-p", "no:cacheprovider"]
    start = time.monotonic()
    done = subprocess.run(
        [*command, *files], cwd=ROOT, env=environment(target), capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - start
    versions = pair | ({} if torch is None else {"torch": torch})
    name, output = ", ".join(f"{key} {value}" for key, value in versions.items()), done.stdout + done.stderr
    if not report.exists():
        return Result(name, 0, 1, 0, seconds, (), output)
    suite = next(ElementTree.parse(report).iter("testsuite"))
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"] or int(done.returncode != 0)
    passed = count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    reasons = sorted({skip.get("message", "") for skip in suite.iter("skipped")})
    return Result(name, passed, failed, count["skipped"], seconds, tuple(reasons), output)


def main() -> int:
    """Run, print the table, and return 1 where something failed."""
    known = [pair["transformers"] for pair in TESTED]
    parser = argparse.ArgumentParser(description="run the behavioural tests on every supported version")
    parser.add_argument(
        "versions", nargs="*", metavar="VERSION", help=f"of {', '.join(known)}, newest; the numbers by default"
    )
    parser.add_argument("--pre", action="store_true", help="let `newest` be a pre-release")
    parser.add_argument("--part", choices=list(PARTS), default="behaviour")
    parser.add_argument("--jobs", type=int, default=2, help="how many versions to test at a time")
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    for version in options.versions:
        if version not in (*known, "newest"):
            parser.error(f"{version} is not in activation/versions.py; expected one of {', '.join(known)}, newest")
    if options.pre and "newest" not in options.versions:
        parser.error("--pre is for `newest`: python -m tests.tools.matrix newest --pre")
    pairs = [pair for pair in TESTED if pair["transformers"] in (options.versions or known)]
    options.cache.mkdir(parents=True, exist_ok=True)
    interpreter(options.cache)
    installed = [(pair, install(pair, options.cache)) for pair in pairs]
    if "newest" in options.versions:
        installed.append(newest(options.cache, pre=options.pre))
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda found: run(*found, options.part, options.cache), installed))
    for result in results:
        if result.failed:
            print(f"\n=== {result.name}\n{result.output}")
        for reason in result.reasons:
            print(f"skipped on {result.name}: {reason}")
    print(f"\n{'versions':<60}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}")
    for result in results:
        print(f"{result.name:<60}{result.passed:>8}{result.failed:>8}{result.skipped:>8}{result.seconds:>9.0f}")
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
