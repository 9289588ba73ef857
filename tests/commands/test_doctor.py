"""What ``hf-packfix doctor`` reports; ``test_installed.py`` asks it in an installation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from transformers import Trainer, TrainingArguments

import hf_packfix
from hf_packfix.commands import doctor
from hf_packfix.commands.trainers import try_trainer
from hf_packfix.models import modeling_recurrent as modeling
from hf_packfix.models.selftest import CHECKS
from hf_packfix.patches import FAST_RNN, PATCHES
from tests.support.interpreters import python


@pytest.fixture
def report_on(tmp_path, monkeypatch):
    """Return a function that returns what the doctor finds in modules of the working directory, ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(doctor, "try_trainer", lambda: None)
    monkeypatch.setattr(doctor, "_check_models", dict)

    yield lambda *modules: doctor.examine(modules)
    hf_packfix.enable(fast_rnn=False)
    for name, module in [*sys.modules.items()]:
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


def test_a_trainer_that_cannot_be_imported(report_on, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(doctor.importlib, "import_module", lambda name: 1 / 0)
        report = report_on("mine")
    (problem,) = report.problems
    assert problem.startswith("the Trainer cannot be imported: ")
    assert report.selftest == "skipped: the Trainer cannot be imported"


def printed(*arguments, cwd=None, **variables):
    """Return what ``hf-packfix doctor`` as a user starts it: its exit status, lines and stderr."""
    script = Path(sys.executable).parent / "hf-packfix"
    result = python(script, "doctor", *arguments, env=variables, cwd=cwd, measured=True)
    return result.returncode, result.stdout.splitlines(), result.stderr


MINE = """
import functools
from transformers import Trainer, Seq2SeqTrainer

def logged(method):
    @functools.wraps(method)
    def logs(*args, **kwargs):
        return method(*args, **kwargs)
    return logs

class A(Trainer):
    def prediction_step(self, *args, **kwargs): pass
    def other(self): pass
class B(A):
    # As the original does for what is nested: a call of itself is no call of super().
    def _prepare_input(self, data): return [self._prepare_input(item) for item in data]
class C(Seq2SeqTrainer): pass
class D(C):
    @logged
    def prediction_step(self, *args, **kwargs): return super().prediction_step(*args, **kwargs)
    def floating_point_ops(self, inputs): return [Trainer.floating_point_ops(self, i) for i in [inputs]][0]
"""


def test_the_verdict_is_the_first_line_and_problems_follow(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)  # in the working directory
    status, lines, _ = printed("--import", "json", "--import", "gone", "--import", "mine", cwd=tmp_path)
    assert status == 1
    assert lines[0] == "not healthy"
    assert lines[1] == "problem: --import gone: ModuleNotFoundError: No module named 'gone'"
    assert lines[2].startswith("warning: --import json: found no Trainer subclass")
    assert (
        "warning: _prepare_input does not call super() in mine.B, so the patch of Trainer._prepare_input does not act "
        "there. Without the patch: "
    ) in "\n".join(lines)
    assert "  mine.A: prediction_step (does not call super())" in lines
    assert "  mine.C: none" in lines


def test_the_report_is_a_page_and_every_patch_has_a_line_on_request():
    status, lines, stderr = printed()
    assert (status, lines[0]) == (0, "healthy")
    assert len(lines) <= 25
    assert any(line.startswith("HF_PACKFIX is unset: only a program that imports hf_packfix is") for line in lines)
    assert any("hf-packfix run --status train.py" in line for line in lines)
    assert "hf-packfix docs troubleshooting" in lines[-1]
    assert stderr.startswith("hf-packfix doctor: imports transformers and trains a step, in about ")
    _, lines, _ = printed("-v", HF_PACKFIX="1")
    assert "HF_PACKFIX is '1': every program that imports transformers is patched" in lines
    text = "\n".join(lines)
    for patch in (*PATCHES, *FAST_RNN):
        assert f" {patch.target}" in text
        assert f"{patch.problem}. With the patch: {patch.fix}." in text
    for name in CHECKS:
        assert f"self-test of hf_packfix.models ({name}): passed" in lines


def test_off_is_a_verdict_and_an_exit_status_of_its_own():
    status, lines, stderr = printed(HF_PACKFIX="0")
    assert (status, lines[0], stderr) == (3, "off: HF_PACKFIX=0 keeps it off", "")
    assert "HF_PACKFIX is '0': no program is patched" in lines


def test_what_trainers_override_is_listed(report_on):
    Path("mine.py").write_text(MINE)
    report = report_on("mine")
    assert report.healthy
    assert report.trainers == {
        "mine.A": {"prediction_step": False},
        "mine.B": {"_prepare_input": False},
        "mine.C": {},
        "mine.D": {"floating_point_ops": True, "prediction_step": True},
    }
    moves, predicts = sorted(report.warnings)
    assert moves.startswith("_prepare_input does not call super() in mine.B, so the patch of Trainer._prepare_input ")
    assert predicts.startswith("prediction_step does not call super() in mine.A, ")


#: A package that loads its Trainers when they are asked for, as trl does; one of them cannot be.
LAZY = """
def __dir__(): return ['SomeTrainer', 'OtherTrainer', 'other']
def __getattr__(name):
    if name == 'OtherTrainer': raise ImportError('needs\\nmore')
    if name != 'SomeTrainer': raise AttributeError(name)
    from lazy.some import SomeTrainer
    return SomeTrainer
"""


def test_what_cannot_be_imported_is_named(report_on):
    Path("lazy").mkdir()
    Path("lazy/some.py").write_text("from transformers import Trainer\nclass SomeTrainer(Trainer): pass\n")
    Path("lazy/__init__.py").write_text(LAZY)
    Path("script.py").write_text("import sys\nprint('usage')\nsys.exit(2)\n")
    Path("prints.py").write_text("from transformers import Trainer\nclass Mine(Trainer): pass\nprint('loaded')\n")
    report = report_on("lazy", "script", "prints")
    assert report.trainers == {"lazy.some.SomeTrainer": {}, "prints.Mine": {}}
    assert report.warnings == ["lazy.OtherTrainer cannot be loaded: ImportError: needs more"]
    assert report.problems == ["--import script: SystemExit: 2"]


def test_a_healthy_report_has_tried_the_models():
    report = doctor.examine([])
    assert (report.healthy, report.problems) == (True, [])
    assert report.models == dict.fromkeys(CHECKS, "passed")


#: For each check what breaks one thing that the models do: the object, its attribute, and what replaces that.
BROKEN = {
    "save and load": (
        modeling.RecurrentPreTrainedModel,
        "state_dict",
        lambda self, *args, **kwargs: {
            name: weight + torch.rand(()) for name, weight in nn.Module.state_dict(self, *args, **kwargs).items()
        },
    ),
    "padded equals packed": (
        modeling,
        "step_loss",
        lambda logits, labels, items=None, original=modeling.step_loss: (
            original(logits, labels, items) * (2 if isinstance(logits, PackedSequence) else 1)
        ),
    ),
    "generate": (
        modeling.RecurrentModel,
        "_embed",
        lambda self, inputs, original=modeling.RecurrentModel._embed: original(
            self, inputs if inputs.shape[-1] > 1 else inputs * 0
        ),
    ),
    "continue from the state": (modeling, "given_state", lambda arguments: None),
    "a step of the Trainer": (Trainer, "training_step", 0),
}


@pytest.mark.parametrize("check", BROKEN)
def test_broken_models_are_a_problem(monkeypatch, check):
    owner, name, replacement = BROKEN[check]
    monkeypatch.setattr(owner, name, replacement, raising=False)
    report = doctor.examine([])
    assert not report.healthy
    assert report.models[check].startswith("failed: ")
    assert any(problem.startswith(f"hf_packfix.models, {check}: failed: ") for problem in report.problems)


def test_a_value_of_the_variable_that_nobody_knows_is_one_problem(report_on, monkeypatch):
    monkeypatch.setenv("HF_PACKFIX", "maybe")
    (problem,) = report_on().problems
    assert problem.startswith("HF_PACKFIX='maybe' is not one of: ")


OWN = "nn.LSTM, nn.GRU and nn.RNN are torch's own"
FAST = "nn.LSTM, nn.GRU and nn.RNN use hf_packfix.rnn on packed data"
BAD = "HF_PACKFIX_FAST_RNN='fast' is not one of: 1, true, yes, on, 0, false, no, off"


@pytest.mark.parametrize(
    ("value", "line", "problems"),
    [
        (None, f"HF_PACKFIX_FAST_RNN is unset: {OWN}", []),
        ("off", f"HF_PACKFIX_FAST_RNN is 'off': {OWN}", []),
        ("1", f"HF_PACKFIX_FAST_RNN is '1': {FAST}", []),
        ("fast", f"HF_PACKFIX_FAST_RNN is 'fast': {OWN}", [BAD]),
    ],
)
@pytest.mark.usefixtures("report_on")
def test_the_variable_of_the_fast_layers(monkeypatch, capsys, value, line, problems):
    if value is not None:
        monkeypatch.setenv("HF_PACKFIX_FAST_RNN", value)
    hf_packfix.disable()
    hf_packfix.enable()
    doctor.run([], as_json=True)
    doctor.run([], as_json=False)
    printed = capsys.readouterr().out
    report, end = json.JSONDecoder().raw_decode(printed)
    text = printed[end:].splitlines()
    assert report["problems"] == problems
    assert (report["fast_rnn_variable"], report["fast_rnn"]) == (value, line.endswith(FAST))
    assert line in text
    assert [said for said in text if said.startswith("problem: ")] == [f"problem: {problem}" for problem in problems]


OVERRIDES = """
from transformers import Trainer
class Mine(Trainer):
    def get_batch_samples(self, epoch_iterator, *args): return list(epoch_iterator), None
    def _prepare_input(self, data): return data
"""
CASTS = """
import torch
from transformers import Trainer
class Casts(Trainer):
    def _prepare_inputs(self, inputs):
        return {k: v.half() if torch.is_tensor(v) else v for k, v in super()._prepare_inputs(inputs).items()}
class Plain(Trainer):
    def training_step(self, *args): return super().training_step(*args)
def nested_detach(tensors): return tensors.detach()
from transformers.trainer_pt_utils import nested_concat
"""


def test_a_method_that_needs_no_patch_here_is_nothing_to_warn_of(report_on):
    Path("overrides.py").write_text(OVERRIDES)
    report = report_on("overrides")
    states = {patch.target: patch.state for patch in report.status.patches}
    acts = states["transformers.trainer:Trainer.get_batch_samples"] == "applied"  # up to 5.2
    expected = {"_prepare_input": False} | ({"get_batch_samples": False} if acts else {})
    assert report.trainers == {"overrides.Mine": expected}
    assert any("_prepare_input does not call super()" in warning for warning in report.warnings)
    assert any("get_batch_samples" in warning for warning in report.warnings) == acts


def test_what_is_done_to_tensors_apart(report_on):
    Path("casts.py").write_text(CASTS)
    report = report_on("casts")
    assert report.healthy
    cast, copy = report.warnings
    assert cast.startswith("casts.Casts._prepare_inputs looks for tensors itself (is_tensor): ")
    assert copy.startswith("casts.nested_detach is a copy of transformers.trainer_pt_utils:nested_detach, and is not")


def test_the_self_test_on_a_machine_with_several_gpus(monkeypatch):
    set_up = TrainingArguments.__post_init__

    def with_two_gpus(self):
        set_up(self)
        if not self.use_cpu:
            self._n_gpu = 2  # what it finds without a launcher

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_two_gpus)
    assert try_trainer() is None
