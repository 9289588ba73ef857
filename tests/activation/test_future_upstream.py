"""The day upstream changes: what is reported, what still works, and that no number is silently wrong."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest

from tests.support.future import Edit, release
from tests.support.interpreters import environment, python
from tests.tools import tomorrow

pytestmark = pytest.mark.slow  # starts many processes

TRAINER, PT_UTILS = "transformers.trainer:Trainer", "transformers.trainer_pt_utils"


@dataclass(frozen=True)
class Future:
    """A release of the future, and what is expected of it.

    Attributes:
        package: that changes.
        edits: of its sources.
        warnings: words of each warning, in order; empty if there must be none.
        states: of the patches that are not as they are today, by target.
        problems: words of each problem that doctor reports; empty if it must report a healthy installation.
        raises: the uses of the packed program that raise; the others report what they report today.
    """

    package: str
    edits: tuple[Edit, ...]
    warnings: tuple[str, ...] = ()
    states: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    raises: tuple[str, ...] = ()


FUTURES = {
    "nothing that matters": Future("transformers", ()),
    "a parameter added to _prepare_input": Future(
        "transformers",
        (
            Edit(
                "trainer.py", r"def _prepare_input\(self, data: [^)]*", "def _prepare_input(self, data, blocking=True"
            ),
        ),
        warnings=(
            "_prepare_input, which has parameters that it does not know: expected (self, data), found (blocking)",
        ),
    ),
    "a parameter renamed in _prepare_input": Future(
        "transformers",
        (
            Edit("trainer.py", r"def _prepare_input\(self, data: ", "def _prepare_input(self, batch: "),
            Edit("trainer.py", r"(def _prepare_input\(.*\n(?:.*\n){3})", r"\1        data = batch\n"),
        ),
        warnings=(
            f"does not patch {TRAINER}._prepare_input: expected the parameters (self, data), found (self, batch)",
        ),
        states={f"{TRAINER}._prepare_input": "refused"},
        problems=("_prepare_input", "the self-test failed: AssertionError"),
        raises=("accumulate", "smooth_labels", "dispatch", "evaluate", "predict", "models"),
    ),
    "nested_detach gone": Future(
        "transformers",
        (
            Edit("trainer.py", r"\bnested_detach\b", "detach_all"),
            Edit("trainer_pt_utils.py", r"\bnested_detach\b", "detach_all"),
        ),
        warnings=(f"does not patch {PT_UTILS}:nested_detach: {PT_UTILS} has no nested_detach here",),
        states={f"{PT_UTILS}:nested_detach": "not-applicable"},
        problems=("nested_detach", "the self-test failed"),
        raises=("evaluate", "predict"),
    ),
    "broadcast moved in accelerate": Future(
        "accelerate",
        (
            Edit("utils/operations.py", r"\bdef broadcast\(", "def broadcast_all("),
            Edit("utils/__init__.py", r"(?m)^    broadcast,$", "    broadcast_all as broadcast,"),
        ),
        warnings=("does not patch accelerate.utils.operations:broadcast: ",),
        states={"accelerate.utils.operations:broadcast": "not-applicable"},
        problems=("broadcast",),
    ),
    "upstream fixed it": Future(
        "transformers",
        (
            Edit(
                "trainer.py",
                r"( +)elif isinstance\(data, \(tuple, list\)\):\n( +)return type\(data\)\(self._prepare_input",
                r"\1elif isinstance(data, torch.nn.utils.rnn.PackedSequence):\n\2return data.to(self.args.device)\n"
                r"\1elif isinstance(data, (tuple, list)):\n\2return type(data)(self._prepare_input",
            ),
        ),
        states={f"{TRAINER}._prepare_input": "not-needed"},
    ),
}


def run(directory, future, *arguments, **variables):
    folder = release(directory / "future", future.package, future.edits)
    path = os.pathsep.join([str(folder), environment()["PYTHONPATH"]])
    return python(*arguments, env={"PYTHONPATH": path, **variables}, cwd=directory)


@pytest.mark.parametrize("name", FUTURES)
def test_a_release_of_the_future_is_reported_and_gives_no_wrong_number(tmp_path, name):
    future = FUTURES[name]
    folder = release(tmp_path / "future", future.package, future.edits)
    found = tomorrow.run(folder, "padded", "packed", "doctor", plugin=True)
    assert len(found["warnings"]) == len(future.warnings), found["warnings"]
    assert all(words in line for words, line in zip(future.warnings, found["warnings"], strict=True))
    today = {target: state for target, state in found["states"].items() if target not in future.states}
    assert future.states.items() <= found["states"].items()
    assert set(today.values()) <= {"applied", "not-needed", "off"}  # off: the layers that one asks for
    assert found["healthy"] == (not future.problems), found["problems"]
    for words in future.problems:
        assert any(words in problem for problem in found["problems"]), found["problems"]
    newer = f"newer than what hf_packfix was tested with, judged by probes: {future.package} 99.0.0"
    assert newer in found["logged"]
    for use, value in found["packed"].items():
        expected = tomorrow.baseline()["packed" if use == "models" else "padded"][use]
        verdict = tomorrow.judge(value, expected, ())
        assert verdict.partition(":")[0] == ("raises" if use in future.raises else "right"), f"{use}: {verdict}"


@pytest.mark.parametrize("name", ["nothing that matters", "a parameter added to _prepare_input", "nested_detach gone"])
@pytest.mark.parametrize("automatic", [True, False])
def test_warnings_as_errors_never_break_a_program(tmp_path, name, automatic):
    code = "import transformers.trainer_seq2seq, sys; print('ran', 'hf_packfix' in sys.modules)"
    code = code if automatic else f"import hf_packfix; {code}"
    variables = {"HF_PACKFIX": "1"} if automatic else {}
    if automatic:  # what the start-up files do
        code = f"import _hf_packfix_boot; _hf_packfix_boot.start(); {code}"
    done = run(tmp_path, FUTURES[name], "-W", "error", "-c", code, **variables)
    assert (done.returncode, done.stdout) == (0, "ran True\n"), done.stderr
    assert ("hf_packfix" in done.stderr) == bool(FUTURES[name].warnings), done.stderr


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("import transformers.trainer, importlib\nimportlib.import_module('hf_packfix')", 2),
        ("import torch, hf_packfix\nfrom transformers import Trainer", 2),
        ("import hf_packfix, transformers.trainer\nhf_packfix.disable()\nhf_packfix.enable()", 1),
    ],
)
def test_a_warning_points_at_the_line_of_the_user(tmp_path, program, line):
    path = tmp_path / "program.py"
    path.write_text(program)
    done = run(tmp_path, FUTURES["a parameter added to _prepare_input"], path)
    (warning,) = [text for text in done.stderr.splitlines() if "HFPackfixWarning" in text]
    assert warning.startswith(f"{path}:{line}: HFPackfixWarning: ")


# --- names that patches use, renamed upstream ---------------------------------------------------------------

#: Some of the names that patches use; `python -m tests.tools.tomorrow` renames all of them. What a packed program must
#: do then: the uses that are not right, and how they fail.
RENAMED = {
    # The evaluation joins its batches as stock does.
    "get_arrays": {},
    # Only our own models need it.
    "label_smoother": {"models": "raises: "},
    # Without the patch, the number of samples would be wrong silently.
    "find_batch_size": {"dispatch": "a packed batch would give wrong numbers here", "evaluate": "wrong numbers here"},
    # What the targets of patches are called: without the patch, these uses are right all the same.
    "evaluation_loop": {},
    # Of accelerate: no name of ours.
    "TensorInformation": {},
}


@pytest.mark.newest
@pytest.mark.parametrize("name", RENAMED)
def test_a_renamed_name_breaks_no_ordinary_program_and_no_packed_one_silently(name):
    found = tomorrow.outcome(name)
    assert found.ordinary == "same"
    assert found.is_harmless
    for use, error in RENAMED[name].items():
        assert error in found.packed[use]
    if not RENAMED[name]:
        assert set(found.packed.values()) == {"right"}
    else:
        assert any(name in warning for warning in found.warnings)
