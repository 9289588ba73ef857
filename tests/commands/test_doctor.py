"""What ``hf-packfix doctor`` reports; ``test_installed.py`` asks it in an installation."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types

import pytest
from transformers import TrainingArguments

from hf_packfix.commands.selftest import selftest
from hf_packfix.commands.trainers import cuts_of_batches, handled_apart
from hf_packfix.models.selftest import CHECKS
from tests.support.interpreters import environment


def doctor(tmp_path, *arguments, before=""):
    """Return the exit status and the report of a doctor in an interpreter of its own."""
    code = (
        f"{before}\nimport sys; from hf_packfix.commands.cli import main\n"
        f"sys.exit(main(['doctor', '--json', *sys.argv[1:]]))"
    )
    env = environment()
    env["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=False)
    return result.returncode, json.loads(result.stdout)


def test_a_trainer_that_cannot_be_imported(tmp_path):
    status, report = doctor(tmp_path, "--import", "json", before="import sys; sys.modules['transformers'] = None")
    assert status == 1
    (problem,) = report["problems"]
    assert problem.startswith("the Trainer cannot be imported: ")
    assert report["selftest"] == "skipped: the Trainer cannot be imported"


def test_the_verdict_is_the_first_line_and_problems_follow(tmp_path):
    command = [sys.executable, "-m", "hf_packfix", "doctor", "--import", "json", "--import", "gone"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=240, check=False)
    lines = result.stdout.splitlines()
    assert result.returncode == 1
    assert lines[0] == "not healthy"
    assert lines[1] == "problem: --import gone: ModuleNotFoundError: No module named 'gone'"
    assert lines[2].startswith("warning: --import json: found no Trainer subclass")


def test_the_models_are_tried(tmp_path):
    status, report = doctor(tmp_path)
    assert (status, report["healthy"], report["problems"]) == (0, True, [])
    assert report["models"] == dict.fromkeys(CHECKS, "passed")


#: Breaks one thing that the models do, and the check that must notice it.
BROKEN = {
    "save and load": "m.RecurrentPreTrainedModel.state_dict = lambda self, *args, **kwargs: "
    "{k: v + torch.rand(()) for k, v in torch.nn.Module.state_dict(self, *args, **kwargs).items()}",
    "padded equals packed": "m.step_loss = lambda logits, labels, items=None, _original=m.step_loss: "
    "_original(logits, labels, items) * (2 if isinstance(logits, m.PackedSequence) else 1)",
    "generate": "m.RecurrentModel._embed = lambda self, inputs, _original=m.RecurrentModel._embed: "
    "_original(self, inputs if inputs.shape[-1] > 1 else inputs * 0)",
    "continue from the state": "m.given_state = lambda arguments: None",
    "a step of the Trainer": "import transformers; transformers.Trainer.training_step = 0",
}


@pytest.mark.parametrize("check", BROKEN)
def test_broken_models_are_a_problem(tmp_path, check):
    before = f"import torch, hf_packfix.models.modeling_recurrent as m\n{BROKEN[check]}"
    status, report = doctor(tmp_path, before=before)
    assert (status, report["healthy"]) == (1, False)
    assert report["models"][check].startswith("failed: ")
    assert any(problem.startswith(f"hf_packfix.models, {check}: failed: ") for problem in report["problems"])


def test_a_value_of_the_variable_that_nobody_knows_is_one_problem(tmp_path):
    status, report = doctor(tmp_path, before="import os; os.environ['HF_PACKFIX'] = 'maybe'")
    (problem,) = report["problems"]
    assert status == 1
    assert problem.startswith("HF_PACKFIX='maybe' is not one of: ")


OWN = "nn.LSTM, nn.GRU and nn.RNN are torch's own"
FAST = "nn.LSTM, nn.GRU and nn.RNN use hf_packfix.rnn on packed data on a CPU"
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
def test_the_variable_of_the_fast_layers(value, line, problems):
    code = "from hf_packfix.commands import doctor; doctor.run([], as_json=True); doctor.run([], as_json=False)"
    env = environment()
    env.pop("HF_PACKFIX_FAST_RNN", None)
    if value is not None:
        env["HF_PACKFIX_FAST_RNN"] = value
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=240, check=True
    )
    report, end = json.JSONDecoder().raw_decode(result.stdout)
    text = result.stdout[end:].splitlines()
    assert report["problems"] == problems
    assert (report["fast_rnn_variable"], report["fast_rnn"]) == (value, line.endswith(FAST))
    assert line in text
    assert [said for said in text if said.startswith("problem: ")] == [f"problem: {problem}" for problem in problems]


def test_modules_that_print_and_that_end(tmp_path):
    (tmp_path / "script.py").write_text("import sys\nprint('usage')\nsys.exit(2)\n")
    (tmp_path / "prints.py").write_text(
        "from transformers import Trainer\nclass Mine(Trainer): pass\nprint('loaded')\n"
    )
    status, report = doctor(tmp_path, "--import", "script", "--import", "prints")
    assert (status, report["problems"]) == (1, ["--import script: SystemExit: 2"])
    assert report["trainers"] == {"prints.Mine": {}}


def test_a_method_that_needs_no_patch_here_is_nothing_to_warn_of(tmp_path):
    (tmp_path / "overrides.py").write_text(
        "from transformers import Trainer\n"
        "class Mine(Trainer):\n"
        "    def get_batch_samples(self, epoch_iterator, *args): return list(epoch_iterator), None\n"
        "    def _prepare_input(self, data): return data\n"
    )
    _, report = doctor(tmp_path, "--import", "overrides")
    states = {patch["target"]: patch["state"] for patch in report["status"]["patches"]}
    acts = states["transformers.trainer:Trainer.get_batch_samples"] == "applied"  # up to 5.2
    expected = {"_prepare_input": False} | ({"get_batch_samples": False} if acts else {})
    assert report["trainers"] == {"overrides.Mine": expected}
    assert any("_prepare_input does not call super()" in warning for warning in report["warnings"])
    assert any("get_batch_samples" in warning for warning in report["warnings"]) == acts


def test_what_is_done_to_tensors_apart(tmp_path, monkeypatch):
    (tmp_path / "casts.py").write_text(
        "import torch\n"
        "from transformers import Trainer\n"
        "class Casts(Trainer):\n"
        "    def _prepare_inputs(self, inputs):\n"
        "        inputs = super()._prepare_inputs(inputs)\n"
        "        return {k: v.half() if torch.is_tensor(v) else v for k, v in inputs.items()}\n"
        "class Plain(Trainer):\n"
        "    def training_step(self, *args): return super().training_step(*args)\n"
        "def nested_detach(tensors): return tensors.detach()\n"
        "from transformers.trainer_pt_utils import nested_concat\n"
    )
    status, report = doctor(tmp_path, "--import", "casts")
    assert status == 0
    cast, copy = report["warnings"]
    assert cast.startswith("casts.Casts._prepare_inputs looks for tensors itself (is_tensor): ")
    assert copy.startswith("casts.nested_detach is a copy of transformers.trainer_pt_utils:nested_detach, and is not")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("casts")
    assert list(handled_apart("casts")) == [cast, copy]


CUTS = {
    "loop": """
