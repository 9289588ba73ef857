"""Check what the patches rely on in any release of transformers or accelerate, from the sources of its wheel.

    python tests/drift.py transformers==5.23.0 [accelerate==1.15.0 ...] [--cache DIR] [--markdown FILE]

Nothing of the release is imported. For each patch: is the target there, and do its parameters start with the
expected ones? Exits with 1 where one differs from what ``PLACES`` says.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.version import Version

# Run as a script, the repository is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from hf_packfix.patches import Patch

#: The targets that not every supported release has, and the first with it.
PLACES = {
    "Trainer._get_num_items_in_batch": "4.57",
    "Trainer._track_num_input_tokens": "5.3",
}

#: The targets that need no patch any more, and the first release in which they do what is right.
HANDLED = {
    "BatchEncoding.to": "4.54",
    "Trainer.get_batch_samples": "5.3",
}


@dataclass(frozen=True)
class Finding:
    """What a release has in the place of one patch.

    Attributes:
        path: the target's path inside its module.
        parameters: those of the function; None where there is none.
        problem: how that differs from what is expected; empty where it does not.
    """

    path: str
    parameters: tuple[str, ...] | None
    problem: str


def expected_state(path: str, version: Version) -> str:
    """Return the state that a patch has on a release, once everything is imported."""
    if path in PLACES and version < Version(PLACES[path]):
        return "not-applicable"
    return "not-needed" if path in HANDLED and version >= Version(HANDLED[path]) else "applied"


def state_here(patch: Patch) -> str:
    """Return the state that a patch should have on the version installed here."""
    from hf_packfix import versions

    return expected_state(patch.path, Version(versions.found(patch.module.split(".")[0]) or "0"))


def check(wheel: Path, distribution: str, version: Version) -> list[Finding]:
    """Return a finding for each patch of a distribution."""
    from hf_packfix.patches import PATCHES

    findings = []
    with zipfile.ZipFile(wheel) as archive:
        for patch in PATCHES:
            if patch.module.split(".")[0] == distribution:
                found = parameters(archive, patch.module, patch.path)
                findings.append(Finding(patch.path, found, problem(patch.path, patch.parameters, found, version)))
    return findings


def problem(path: str, wanted: tuple[str, ...], found: tuple[str, ...] | None, version: Version) -> str:
    """Return what is unexpected about a target's parameters; empty where nothing is."""
    due = expected_state(path, version) != "not-applicable"
    if found is None:
        return "no such function any more" if due else ""
    if not due:
        return f"there, although PLACES says that it came with {PLACES[path]}"
    if found[: len(wanted)] != wanted:
        return f"expected the parameters ({', '.join(wanted)}), found ({', '.join(found)})"
    return ""


def parameters(archive: zipfile.ZipFile, module: str, path: str) -> tuple[str, ...] | None:
    """Return the parameters of the function at ``path`` in a module's source; None where there is none."""
    file = module.replace(".", "/")
    names = [name for name in (f"{file}.py", f"{file}/__init__.py") if name in archive.namelist()]
    if not names:
        return None
    node: ast.AST = ast.parse(archive.read(names[0]))
    for name in path.split("."):
        inner = [found for found in _definitions(node) if found.name == name]
        if not inner:
            return None
        node = inner[-1]  # the last definition is the one that counts
    if not isinstance(node, ast.FunctionDef):
        return None
    of = node.args
    star = [argument for argument in (of.vararg, of.kwarg) if argument is not None]
    return tuple(argument.arg for argument in [*of.posonlyargs, *of.args, *of.kwonlyargs, *star])


def _definitions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Yield the functions and classes defined in a body, under an ``if`` or ``try`` as well."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield child
        elif isinstance(child, (ast.If, ast.Try)):
            yield from _definitions(child)


def download(requirement: str, folder: Path) -> Path:
    """Return the wheel of ``name==version``, downloaded into ``folder`` unless it is there."""
    distribution, _, version = requirement.partition("==")
    pattern = f"{distribution}-{version}-*.whl"
    if not any(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", str(folder), requirement], check=True)
    return next(folder.glob(pattern))


def row(requirement: str, findings: list[Finding]) -> str:
    """Return a line of the table."""
    distribution, _, version = requirement.partition("==")
    absent = ", ".join(f"`{f.path}`" for f in findings if f.parameters is None and not f.problem)
    problems = "; ".join(f"`{f.path}`: {f.problem}" for f in findings if f.problem)
    present = sum(f.parameters is not None and not f.problem for f in findings)
    return f"| {distribution} {version} | {present} of {len(findings)} | {absent or '-'} | {problems or '-'} |"


HEADER = "| release | as expected | has no such place | unexpected |\n|---|---|---|---|"


def main() -> int:
    """Print the table; return 1 where something is unexpected."""
    parser = argparse.ArgumentParser(description="check what the patches rely on, from the sources of a release")
    parser.add_argument("requirements", nargs="+", metavar="NAME==VERSION")
    parser.add_argument("--cache", type=Path, help="keep the wheels here; a temporary folder by default")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, too")
    options = parser.parse_args()
    wrong = [requirement for requirement in options.requirements if not all(requirement.partition("=="))]
    if wrong:
        parser.error(f"expected NAME==VERSION, found {wrong[0]!r}")
    lines, failed = [HEADER], False
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for requirement in options.requirements:
            distribution, _, version = requirement.partition("==")
            findings = check(download(requirement, folder), distribution, Version(version))
            if not findings:
                parser.error(f"no patch has a target in {distribution}; expected transformers or accelerate")
            failed |= any(finding.problem for finding in findings)
            lines.append(row(requirement, findings))
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text(_PREFACE + "\n".join(lines) + "\n", encoding="utf-8")
    return int(failed)


_PREFACE = """# What each minor release has in the places that are patched

Written by `tests/drift.py` from the sources of the wheels, the last patch release of each minor release. "As
expected" means that the target is there and its parameters start with the ones that the patch was written for.

"""

if __name__ == "__main__":
    sys.exit(main())
