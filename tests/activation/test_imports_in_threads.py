"""Threads that import what is patched while others turn the plugin on; each program in an interpreter of its own."""

from __future__ import annotations

import pytest

from tests.support.programs import TRAINS
from tests.support.programs import run as run_program

pytestmark = pytest.mark.slow  # starts many processes

#: A deadlock ends the program, and shows where every thread stands.
BEGIN = """
import faulthandler, sys, threading, time
faulthandler.dump_traceback_later(60, exit=True)

def together(*functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
"""


def run(code: str) -> None:
    result = run_program(BEGIN + code)
    assert result.returncode == 0, result.stderr


def test_enabling_while_another_thread_imports_a_module():
    run(
        """
import wrapt
importing = threading.Event()

def last_line(module):
    importing.set()
    time.sleep(1)

# Before ours: the thread that enables finds the class, and its probe waits for the end of the import.
wrapt.register_post_import_hook(last_line, "transformers.feature_extraction_utils")
import torch, hf_packfix

def enable():
    assert importing.wait(30)
    hf_packfix.enable()

def load():
    import transformers.feature_extraction_utils

together(load, enable)
from transformers import Seq2SeqTrainer, Trainer
"""
        + TRAINS
    )


def test_enabling_again_and_again_while_another_thread_imports_the_trainer():
    run(
        """
import torch, hf_packfix
through = threading.Event()

def enable():
    while not through.is_set():
        hf_packfix.enable()
        hf_packfix.status()
        time.sleep(1e-3)

def load():
    try:
        import transformers.trainer_seq2seq
    finally:
        through.set()

together(load, enable)
from transformers import Seq2SeqTrainer, Trainer
"""
        + TRAINS
    )


def test_a_first_activation_while_another_thread_imports_the_trainer():
    run(
        """
import torch, transformers

def load():
    import transformers.trainer

def activate():
    while "transformers.trainer" not in sys.modules:
        time.sleep(1e-4)
    assert not hasattr(sys.modules["transformers.trainer"], "Trainer")
    import hf_packfix

together(load, activate)
from transformers import Seq2SeqTrainer, Trainer
"""
        + TRAINS
    )


def test_probes_wait_for_the_end_of_the_import_of_torch():
    run(
        """
import wrapt

def fixed_upstream(module):
    def _apply_to_tensors(fn, container):
        return container._replace(data=fn(container.data))
    module._apply_to_tensors = _apply_to_tensors

wrapt.register_post_import_hook(fixed_upstream, "torch.distributed.utils")
import hf_packfix
import torch
import torch.distributed.utils
states = {patch.target: patch.state for patch in hf_packfix.status().patches}
assert states["torch.distributed.utils:_apply_to_tensors"] == "not-needed", states
"""
    )
