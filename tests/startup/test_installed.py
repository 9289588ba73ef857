"""An installed wheel: programs that never mention the plugin, and the commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from hf_packfix.patches import FAST_RNN, PATCHES
from tests.support.installed import ROOT, STARTUP_FILES, Environment, wheel
from tests.tools.drift import state_here

pytestmark = pytest.mark.slow  # starts many processes

TRAIN = """
import multiprocessing, sys, torch
from torch.nn.utils.rnn import pack_sequence
from transformers import Trainer, TrainingArguments

class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = torch.nn.GRU(2, 3)
    def forward(self, x, labels):
        states = self.gru(x)[0]
        return {"loss": torch.nn.functional.cross_entropy(states.data, labels.data), "logits": states}

def collate(rows):
    return {key: pack_sequence([row[key] for row in rows], enforce_sorted=False) for key in rows[0]}

class SomebodysTrainer(Trainer):
    pass

if __name__ == "__main__":
    if "spawn" in sys.argv:
        multiprocessing.set_start_method("spawn")
    rows = [{"x": torch.ones(n, 2), "labels": torch.arange(n) % 3} for n in (1, 4, 2, 5)]
    args = TrainingArguments("out", max_steps=2, per_device_train_batch_size=1, report_to=[], save_strategy="no",
                             use_cpu=True, disable_tqdm=True, dataloader_num_workers=int("spawn" in sys.argv))
    trainer = SomebodysTrainer(Tagger(), args, collate, rows, rows, compute_metrics=lambda p: {"n": len(p.label_ids)})
    trainer.train()
    assert trainer.evaluate()["eval_n"] == 4
    sys.stdout.write(f"trained {sys.argv[1:]}\\n")  # in one piece, that processes on one pipe do not mix
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel in an environment that sees the packages of this one."""
    environment = Environment(tmp_path_factory.mktemp("venv") / "venv").share_packages()
    environment.pip("install", "--no-deps", "--no-index", str(wheel()))
    return environment


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "train.py"
    path.write_text(TRAIN)
    return path


def test_install_and_uninstall(tmp_path):
    environment = Environment(tmp_path / "venv")
    environment.write("other.py", "")  # pip removes a folder that it leaves empty
    before = set(environment.site.iterdir())
    environment.pip("install", "--no-deps", "--no-index", str(wheel()))
    assert all((environment.site / name).exists() for name in STARTUP_FILES)
    environment.pip("uninstall", "--yes", "hf-packfix")
    assert set(environment.site.iterdir()) == before


def test_editable_install_and_uninstall(tmp_path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".git", ".venv", "__pycache__", "tests")
    shutil.copytree(ROOT, source, ignore=ignore)
    environment = Environment(tmp_path / "venv")
    environment.write("other.py", "")  # pip removes a folder that it leaves empty
    before = set(environment.site.iterdir())
    environment.pip("install", "--no-deps", "--editable", str(source))
    for name in STARTUP_FILES:
        assert (environment.site / name).read_bytes() == (ROOT / "hf_packfix/startup" / name).read_bytes()
    environment.pip("uninstall", "--yes", "hf-packfix")
    assert set(environment.site.iterdir()) == before


# --- HF_PACKFIX=1 python train.py -----------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["spawn"]])
def test_an_unedited_program_trains(installed, program, arguments):
    result = installed.run(str(program), *arguments, variable="1", cwd=program.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"trained {arguments}"
    assert "hf_packfix" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"], 2),
        # On CPUs, accelerate leaves starting the second one to MPI, and starts one where there is none.
        (["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"], 1),
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_an_unedited_program_trains_under_a_launcher(installed, program, launcher, processes):
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    result = installed.run(*launcher, str(program), variable="1", cwd=program.parent, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("trained []") == processes


@pytest.mark.parametrize("variable", [None, "0"])
def test_it_fails_as_stock_does_when_nobody_asks(installed, program, variable):
    result = installed.run(str(program), variable=variable, cwd=program.parent)
    assert result.returncode == 1
    assert "AssertionError: Expected data to be a list or tuple of length 2" in result.stderr


def test_status_says_what_activated_it(installed):
    code = "import transformers, hf_packfix; print(hf_packfix.status().reason)"
    assert installed.run("-c", code, variable="true").stdout == "activated by HF_PACKFIX=true\n"
    assert installed.run("-c", code).stdout == "activated by import hf_packfix\n"
    assert installed.run("-c", code, variable="0").stdout == "HF_PACKFIX=0 keeps it off\n"
    assert "HF_PACKFIX='maybe' is not one of: 1, true" in installed.run("-c", code, variable="maybe").stdout
    assert installed.run("-E", "-c", code, variable="0").stdout == "activated by import hf_packfix\n"


def pretend_old(environment, version="4.30.2"):
    return environment.write(
        f"transformers-{version}.dist-info/METADATA",
        f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n",
    ).parent


def test_below_the_floor_the_program_runs_and_one_line_says_why(installed):
    old = pretend_old(installed)
    try:
        code = "from transformers import Trainer; import sys; print(Trainer.__name__, 'hf_packfix' in sys.modules)"
        result = installed.run("-c", code, variable="1")
        assert (result.stdout, result.returncode) == ("Trainer True\n", 0)
        (line,) = [line for line in result.stderr.splitlines() if "packfix" in line]
        assert line.startswith("hf_packfix: not activated: ")
        assert "needs transformers >= 4.46, but found transformers 4.30.2" in line
        forced = installed.run(
            "-c", "import transformers, hf_packfix; print(hf_packfix.is_enabled())", variable="force"
        )
        assert forced.stdout == "True\n"
        doctor = installed.run("-m", "hf_packfix", "doctor", "--json", variable="1")
        assert doctor.returncode == 1
        assert "found transformers 4.30.2" in json.loads(doctor.stdout)["problems"][0]
    finally:
        shutil.rmtree(old)


def test_newer_than_tested_under_warnings_as_errors(installed):
    new = pretend_old(installed, "99.0")
    try:
        code = "import transformers, hf_packfix; print(hf_packfix.is_enabled())"
        result = installed.run("-W", "error::UserWarning", "-c", code, variable="1")
        assert result.stdout == "True\n", result.stderr
        assert "packfix" not in result.stderr
    finally:
        shutil.rmtree(new)


@pytest.mark.parametrize("missing", ["wrapt", "importlib_metadata"])
def test_a_missing_dependency_is_one_line(installed, missing):
    blocked = installed.write(f"{missing}/__init__.py", f"raise ModuleNotFoundError('No module named {missing}')")
    try:
        result = installed.run("-c", "from transformers import Trainer; print('ran')", variable="1")
        assert (result.stdout, result.returncode) == ("ran\n", 0)
        (line,) = [line for line in result.stderr.splitlines() if "packfix" in line]
        assert f"No module named {missing}" in line
    finally:
        shutil.rmtree(blocked.parent)


def test_the_log(installed):
    code = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(name)s %(levelname)s %(message)s")
logging.getLogger("hf_packfix").setLevel(sys.argv[1])
from transformers import Trainer, Seq2SeqTrainer
import hf_packfix; hf_packfix.enable()
"""
    info = installed.run("-c", code, "INFO", variable="1").stdout.splitlines()
    assert len(info) == 1
    assert info[0].startswith("hf_packfix INFO hf_packfix ")
    assert "activated by HF_PACKFIX=1" in info[0]
    assert "transformers " in info[0]
    debug = installed.run("-c", code, "DEBUG", variable="1").stdout
    assert "hf_packfix DEBUG transformers.trainer:Trainer._prepare_input: applied" in debug
    assert installed.run("-c", code, "INFO", variable="1", env={"RANK": "1"}).stdout == ""


