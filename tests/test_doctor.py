"""What ``hf-packfix doctor`` reports where something is wrong; ``test_installed.py`` asks it in an installation."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from transformers import TrainingArguments

from hf_packfix.selftest import selftest
from tests.interpreters import environment


def doctor(tmp_path, *arguments, before=""):
    """Return the exit status and the report of a doctor in an interpreter of its own."""
    code = (
        f"{before}\nimport sys; from hf_packfix.cli import main; sys.exit(main(['doctor', '--json', *sys.argv[1:]]))"
    )
    env = environment()
    env["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=False)
    return result.returncode, json.loads(result.stdout)


def test_a_trainer_that_cannot_be_imported(tmp_path):
    status, report = doctor(tmp_path, "--import", "json", before="import sys; sys.modules['transformers'] = None")
    assert status == 1
    assert any(problem.startswith("the Trainer cannot be imported: ") for problem in report["problems"])


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


def test_the_self_test_on_a_machine_with_several_gpus(monkeypatch):
    set_up = TrainingArguments.__post_init__

    def with_two_gpus(self):
        set_up(self)
        if not self.use_cpu:
            self._n_gpu = 2  # what it finds without a launcher

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_two_gpus)
    assert selftest() is None
