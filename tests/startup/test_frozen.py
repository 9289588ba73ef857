"""A program that PyInstaller made, with stand-ins for transformers and accelerate."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hf_packfix.activation.versions import NEWEST_TESTED
from tests.support.installed import Environment

PyInstaller = pytest.importorskip("PyInstaller", reason="needs PyInstaller: pip install pyinstaller")

#: What the program does without, so that it is made in seconds.
WITHOUT = ("torch", "numpy")
PROGRAM = """
import hf_packfix
import importlib_metadata, transformers, accelerate
assert hf_packfix.is_enabled()
print(hf_packfix.status())
print("metadata:", sorted(item.name for item in importlib_metadata.distributions() if item.name in
                          ("hf-packfix", "transformers", "accelerate")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("hook", [True, False])
def test_a_frozen_program_knows_its_versions(tmp_path, hook):
    environment = Environment(tmp_path / "venv").share_packages().unpack()
    environment.write("zz_pyinstaller.pth", f"{Path(PyInstaller.__file__).parents[1]}\n")
    for name, version in NEWEST_TESTED.items():
        environment.write(f"{name}/__init__.py", f'__version__ = "{version}"\n')
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        environment.write(f"{name}-{version}.dist-info/METADATA", metadata)
    if not hook:
        (points,) = environment.site.glob("hf_packfix-*.dist-info/entry_points.txt")
        points.write_text(points.read_text().replace("pyinstaller40", "of_something_else"))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    exclude = [word for name in WITHOUT for word in ("--exclude-module", name)]
    made = environment.run("-m", "PyInstaller", *exclude, str(program), cwd=tmp_path, timeout=500)
    assert made.returncode == 0, made.stderr
    done = subprocess.run([tmp_path / "dist/program/program"], capture_output=True, text=True, check=False)
    if not hook:
        assert "hf_packfix needs accelerate >= 0.28, but accelerate is not installed" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert f"transformers {NEWEST_TESTED['transformers']}, accelerate {NEWEST_TESTED['accelerate']}" in done.stdout
    assert "pending        transformers.trainer:Trainer._prepare_input\n" in done.stdout
    assert "'hf-packfix', 'transformers']" in done.stdout