class Loss:
    def pieces(self, batch, begin, end):
        result = {}
        for key, value in batch.items():
            if not isinstance(value, torch.Tensor):
                result[key] = value
            else:
                result[key] = value[begin:end, :4]
        return result
""",
    "comprehension": """
class Loss:
    def pieces(self, batch, size):
        for i in range(0, 8, size):
            yield {k: v[i : i + size] if torch.is_tensor(v) else v for k, v in batch.items()}
""",
}
HARMLESS = {
    "one that knows packed sequences": CUTS["loop"].replace("torch.Tensor", "(torch.Tensor, PackedSequence)"),
    "moves": CUTS["loop"].replace("value[begin:end, :4]", "value.to(begin)"),
    "takes one row": CUTS["loop"].replace("value[begin:end, :4]", "value[begin]"),
    "lists": CUTS["loop"].replace("torch.Tensor", "list"),
    "cuts another value": CUTS["loop"].replace("value[begin:end, :4]", "batch[begin:end]"),
    "no mapping": CUTS["loop"].replace("batch.items()", "batch"),
}


@pytest.mark.parametrize("code", CUTS.values(), ids=CUTS)
def test_losses_that_cut_tensors_alone(tmp_path, code):
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses/__init__.py").write_text(
        "from losses.cached import Loss\nfrom transformers import Trainer\nclass Mine(Trainer): pass\n"
    )
    (tmp_path / "losses/cached.py").write_text(f"import torch\n{code}")
    status, report = doctor(tmp_path, "--import", "losses")
    (warning,) = report["warnings"]
    assert status == 0
    assert warning.startswith("losses.cached.Loss.pieces cuts the tensors of a batch into pieces and puts a Packed")


@pytest.mark.parametrize("code", [*HARMLESS.values()], ids=HARMLESS)
def test_what_does_not_cut_tensors_alone(tmp_path, monkeypatch, code):
    (tmp_path / "harmless.py").write_text(f"import torch\n{code}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "harmless", raising=False)
    importlib.import_module("harmless")
    assert list(cuts_of_batches("harmless")) == []


def test_a_module_without_source_is_no_loss(monkeypatch):
    monkeypatch.setitem(sys.modules, "made_at_run_time", types.ModuleType("made_at_run_time"))
    assert list(cuts_of_batches("made_at_run_time")) == []


def test_the_self_test_on_a_machine_with_several_gpus(monkeypatch):
    set_up = TrainingArguments.__post_init__

    def with_two_gpus(self):
        set_up(self)
        if not self.use_cpu:
            self._n_gpu = 2  # what it finds without a launcher

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_two_gpus)
    assert selftest() is None
