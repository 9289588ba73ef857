"""An installed wheel: programs that never mention the plugin, and the commands."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.support.installed import ROOT, STARTUP_FILES, Environment, wheel

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


@pytest.mark.parametrize("editable", [False, True])
def test_installing_and_uninstalling_leaves_nothing_behind(tmp_path, editable):
    source = tmp_path / "source"
    if editable:
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "tests"))
    environment = Environment(tmp_path / "venv")
    environment.write("other.py", "")  # pip removes a folder that it leaves empty
    before = set(environment.site.iterdir())
    what = ["--editable", str(source)] if editable else ["--no-index", str(wheel())]
    environment.pip("install", "--no-deps", *what)
    for name in STARTUP_FILES:
        assert (environment.site / name).read_bytes() == (ROOT / "hf_packfix/startup" / name).read_bytes()
    environment.pip("uninstall", "--yes", "hf-packfix")
    assert set(environment.site.iterdir()) == before


#: For each way to start the program: the words before it, its arguments, ``HF_PACKFIX``, and how many processes train.
WAYS = {
    "python": ([], [], "1", 1),
    "spawned workers": ([], ["spawn"], "1", 1),
    "torchrun": (["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"], [], "1", 2),
    # On CPUs, accelerate leaves starting the second one to MPI, and starts one where there is none.
    "accelerate": (["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"], [], "1", 1),
    "hf-packfix run": (["-m", "hf_packfix", "run"], ["spawn"], None, 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_unedited_program_trains(installed, program, way):
    launcher, arguments, variable, processes = WAYS[way]
    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    words = [*launcher, str(program), *arguments]
    result = installed.run(*words, variable=variable, cwd=program.parent, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count(f"trained {arguments}") == processes
    assert launcher or "hf_packfix" not in result.stdout + result.stderr


def test_status_says_what_activated_it(installed):
    code = "import transformers, hf_packfix; print(hf_packfix.status().reason)"
    assert installed.run("-c", code, variable="true").stdout == "activated by HF_PACKFIX=true\n"
    assert installed.run("-c", code).stdout == "activated by import hf_packfix\n"
    assert installed.run("-c", code, variable="0").stdout == "HF_PACKFIX=0 keeps it off\n"
    assert "HF_PACKFIX='maybe' is not one of: 1, true" in installed.run("-c", code, variable="maybe").stdout
    assert installed.run("-E", "-c", code, variable="0").stdout == "activated by import hf_packfix\n"


def test_below_the_floor_the_program_runs_and_one_line_says_why(installed):
    metadata = "Metadata-Version: 2.1\nName: transformers\nVersion: 4.30.2\n"
    old = installed.write("transformers-4.30.2.dist-info/METADATA", metadata).parent
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


def test_what_is_logged_is_one_line_at_info_and_each_patch_at_debug(installed):
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


def doctor(installed, *arguments, **kwargs):
    result = installed.run("-m", "hf_packfix", "doctor", "--json", *arguments, **kwargs)
    return result.returncode, json.loads(result.stdout)


def test_doctor_of_a_healthy_installation(installed):
    status, report = doctor(installed)
    assert (status, report["problems"], report["warnings"]) == (0, [], [])
    assert report["selftest"] == "passed"
    assert list(report["startup_files"].values()) == ["intact"] * 3
    assert not {patch["state"] for patch in report["status"]["patches"]} & {"pending", "refused"}


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
