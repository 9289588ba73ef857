"""Programs that train for real, each in an interpreter of its own, with a time limit: a deadlock is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: What the programs begin with: a seeded tagger, Trainers that shuffle nothing, and the losses of a run.
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


def environment() -> dict[str, str]:
    """Return the environment variables of such a program."""
    # Unmeasured: what these interpreters run is measured elsewhere, and starting them takes half as long again.
    env = {k: v for k, v in os.environ.items() if k != "HF_PACKFIX" and not k.startswith("COVERAGE")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return env | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(code: str, *, limit: float = 240) -> str:
    """Run a program after :data:`TRAINING`; see :func:`interpret`."""
    return interpret("-c", TRAINING + textwrap.dedent(code), limit=limit)


def interpret(*arguments: str, limit: float = 240) -> str:
    """Start an interpreter and return what it printed; fail if it fails, or takes too many seconds."""
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=limit,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
