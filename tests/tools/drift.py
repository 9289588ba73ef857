"""Check what this package relies on in any release of transformers, accelerate or torch.

    python -m tests.tools.drift [transformers==5.23.0 ...] [--models] [--markdown FILE]

By default: the last patch release of every minor release that is supported, as the package index lists them.

- The patches, from the sources of the wheel, without an import of the release: is each target there, do its
  parameters start with the expected ones, and are the names there that the patch uses?
- With ``--models``: the models (``hf_packfix/models/selftest.py``), on each release of transformers, installed.

Exits with 1 if a patch or a model finds something else than it declares or expects.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
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

if TYPE_CHECKING:
    from hf_packfix.engine.patch import Patch


@dataclass(frozen=True)
class Finding:
    """What a release has in the place of one patch.

    Attributes:
        path: the target's path inside its module.
        parameters: those of the function; None where there is none.
        names: every name that the patch uses, and whether the release has it.
        problem: how that differs from what is expected; empty where it does not.
    """

    path: str
    parameters: tuple[str, ...] | None
    names: dict[str, bool]
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
    from hf_packfix.patches import FAST_RNN, FIRST_USE, PATCHES
    from hf_packfix.rnn.coverage import LEANS_ON

    findings = []
    with zipfile.ZipFile(wheel) as archive:
        for patch in PATCHES + FIRST_USE + FAST_RNN:
            if patch.module.split(".")[0] == distribution:
                node = definition(archive, patch.module, patch.path)
                found = parameters(node) if isinstance(node, ast.FunctionDef) else None
                names = {name: has(archive, patch.module, name) for name in patch.uses}
                unexpected = problem(patch, found, names, version)
                if patch in FAST_RNN:  # without one of these it leaves everything to torch
                    names |= {name: mentions(archive, *name.split(":")) for name in LEANS_ON}
                findings.append(Finding(patch.path, found, names, unexpected))
    return findings


def problem(patch: Patch, found: tuple[str, ...] | None, names: dict[str, bool], version: Version) -> str:
    """Return what is unexpected about a target's parameters or the names that its patch uses; empty if nothing is."""
    wanted, state = patch.parameters, expected_state(patch, version)
    if found is None:
        return "no such function any more" if state != "not-applicable" else ""
    if state == "not-applicable":
        return f"there, although its patch says that it came with {patch.since}"
    if found[: len(wanted)] != wanted:
        return f"expected the parameters ({', '.join(wanted)}), found ({', '.join(found)})"
    missing = [name for name, there in names.items() if not there]
    return f"no {' and no '.join(missing)}" if missing and state == "applied" else ""


def definition(archive: zipfile.ZipFile, module: str, path: str) -> ast.AST | None:
    """Return what is defined at ``path`` in a module's source; None if nothing is."""
    node: ast.AST | None = _parsed(archive, module)
    if node is None:
        return None
    for name in path.split("."):
        inner = list(_definitions(node, name))
        if not inner:
            return None
        node = inner[-1]  # the last definition is the one that counts
    return node


def parameters(function: ast.FunctionDef) -> tuple[str, ...]:
    """Return the names of a function's parameters."""
    of = function.args
    star = [argument for argument in (of.vararg, of.kwarg) if argument is not None]
    return tuple(argument.arg for argument in [*of.posonlyargs, *of.args, *of.kwonlyargs, *star])


def has(archive: zipfile.ZipFile, module: str, name: str) -> bool:
    """Return whether a release has a name that a patch uses, as ``engine/targets.py`` finds it in what is loaded."""
    where, _, path = name.rpartition(":")
    outer, _, last = path.rpartition(".")
    if not outer:
        return definition(archive, where or module, last) is not None
    owner = definition(archive, where or module, outer)
    return owner is not None and _has_word(owner, last)


def mentions(archive: zipfile.ZipFile, module: str, name: str) -> bool:
    """Return whether a module's source has a word; that of an extension is what its stub declares."""
    source = _parsed(archive, module)
    return source is not None and _has_word(source, name)


def _has_word(node: ast.AST, word: str) -> bool:
    return any(word in (getattr(part, key, None) for key in ("attr", "id", "name")) for part in ast.walk(node))


@functools.lru_cache(100)  # about as many as one release has
def _parsed(archive: zipfile.ZipFile, module: str) -> ast.Module | None:
    """Return the source of a module, of an extension its stub; None if there is neither."""
    file = module.replace(".", "/")
    for end in (".py", "/__init__.py", ".pyi", "/__init__.pyi"):
        if file + end in archive.NameToInfo:
            return ast.parse(archive.read(file + end))
    return None


def _definitions(node: ast.AST, name: str) -> Iterator[ast.AST]:
    """Yield the functions and classes of this name in a body, under an ``if`` or ``try`` as well; past an alias."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and child.name == name:
            yield child
        elif isinstance(child, (ast.If, ast.Try)):
            yield from _definitions(child, name)
        elif (
            isinstance(child, ast.Assign)
            and isinstance(child.value, ast.Name)
            and any(isinstance(target, ast.Name) and target.id == name for target in child.targets)
        ):
            yield from _definitions(node, child.value.id)


def download(requirement: str, folder: Path) -> Path:
    """Return the wheel of ``name==version``, downloaded into an empty folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    environment = os.environ | {"PIP_CONFIG_FILE": os.devnull}
    subprocess.run([*command, "--dest", str(folder), requirement], check=True, env=environment)
    (wheel,) = folder.iterdir()
    return wheel


