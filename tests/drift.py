"""Check what this package relies on in any release of transformers or accelerate.

    python tests/drift.py [transformers==5.23.0 accelerate==1.15.0 ...] [--sources] [--cache DIR] [--markdown FILE]

By default: the last patch release of every minor release that is supported, as the package index lists them.

- The patches, from the sources of the wheel, without an import of the release: is each target there, and do its
  parameters start with the expected ones?
- The models (``hf_packfix/models/selftest.py``), on the installed release of transformers; ``--sources`` leaves
  them out.

Exits with 1 if a patch or a model finds something else than it declares or expects.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
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


def expected_state(patch: Patch, version: Version) -> str:
    """Return the state that a patch has on a release, once everything is imported."""
    if patch.since is not None and version < Version(patch.since):
        return "not-applicable"
    return "not-needed" if patch.until is not None and version >= Version(patch.until) else "applied"


def state_here(patch: Patch) -> str:
    """Return the state that a patch should have on the version installed here."""
    from hf_packfix.activation import versions

    return expected_state(patch, Version(versions.found(patch.module.split(".")[0]) or "0"))


def check(wheel: Path, distribution: str, version: Version) -> list[Finding]:
    """Return a finding for each patch of a distribution."""
    from hf_packfix.patches import PATCHES

    findings = []
    with zipfile.ZipFile(wheel) as archive:
        for patch in PATCHES:
            if patch.module.split(".")[0] == distribution:
                found = parameters(archive, patch.module, patch.path)
                findings.append(Finding(patch.path, found, problem(patch, found, version)))
    return findings


def problem(patch: Patch, found: tuple[str, ...] | None, version: Version) -> str:
    """Return what is unexpected about a target's parameters; empty where nothing is."""
    wanted, due = patch.parameters, expected_state(patch, version) != "not-applicable"
    if found is None:
        return "no such function any more" if due else ""
    if not due:
        return f"there, although its patch says that it came with {patch.since}"
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


def check_models(requirement: str, cache: Path) -> dict[str, str]:
    """Install a release of transformers; return what went wrong in each check of the models, empty if nothing."""
    from tests import matrix

    python = matrix.interpreter(cache)
    needs = [requirement, "wrapt", "importlib-metadata", "packaging", "psutil"]
    folder = matrix.fill(cache, requirement.replace("transformers==", "drift-"), needs, ["accelerate==1.15.0"])
    environment = matrix.environment(folder) | {"HF_HUB_OFFLINE": "1"}
    command = [str(python), "-m", "hf_packfix.models.selftest"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    try:
        results: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"import": (done.stderr.splitlines() or ["nothing was printed"])[-1]}
    return results


def every_minor_release(distribution: str) -> list[str]:
    """Return ``name==version`` of the last patch release of each supported minor release, oldest first."""
    from hf_packfix.activation.versions import MINIMUM

    command = [sys.executable, "-m", "pip", "index", "versions", distribution, "--disable-pip-version-check"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Available versions: (.+)", printed)
    if found is None:
        raise ValueError(f"expected a line 'Available versions: ...' from pip, found {printed!r}")
    last: dict[tuple[int, ...], Version] = {}
    for version in sorted(map(Version, found[1].split(", "))):
        if version >= Version(MINIMUM[distribution]):
            last[version.release[:2]] = version
    return [f"{distribution}=={version}" for version in last.values()]


def patch_row(requirement: str, findings: list[Finding]) -> str:
    """Return a line of the table of patches."""
    distribution, _, version = requirement.partition("==")
    absent = ", ".join(f"`{f.path}`" for f in findings if f.parameters is None and not f.problem)
    problems = "; ".join(f"`{f.path}`: {f.problem}" for f in findings if f.problem)
    present = sum(f.parameters is not None and not f.problem for f in findings)
    return f"| {distribution} {version} | {present} of {len(findings)} | {absent or '-'} | {problems or '-'} |"


def model_row(requirement: str, results: dict[str, str]) -> str:
    """Return a line of the table of models."""
    failed = "; ".join(f"{name}: {failure}" for name, failure in results.items() if failure)
    passed = ", ".join(name for name, failure in results.items() if not failure)
    return f"| {requirement.replace('==', ' ')} | {passed or '-'} | {failed or '-'} |"


PATCHES_HEADER = "| release | as expected | has no such place | unexpected |\n|---|---|---|---|"
MODELS_HEADER = "| release | right | wrong |\n|---|---|---|"


def main() -> int:
    """Print the tables; return 1 if something is unexpected."""
    parser = argparse.ArgumentParser(description="check what the patches and the models rely on in a release")
    parser.add_argument("requirements", nargs="*", metavar="NAME==VERSION", help="every minor release by default")
    parser.add_argument("--sources", action="store_true", help="check the patches alone; nothing is installed")
    parser.add_argument("--cache", type=Path, help="keep the wheels here; a temporary folder by default")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, too")
    options = parser.parse_args()
    wrong = [requirement for requirement in options.requirements if not all(requirement.partition("=="))]
    if wrong:
        parser.error(f"expected NAME==VERSION, found {wrong[0]!r}")
    from tests import matrix

    requirements = options.requirements or [
        *every_minor_release("transformers"),
        *every_minor_release("accelerate"),
    ]
    patches, models, failed = [PATCHES_HEADER], [MODELS_HEADER], False
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for requirement in requirements:
            distribution, _, version = requirement.partition("==")
            findings = check(download(requirement, folder), distribution, Version(version))
            if not findings:
                parser.error(f"no patch has a target in {distribution}; expected transformers or accelerate")
            failed |= any(finding.problem for finding in findings)
            patches.append(patch_row(requirement, findings))
            print(patches[-1], flush=True)
            if distribution == "transformers" and not options.sources:
                results = check_models(requirement, options.cache or matrix.CACHE)
                failed |= any(results.values())
                models.append(model_row(requirement, results))
                print(models[-1], flush=True)
    if options.markdown:
        tables = "\n".join([*patches, "", _MODELS, *models] if len(models) > 1 else patches)
        options.markdown.write_text(f"{_PREFACE}{tables}\n", encoding="utf-8")
    return int(failed)


_PREFACE = """# What each minor release has in the places that are patched, and what the models do on it

Written by `python tests/drift.py`: the last patch release of each minor release. "As expected" means that the target
of a patch is there and its parameters start with the ones that the patch was written for, by the sources of the wheel.

"""

_MODELS = """The recurrent models on each release, with accelerate 1.15.0: each check for the cells rnn, lstm and gru.

"""

if __name__ == "__main__":
    sys.exit(main())