# --- run ------------------------------------------------------------------------------------------------


SHOWS = """
import os, subprocess, sys
print(__name__, sys.argv, sys.path[0], os.environ.get("HF_PACKFIX"))
import hf_packfix
print(hf_packfix.status().reason)
if sys.argv[1:] == ["raise"]:
    raise KeyError("mine")
if sys.argv[1:] == ["exit"]:
    sys.exit(7)
"""


@pytest.fixture
def shows(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/shows.py").write_text(SHOWS)
    return tmp_path


def test_run_a_script(installed, shows):
    result = installed.run("-m", "hf_packfix", "run", "folder/shows.py", "-m", "--x", "1", cwd=shows)
    expected = f"__main__ ['folder/shows.py', '-m', '--x', '1'] {shows / 'folder'} 1\n"
    assert result.stdout == expected + "activated by hf-packfix run\n", result.stderr
    assert result.returncode == 0


def test_run_a_module(installed, shows):
    result = installed.run("-m", "hf_packfix", "run", "-m", "shows", "--y", cwd=shows / "folder", variable="0")
    first, second = result.stdout.splitlines()
    assert first == f"__main__ ['{shows / 'folder/shows.py'}', '--y'] {shows / 'folder'} 1"
    assert second == "activated by hf-packfix run"


def test_run_keeps_exit_status_and_traceback(installed, shows):
    script = str(shows / "folder/shows.py")
    command = [str(installed.python.parent / "hf-packfix"), "run", script]
    exits = subprocess.run([*command, "exit"], capture_output=True, text=True, check=False)
    assert exits.returncode == 7
    raises = subprocess.run([*command, "raise"], capture_output=True, text=True, check=False)
    assert raises.returncode == 1
    plain = installed.run(script, "raise")
    assert raises.stderr == plain.stderr  # the program's frames alone


def test_run_trains_where_start_up_files_do_not_work(installed, program):
    result = installed.run("-m", "hf_packfix", "run", str(program), "spawn", cwd=program.parent)
    assert result.stdout.splitlines()[-1] == "trained ['spawn']", result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "the following arguments are required: SCRIPT"),
        (["walk"], "invalid choice: 'walk'"),
        (["doctr"], "'doctr' is not a command; did you mean: hf-packfix doctor\n"),
    ],
)
def test_bad_usage(installed, tmp_path, arguments, message):
    result = installed.run("-m", "hf_packfix", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


# --- doctor ---------------------------------------------------------------------------------------------


def doctor(installed, *arguments, **kwargs):
    result = installed.run("-m", "hf_packfix", "doctor", "--json", *arguments, **kwargs)
    return result.returncode, json.loads(result.stdout)


def test_doctor_of_a_healthy_installation(installed):
    status, report = doctor(installed)
    assert (status, report["problems"], report["warnings"]) == (0, [], [])
    assert report["selftest"] == "passed"
    assert list(report["startup_files"].values()) == ["intact"] * 3
    states = {patch["target"]: patch["state"] for patch in report["status"]["patches"]}
    expected = {patch.target: state_here(patch) for patch in PATCHES}
    assert states == expected | {patch.target: "off" for patch in FAST_RNN}
    text = installed.run("-m", "hf_packfix", "doctor", variable="1")
    assert text.returncode == 0
    assert text.stdout.splitlines()[0] == "healthy"
    assert "\nHF_PACKFIX is '1': every program that imports transformers is patched\n" in text.stdout


def test_doctor_when_it_is_off(installed):
    status, report = doctor(installed, variable="off")
    assert (status, report["healthy"], report["problems"]) == (3, False, [])
    assert report["selftest"] == "skipped: hf_packfix is not enabled"
    assert report["status"]["reason"] == "HF_PACKFIX=off keeps it off"


def test_doctor_names_a_value_that_means_nothing(installed):
    status, report = doctor(installed, variable="maybe")
    assert status == 1
    assert report["problems"][0].startswith("HF_PACKFIX='maybe' is not one of: 1, true")


def test_doctor_sees_damaged_start_up_files(installed):
    path = installed.site / "hf_packfix_auto.pth"
    whole = path.read_bytes()
    try:
        path.unlink()
        status, report = doctor(installed, variable="1")
        assert status == 1
        assert "start-up files are not all there" in report["problems"][0]
        status, report = doctor(installed)
        assert status == 0
        assert "HF_PACKFIX=1 may not work here" in report["warnings"][0]
        path.write_bytes(whole + b"\n# more\n")
        assert doctor(installed)[1]["startup_files"][str(path)] == "changed"
    finally:
        path.write_bytes(whole)


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


def test_doctor_lists_what_trainers_override(installed, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    status, report = doctor(installed, "--import", "mine", env={"PYTHONPATH": str(tmp_path)})
    assert status == 0
    assert report["trainers"] == {
        "mine.A": {"prediction_step": False},
        "mine.B": {"_prepare_input": False},
        "mine.C": {},
        "mine.D": {"floating_point_ops": True, "prediction_step": True},
    }
    moves, predicts = sorted(report["warnings"])
    assert moves.startswith("_prepare_input does not call super() in mine.B, so the patch of Trainer._prepare_input ")
    assert predicts.startswith("prediction_step does not call super() in mine.A, ")
    text = installed.run("-m", "hf_packfix", "doctor", "--import", "mine", env={"PYTHONPATH": str(tmp_path)})
    assert "  mine.A: prediction_step (does not call super())\n" in text.stdout
    assert "  mine.C: none\n" in text.stdout


def test_doctor_says_what_it_could_not_import(installed, tmp_path):
    # A package that loads its Trainers when they are asked for, as trl does; one of them cannot be.
    (tmp_path / "lazy").mkdir()
    (tmp_path / "lazy/__init__.py").write_text(
        "def __dir__(): return ['SomeTrainer', 'OtherTrainer', 'other']\n"
        "def __getattr__(name):\n"
        "    if name == 'OtherTrainer': raise ImportError('needs\\nmore')\n"
        "    if name != 'SomeTrainer': raise AttributeError(name)\n"
        "    from lazy.some import SomeTrainer\n"
        "    return SomeTrainer\n"
    )
    (tmp_path / "lazy/some.py").write_text("from transformers import Trainer\nclass SomeTrainer(Trainer): pass\n")
    status, report = doctor(installed, "--import", "lazy", env={"PYTHONPATH": str(tmp_path)})
    assert (status, report["trainers"]) == (0, {"lazy.some.SomeTrainer": {}})
    assert report["warnings"] == ["lazy.OtherTrainer cannot be loaded: ImportError: needs more"]

    status, report = doctor(installed, "--import", "json", "--import", "no_such_module")
    assert status == 1
    assert report["warnings"] == ["--import json: found no Trainer subclass; name the module that defines it"]
    assert "--import no_such_module: ModuleNotFoundError" in report["problems"][0]


def test_doctor_reports_a_failing_self_test(installed):
    broken = "import transformers\ndel transformers.Trainer.compute_loss\n"
    code = f"{broken}import sys; from hf_packfix.commands.cli import main; sys.exit(main(['doctor', '--json']))"
    result = installed.run("-c", code)
    assert result.returncode == 1
    assert json.loads(result.stdout)["selftest"].startswith("failed: AttributeError")


def test_version(installed):
    import hf_packfix

    result = installed.run("-m", "hf_packfix", "--version")
    assert result.stdout == f"hf-packfix {hf_packfix.__version__}\n"
    assert sys.version_info >= (3, 10)
