"""Programs in an interpreter of their own, with a time limit: a deadlock is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

#: What programs that train begin with: a seeded tagger, Trainers that shuffle nothing, and the losses of a run.
TRAINING = """
import sys, tempfile, threading
import torch
import hf_packfix
import transformers.trainer
from tests.support.oracle import PlainTagger, arguments, new_model, packed_batch, padded_batch, rows
from transformers import Trainer

torch.set_num_threads(1)
DATA = rows(9)
FOLDER = tempfile.mkdtemp()

def build(collate, cls=Trainer, model=None, epochs=2):
    class InOrder(cls):
        # Shuffling draws from the one generator of the process, which threads share.
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(DATA)
    return InOrder(model=model or new_model(PlainTagger), args=arguments(FOLDER, num_train_epochs=epochs),
                   train_dataset=DATA, eval_dataset=DATA, data_collator=collate)

def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

def close(found, expected):
    assert len(found) == len(expected) > 0, (found, expected)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
"""

#: What a program that has imported the Trainer ends with: a packed batch moves, and no patch is refused or pending.
TRAINS = """
from tests.support.packed_sequences import META, bare_trainer, some_packed
assert bare_trainer(META, Trainer)._prepare_input({"x": some_packed()})["x"].data.device == META
import hf_packfix
assert hf_packfix.is_enabled()
states = {p.state for p in hf_packfix.status().patches if not p.target.startswith("torch.nn.modules.rnn:")}
assert "applied" in states <= {"applied", "not-needed", "not-applicable"}, str(hf_packfix.status())
"""


def environment(*, measured: bool = False) -> dict[str, str]:
    """Return the environment variables of such a program."""
    # What most of these interpreters run is measured elsewhere, and starting them takes half as long again.
    env = {k: v for k, v in os.environ.items() if k != "HF_PACKFIX" and (measured or not k.startswith("COVERAGE"))}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return env | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def python(
    *arguments: object, limit: float = 240, measured: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter; ``env`` adds to :func:`environment`, other options are those of ``subprocess``."""
    options = {"capture_output": True, "text": True, "check": False} | options
    variables = environment(measured=measured) | options.pop("env", {})
    return subprocess.run([sys.executable, *map(str, arguments)], env=variables, timeout=limit, **options)


def execute(code: str, *, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code with these environment variables, and check its exit status."""
    result = python("-c", textwrap.dedent(code), env=variables, limit=300)
    assert result.returncode == status, result.stderr
    return result


def train(code: str) -> str:
    """Run code after :data:`TRAINING`, and return what it printed."""
    return execute(TRAINING + textwrap.dedent(code)).stdout
