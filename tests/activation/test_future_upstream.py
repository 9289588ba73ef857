"""The day upstream changes: what is reported, what still works, and that no number is silently wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from tests.support.future import Edit, release
from tests.support.interpreters import environment

pytestmark = pytest.mark.slow  # starts many processes

TRAINER, PT_UTILS = "transformers.trainer:Trainer", "transformers.trainer_pt_utils"

#: Trains, evaluates and generates, packed and padded, and prints what was reported and what came out.
PROGRAM = """
import json, logging, sys, tempfile, warnings

class Keep(logging.Handler):
    def emit(self, record):
        log.append([record.levelname, record.getMessage()])

log = []
logging.getLogger("hf_packfix").addHandler(Keep())
logging.getLogger("hf_packfix").setLevel("INFO")

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import hf_packfix
    from tests.support.oracle import Tagger, arguments, assert_same_run, new_trainer
from tests.support.oracle import packed_batch, padded_batch, rows, train

def training():
    data, folder = rows(7), tempfile.mkdtemp()
    kinds = {"gradient_accumulation_steps": 2}
    assert_same_run(*(train(folder, Tagger, data, collate, **kinds) for collate in (packed_batch, padded_batch)))

def evaluation():
    found = []
    for collate in (packed_batch, padded_batch):
        trainer = new_trainer(tempfile.mkdtemp(), Tagger, rows(7), collate)
        output = trainer.predict(trainer.eval_dataset)
        real = output.label_ids != -100
        found.append([float(output.metrics["test_loss"]), output.predictions[real].tolist(), real.tolist()])
    packed, padded = found
    assert packed[2] == padded[2], found
    import torch
    torch.testing.assert_close(packed[:2], padded[:2], rtol=1e-4, atol=1e-4)

def models():
    from hf_packfix.models.selftest import selftest
    assert not any(selftest().values()), selftest()

results = {}
with warnings.catch_warnings(record=True) as also:
    warnings.simplefilter("always")
    for use in (training, evaluation, models):
        try:
            use()
            results[use.__name__] = "right"
        except Exception as error:
            # The error of the stock Trainer is an AssertionError, as is that of a comparison here.
            differs = isinstance(error, AssertionError) and "a list or tuple of length 2" not in str(error)
            results[use.__name__] = f"{'WRONG' if differs else 'raises'}: {error}"

from hf_packfix.commands.doctor import examine
report = examine([])
print(json.dumps({
    "warnings": [str(w.message) for w in [*caught, *also] if w.category is hf_packfix.HFPackfixWarning],
    "log": log,
    "states": {patch.target: patch.state for patch in hf_packfix.status().patches},
    "problems": report.problems,
    "doctor_warnings": report.warnings,
    "healthy": report.healthy,
    **results,
}))
"""


@dataclass(frozen=True)
class Future:
    """A release of the future, and what is expected of it.

    Attributes:
        package: that changes.
        edits: of its sources.
        warnings: words of each warning, in order; empty if there must be none.
        states: of the patches that are not as they are today, by target.
        problems: words of each problem that doctor reports; empty if it must report a healthy installation.
        training, evaluation, models: how the result of each use begins.
    """

    package: str
    edits: tuple[Edit, ...]
    warnings: tuple[str, ...] = ()
    states: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    training: str = "right"
    evaluation: str = "right"
    models: str = "right"


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
        training="raises",
        evaluation="raises",
        models="raises",
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
        evaluation="raises",
    ),
    "evaluation_loop renamed": Future(
        "transformers",
        (Edit("trainer.py", r"\bevaluation_loop\b", "run_evaluation"),),
        warnings=("does not patch transformers.trainer:Trainer.evaluation_loop: ",),
        states={f"{TRAINER}.evaluation_loop": "not-applicable"},
        problems=("evaluation_loop",),
    ),
    "a field of ModelOutput renamed": Future(
        "transformers",
        tuple(
            Edit(file, r"(?<![\w.])cache\b(?!_)|(?<=outputs\.)cache\b|(?<=self\.)cache\b", "kv_cache")
            for file in ("modeling_outputs.py", "utils/generic.py", "generation/utils.py")
        ),
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


def run(directory, future, code, *options, **variables):
    folder = release(directory / "future", future.package, future.edits)
    env = environment() | variables
    env["PYTHONPATH"] = os.pathsep.join([str(folder), env["PYTHONPATH"]])
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=280, check=False, cwd=directory)


def assert_each_has(found, words):
    assert len(found) == len(words), found
    for line, expected in zip(found, words, strict=True):
        assert expected in line


@pytest.mark.slow
@pytest.mark.parametrize("name", FUTURES)
def test_a_release_of_the_future(tmp_path, name):
    future = FUTURES[name]
    done = run(tmp_path, future, PROGRAM)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert_each_has(found["warnings"], future.warnings)
    today = {target: state for target, state in found["states"].items() if target not in future.states}
    assert future.states.items() <= found["states"].items()
    assert set(today.values()) <= {"applied", "not-needed", "off"}  # off: the layers that one asks for
    assert found["healthy"] == (not future.problems), found["problems"]
    for words in future.problems:
        assert any(words in problem for problem in found["problems"]), found["problems"]
    information = [message for level, message in found["log"] if level == "INFO"]
    assert information[1:] == [
        f"newer than what hf_packfix was tested with, judged by probes: {future.package} 99.0.0"
    ]
    for use in ("training", "evaluation", "models"):
        assert found[use].startswith(getattr(future, use)), f"{use}: {found[use]}"


@pytest.mark.parametrize("name", ["nothing that matters", "a parameter added to _prepare_input", "nested_detach gone"])
@pytest.mark.parametrize("automatic", [True, False])
def test_warnings_as_errors_never_break_a_program(tmp_path, name, automatic):
    code = "import transformers.trainer_seq2seq, sys; print('ran', 'hf_packfix' in sys.modules)"
    code = code if automatic else f"import hf_packfix; {code}"
    variables = {"HF_PACKFIX": "1"} if automatic else {}
    if automatic:  # what the start-up files do
        code = f"import _hf_packfix_boot; _hf_packfix_boot.start(); {code}"
    done = run(tmp_path, FUTURES[name], code, "-W", "error", **variables)
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
    done = run(
        tmp_path, FUTURES["a parameter added to _prepare_input"], f"import runpy; runpy.run_path({str(path)!r})"
    )
    (warning,) = [text for text in done.stderr.splitlines() if "HFPackfixWarning" in text]
    assert warning.startswith(f"{path}:{line}: HFPackfixWarning: ")
