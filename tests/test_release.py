"""What a release is checked against: the tag, the version and the changelog."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import hf_packfix

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / "hf_packfix/docs/changelog.md").read_text(encoding="utf-8")


def test_the_changelog_begins_with_the_version():
    newest = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)[0]
    assert re.fullmatch(rf"{re.escape(hf_packfix.__version__)} \((unreleased|\d{{4}}-\d\d-\d\d)\)", newest)


@pytest.mark.parametrize(
    ("tag", "heading", "message"),
    [
        ("v0.1.0", "0.1.0 (2026-01-31)", "v0.1.0: version and changelog agree"),
        ("v0.2.0", "0.1.0 (2026-01-31)", "the tag is v0.2.0, but hf_packfix/_version.py says 0.1.0"),
        ("v0.1.0", "0.1.0 (unreleased)", 'changelog.md begins with "## 0.1.0 (unreleased)"; expected "## 0.1.0 (YYYY'),
        ("v0.1.0", "0.1.1 (2026-01-31)", 'changelog.md begins with "## 0.1.1 (2026-01-31)"; expected "## 0.1.0 (YYYY'),
    ],
)
def test_a_tag_that_does_not_belong_to_the_version_is_no_release(tmp_path, tag, heading, message):
    (tmp_path / ".ci").mkdir()
    (tmp_path / "hf_packfix/docs").mkdir(parents=True)
    shutil.copy(ROOT / ".ci/check_release", tmp_path / ".ci")
    version = (ROOT / "hf_packfix/_version.py").read_text(encoding="utf-8")
    (tmp_path / "hf_packfix/_version.py").write_text(version.replace(hf_packfix.__version__, "0.1.0"))
    (tmp_path / "hf_packfix/docs/changelog.md").write_text(f"# Changelog\n\n## {heading}\n\n## 0.0.9 (2025-01-31)\n")
    done = subprocess.run([tmp_path / ".ci/check_release", tag], capture_output=True, text=True, check=False)
    assert message in done.stdout
    assert done.returncode == (0 if "agree" in message else 1)