def check_models(requirement: str) -> dict[str, str]:
    """Install a release of transformers; return for every check of the models what went wrong, empty if nothing."""
    from tests.tools import matrix

    python = matrix.interpreter()
    needs = [requirement, "wrapt", "importlib-metadata", "packaging", "psutil"]
    folder = matrix.fill(requirement.replace("transformers==", "drift-"), needs, ["accelerate==1.15.0"])
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

    # Past a constraint in pip's configuration: users have none.
    environment = os.environ | {"PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, "-m", "pip", "index", "versions", distribution, "--disable-pip-version-check"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    found = re.search(r"Available versions: (.+)", printed)
    if found is None:
        raise ValueError(f"expected a line 'Available versions: ...' from pip, found {printed!r}")
    last: dict[tuple[int, ...], Version] = {}
    for version in sorted(map(Version, found[1].split(", "))):
        if version >= Version(MINIMUM.get(distribution, "2.0")):
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


def name_rows(found: dict[str, list[Finding]]) -> Iterator[str]:
    """Yield a line for each name that patches use: the releases that have it."""
    for distribution in DISTRIBUTIONS:
        releases = {name: of for name, of in found.items() if name.startswith(f"{distribution}==")}
        names = {name: finding.path for of in releases.values() for finding in of for name in finding.names}
        for name in sorted(names):
            having = [
                release.partition("==")[2]
                for release, of in releases.items()
                if any(finding.names.get(name) for finding in of)
            ]
            if len(having) == len(releases):
                text = f"all {len(having)}"
            else:
                text = f"{having[0]} to {having[-1]}, {len(having)} of {len(releases)}" if having else "none"
            yield f"| {distribution} | `{name}` | {text} |"


DISTRIBUTIONS = ("transformers", "accelerate", "torch")
PATCHES_HEADER = "| release | as expected | has no such place | unexpected |\n|---|---|---|---|"
NAMES_HEADER = "| package | a patch uses | releases that have it |\n|---|---|---|"
MODELS_HEADER = "| release | right | wrong |\n|---|---|---|"


def main() -> int:
    """Print the tables; return 1 if something is unexpected."""
    parser = argparse.ArgumentParser(description="check what the patches and the models rely on in a release")
    parser.add_argument("requirements", nargs="*", metavar="NAME==VERSION", help="every minor release by default")
    parser.add_argument("--models", action="store_true", help="install each transformers and try the models on it")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, too")
    options = parser.parse_args()
    wrong = [requirement for requirement in options.requirements if not all(requirement.partition("=="))]
    if wrong:
        parser.error(f"expected NAME==VERSION, found {wrong[0]!r}")
    requirements = options.requirements or [name for of in DISTRIBUTIONS for name in every_minor_release(of)]
    patches, models, found = [PATCHES_HEADER], [MODELS_HEADER], {}
    with tempfile.TemporaryDirectory() as folder:
        for requirement in requirements:
            distribution, _, version = requirement.partition("==")
            wheel = download(requirement, Path(folder))
            findings = found[requirement] = check(wheel, distribution, Version(version))
            wheel.unlink()  # those of torch are large
            if not findings:
                parser.error(f"no patch has a target in {distribution}; expected one of {', '.join(DISTRIBUTIONS)}")
            patches.append(patch_row(requirement, findings))
            print(patches[-1], flush=True)
            if distribution == "transformers" and options.models:
                results = check_models(requirement)
                models.append(model_row(requirement, results))
                print(models[-1], flush=True)
    names = [NAMES_HEADER, *name_rows(found)]
    print("\n".join(names))
    if options.markdown:
        tables = [*patches, "", _NAMES, *names, *(["", _MODELS, *models] if len(models) > 1 else [])]
        options.markdown.write_text(_PREFACE + "\n".join(tables) + "\n", encoding="utf-8")
    unexpected = any(finding.problem for of in found.values() for finding in of)
    return int(unexpected or any(not line.endswith("| - |") for line in models[1:]))


_PREFACE = """# What each minor release has in the places that are patched

Written by `python -m tests.tools.drift --markdown tests/tools/DRIFT.md`: the last patch release of each minor release.
"As expected" means that the target of a patch is there, its parameters start with the ones that the patch was written
for, and the names are there that the patch uses, by the sources of the wheel.

"""

_NAMES = """The names that patches use besides their targets. A patch that lacks one is refused; without one of
`hf_packfix/rnn/coverage.py` (`LEANS_ON`), the fast layers are torch's own.
"""

_MODELS = """The recurrent models on each release, with accelerate 1.15.0: each check for the cells rnn, lstm and gru.
"""

if __name__ == "__main__":
    sys.exit(main())
