"""Import finders of others in front of wrapt's: our hooks do not run for the modules that they load."""

from __future__ import annotations

import itertools

import pytest

from tests.support.interpreters import execute

pytestmark = pytest.mark.slow  # starts many processes

#: A finder that loads the modules of some packages by itself, as those of typeguard, jaxtyping and comet_ml do.
FINDER = """
import sys
from importlib.machinery import PathFinder

class Theirs:
    def __init__(self, *packages): self.packages = packages
    def find_spec(self, name, path=None, target=None):
        if any(name == package or name.startswith(package + ".") for package in self.packages):
            return PathFinder.find_spec(name, path, target)

def answer_for(*packages): sys.meta_path.insert(0, Theirs(*packages))

def check():
    import hf_packfix
    states = {patch.target: patch.state for patch in hf_packfix.status().patches}
    loaded = {target for target in states if target.partition(":")[0] in sys.modules}
    assert loaded and not [target for target in loaded if states[target] == "pending"], hf_packfix.status()
    assert "applied" in states.values() and hf_packfix.is_enabled()

def use():
    import tempfile
    from tests.support import oracle
    run = oracle.train(tempfile.mkdtemp(), oracle.Tagger, oracle.rows(4), oracle.packed_batch, max_steps=1)
    assert type(run.trainer)._prepare_input.__wrapped__
    run.trainer.evaluate()
"""
PACKAGES = [
    "'torch'",
    "'transformers.trainer'",
    "'transformers'",
    "'accelerate', 'transformers'",
    "'torch', 'transformers.trainer'",
]
ALL = ", ".join(["'torch'", "'accelerate'", "'transformers'"])


#: What applies the patches that are pending: a use of the Trainer, or a question.
APPLIES = {"use": "use()", "status": "from transformers import Seq2SeqTrainer, BatchFeature"}


# A finder that answers for all of them leaves no hook of ours that a use could run.
@pytest.mark.parametrize(("packages", "by"), [*itertools.product(PACKAGES, APPLIES), (ALL, "status")])
def test_a_use_of_the_trainer_and_the_status_apply_what_is_pending(packages, by):
    execute(f"{FINDER}\nimport hf_packfix\nanswer_for({packages})\n{APPLIES[by]}\ncheck()")


PROGRAMS = {
    "asking whether it is enabled applies what is pending": f"""
import hf_packfix
answer_for({ALL})
from transformers import Trainer
assert not hasattr(Trainer._prepare_input, "__wrapped__")
assert hf_packfix.is_enabled()
assert Trainer._prepare_input.__wrapped__
use()
""",
    # Its module is the first that their finder loads, and no hook runs after it.
    "a trainer that is loaded after everything else": """
import hf_packfix
import accelerate, transformers.trainer_pt_utils, transformers.trainer_utils, transformers.feature_extraction_utils
answer_for("transformers.trainer", "transformers.trainer_seq2seq")
from transformers import Seq2SeqTrainer
use()
check()
""",
    "a module that is being imported is not judged": """
import hf_packfix, torch, wrapt
answer_for("transformers.trainer")
seen = {}

def ask(module):
    seen["half"] = "Trainer" not in vars(sys.modules["transformers.trainer"])
    seen["enabled"] = hf_packfix.is_enabled()
    seen.update((p.target, (p.state, p.detail)) for p in hf_packfix.status().patches)
    torch.utils.data.DataLoader([1])  # a Trainer's first use, as far as we can tell

wrapt.register_post_import_hook(ask, "transformers.trainer_pt_utils")
import transformers.trainer
assert seen["half"] and seen["enabled"], seen
state, detail = seen["transformers.trainer:Trainer._prepare_input"]
assert state == "pending" and detail == "the module is being imported", (state, detail)
check()
""",
    "what is wrapped until the trainer is used is put back": """
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
places = [(Accelerator, "__init__"), (DataLoader, "__init__")]
originals = [vars(owner)[name] for owner, name in places]
def standing(): return [vars(owner)[name] for owner, name in places]

import hf_packfix
assert [f.__wrapped__ for f in standing()] == originals
hf_packfix.disable()
assert standing() == originals
hf_packfix.enable()
assert [f.__wrapped__ for f in standing()] == originals
list(DataLoader([1]))  # works as before
from transformers import BatchFeature, Seq2SeqTrainer
import torch.distributed.utils
check()
assert "pending" not in {patch.state for patch in hf_packfix.status().patches}
assert standing() == originals
""",
    "what no program imports keeps nothing wrapped after the first use": """
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
originals = [vars(owner)["__init__"] for owner in (Accelerator, DataLoader)]
import hf_packfix
from transformers import Trainer, TrainingArguments
assert [vars(owner)["__init__"] for owner in (Accelerator, DataLoader)] != originals
Trainer(torch.nn.Linear(1, 1), TrainingArguments("never_written", report_to=[]), train_dataset=[1])
assert "pending" in {patch.state for patch in hf_packfix.status().patches}  # of transformers.trainer_seq2seq
assert [vars(owner)["__init__"] for owner in (Accelerator, DataLoader)] == originals
check()
""",
    "nothing is raised where the trainer is used": """
import hf_packfix, torch
from hf_packfix.activation import control
real, control._requested_patches = control._requested_patches, lambda: 1 / 0
assert len(torch.utils.data.DataLoader([1, 2])) == 2
control._requested_patches = real
""",
    "a lock that another thread holds does not stop the first use": """
import threading
import hf_packfix, torch
from hf_packfix.activation.control import _locked
answer_for("transformers")
import transformers.trainer
held, done = threading.Event(), threading.Event()
def hold():
    with _locked():
        held.set()
        assert done.wait(60)
thread = threading.Thread(target=hold)
thread.start()
held.wait()
torch.utils.data.DataLoader([1])  # does not wait
assert not hasattr(transformers.trainer.Trainer._prepare_input, "__wrapped__")
done.set()
thread.join()
assert transformers.trainer.Trainer._prepare_input.__wrapped__  # whoever has the lock does it
""",
}


@pytest.mark.parametrize("promise", PROGRAMS)
def test_programs_with_finders_of_others_in_front(promise):
    execute(FINDER + PROGRAMS[promise])
