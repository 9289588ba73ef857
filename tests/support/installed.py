"""Fresh installations of the wheel, for the tests of what happens at the start of an interpreter."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
STARTUP = ROOT / "hf_packfix/startup"
STARTUP_FILES = ("hf_packfix_auto.pth", "hf_packfix_auto.start", "_hf_packfix_boot.py")


def build(what: str, source: Path, target: Path) -> Path:
    """Build a wheel or an sdist and return its path."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{what}", "--outdir", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = target.iterdir()
    return built


@functools.cache
def wheel() -> Path:
    """Return a wheel of this project, built once a test run."""
    return build("wheel", ROOT, Path(tempfile.mkdtemp(prefix="hf_packfix_wheel_")))


@functools.cache
def interpreters() -> dict[str, str]:
    """Return the Pythons 3.10 to 3.15 that are installed here, this one included, by version.

    If ``HF_PACKFIX_TEST_PYTHON`` names an interpreter, return that one only; ``tests/tools/pythons.py`` sets it.
    """
    if only := os.environ.get("HF_PACKFIX_TEST_PYTHON"):
        version = "import sys; print(*sys.version_info[:2], sep='.')"
        return {subprocess.run([only, "-c", version], capture_output=True, text=True, check=True).stdout.strip(): only}
    found = {f"{sys.version_info[0]}.{sys.version_info[1]}": getattr(sys, "_base_executable", sys.executable)}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in ("3.10", "3.11", "3.12", "3.13", "3.14", "3.15"):
        candidates = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
        for candidate in filter(None, candidates):
            check = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False)
            if check.stdout.startswith(f"Python {version}."):
                found.setdefault(version, candidate)
    return found


class Environment:
    """A virtual environment of its own: its interpreter, and its site-packages."""

    def __init__(self, directory: Path, base: str = sys.executable) -> None:
        subprocess.run([base, "-m", "venv", "--without-pip", str(directory)], check=True, capture_output=True)
        self.python = directory / "bin/python"
        (self.site,) = directory.glob("lib/python*/site-packages")

    def unpack(self) -> Environment:
        """Lay the files of the wheel into site-packages, as an installer does."""
        with zipfile.ZipFile(wheel()) as archive:
            archive.extractall(self.site)
        return self

    def pip(self, *arguments: str) -> None:
        """Run the pip of the test environment for this one."""
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *arguments]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def share_packages(self) -> Environment:
        """Let it see torch, transformers and all else of the test environment, but not its hf_packfix."""
        shared = Path(sysconfig.get_paths()["purelib"])
        links = self.site.parent / "shared"
        links.mkdir()
        for path in shared.iterdir():
            if not path.name.startswith(("hf_packfix", "_hf_packfix")) and path.suffix != ".pth":
                (links / path.name).symlink_to(path)
        # After our own site-packages on the path, so that a test can put another version in front. Read before our
        # own start-up file, so that coverage, where this run is measured, sees that as well.
        measure = "import coverage; coverage.process_startup()\n" if "COVERAGE_PROCESS_CONFIG" in os.environ else ""
        (self.site / "a1_shared.pth").write_text(f"{links}\n{measure}")
        return self

    def write(self, name: str, text: str | bytes) -> Path:
        """Write a module or a file into site-packages."""
        path = self.site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(text, bytes):
            path.write_bytes(text)
        else:
            path.write_text(text)
        return path

    def run(self, *arguments: str, variable: str | None = None, **options: object) -> subprocess.CompletedProcess[str]:
        """Run its interpreter with ``HF_PACKFIX`` set to ``variable``, or unset."""
        extra = options.pop("env", {})
        env = {k: v for k, v in os.environ.items() if k not in ("HF_PACKFIX", "PYTHONPATH", "RANK", "LOCAL_RANK")}
        env |= {} if variable is None else {"HF_PACKFIX": variable}
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            [str(self.python), *arguments],
            **{"capture_output": True, "text": True, "timeout": 300, "env": env | extra, "cwd": self.site.parent}
            | options,
        )
