"""The wheel and the sdist: what they hold."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

from tests.support.installed import ROOT, build, wheel


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}


def test_a_wheel_built_from_the_sdist_has_the_same_files(tmp_path):
    sdist = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    again = build("wheel", source, tmp_path / "again")
    assert again.name == wheel().name
    assert contents(again) == contents(wheel())


def test_the_wheel_holds_the_package_and_nothing_else():
    found = set(contents(wheel()))
    package = {
        # Start-up files stand at the top of the wheel.
        path.relative_to(ROOT).as_posix().removeprefix("hf_packfix/startup/")
        for path in (ROOT / "hf_packfix").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package <= found
    assert {"hf_packfix/py.typed", "hf_packfix/docs/performance.md", "hf_packfix/docs/examples/tagging.py"} <= found
    rest = {name for name in found - package if ".dist-info/" not in name}
    assert rest == set()
    assert any(name.endswith("licenses/LICENSE") for name in found)
