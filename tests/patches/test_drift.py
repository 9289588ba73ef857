"""What each patch relies on upstream: when one of these fails, transformers or accelerate has changed there."""

from __future__ import annotations

import inspect
import zipfile
from importlib import import_module

import pytest
from packaging.version import Version

import hf_packfix
from hf_packfix.activation import versions
from hf_packfix.engine.targets import resolve
from hf_packfix.patches import FAST_RNN, PATCHES
from tests.support.oracle import stock
from tests.tools import drift

pytestmark = pytest.mark.conformance


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.path)
def test_upstream_is_what_the_patch_was_written_for(patch):
    package = patch.module.split(".")[0]
    expected, where = drift.state_here(patch), f"{package} {versions.found(package)}"
    with stock():
        original = resolve(patch.module, patch.path)[1]
        if expected == "not-applicable":
            assert original is None, f"{where} has {patch.target}: change `since` of its patch"
            return
        assert original is not None, f"{where} has no {patch.target} any more: what does the Trainer call instead?"
        found = tuple(inspect.signature(original).parameters)
        assert found[: len(patch.parameters)] == patch.parameters, (
            f"{patch.target} of {where} takes {found}; the patch was written for {patch.parameters}"
        )
        if patch.upstream_supports is not None:
            handles = patch.supported_by(original)
            assert handles == (expected == "not-needed"), (
                f"{patch.target} of {where} {'now does' if handles else 'does not do'} what is right for a "
                f"PackedSequence: change `until` of its patch, or the probe"
            )


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.path)
def test_what_a_caller_leaves_out_means_what_it_means_upstream(patch):
    wrapper = resolve(patch.module, patch.path)[1]
    if drift.state_here(patch) != "applied":
        return  # no wrapper of ours there, as the next test makes sure
    theirs = inspect.signature(wrapper.__wrapped__).parameters
    for name, parameter in inspect.signature(wrapper, follow_wrapped=False).parameters.items():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            assert parameter.default == theirs[name].default, f"{name} of {patch.target}"


def test_every_state_is_the_expected_one():
    for patch in PATCHES:
        import_module(patch.module)
    hf_packfix.enable()
    found = {status.target: status.state for status in hf_packfix.status().patches}
    expected = {patch.target: drift.state_here(patch) for patch in PATCHES}
    assert found == expected | {patch.target: "off" for patch in FAST_RNN}, str(hf_packfix.status())


# --- tests/tools/drift.py itself ------------------------------------------------------------------------------


def wheel_with(directory, change=lambda source: source):
    """Return a wheel that has this transformers' sources of what is patched."""
    names = [name for patch in PATCHES for name in (patch.target, *patch.uses) if ":" in name]
    modules = {name.partition(":")[0] for name in names if name.startswith("transformers.")}
    with zipfile.ZipFile(directory / "some.whl", "w") as archive:
        for module in modules:
            archive.writestr(f"{module.replace('.', '/')}.py", change(inspect.getsource(import_module(module))))
    return directory / "some.whl"


def problems(wheel) -> dict[str, str]:
    version = Version(versions.found("transformers"))
    return {f.path: f.problem for f in drift.check(wheel, "transformers", version) if f.problem}


def test_the_sources_of_this_version_are_as_expected(tmp_path):
    assert problems(wheel_with(tmp_path)) == {}


@pytest.mark.parametrize(
    ("before", "after", "path", "message"),
    [
        ("def _prepare_input(self, data", "def _prepare_input(self, batch", "Trainer._prepare_input", "(self, batch)"),
        ("def nested_detach(", "def nested_detached(", "nested_detach", "no such function any more"),
        ("class LabelSmoother:", "class Smoother:", "LabelSmoother.__call__", "no such function any more"),
    ],
)
def test_a_change_of_the_sources_is_named(tmp_path, before, after, path, message):
    found = problems(wheel_with(tmp_path, lambda source: source.replace(before, after)))
    assert list(found) == [path]
    assert message in found[path]


def test_a_function_that_comes_early_is_named(monkeypatch, tmp_path):
    patch = next(patch for patch in PATCHES if patch.path == "nested_detach")
    monkeypatch.setattr(patch, "since", "99")
    assert "came with 99" in problems(wheel_with(tmp_path))["nested_detach"]
