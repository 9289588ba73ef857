"""Threads that toggle while others train or import, and processes that fork at the worst moment."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from tests.support.interpreters import TRAINS, execute, python, train

pytestmark = pytest.mark.slow  # starts many processes

THREADS = """
from concurrent.futures import ThreadPoolExecutor

def together(togglers, toggle, trainers):
    # Toggles from `togglers` threads until all trainers are through; returns their losses and the toggles.
    sys.setswitchinterval(1e-4)  # as many switches between threads as there can be
    over = threading.Event()

    def keep_toggling():
        toggled = 0
        while not over.is_set():
            toggle()
            toggled += 1
        return toggled

    with ThreadPoolExecutor(togglers + len(trainers)) as pool:
        toggling = [pool.submit(keep_toggling) for _ in range(togglers)]
        try:
            found = [*pool.map(losses, trainers)]
        finally:
            over.set()
    return found, sum(future.result() for future in toggling)

def targets():
    from hf_packfix.patches import PATCHES
    from hf_packfix.engine.targets import resolve
    return {p.target: resolve(p.module, p.path)[1] for p in PATCHES}

expected = losses(build(padded_batch, epochs=6))
wrapped = targets()
hf_packfix.disable()
originals = targets()
hf_packfix.enable()
changed = [name for name in wrapped if wrapped[name] is not originals[name]]
assert len(changed) > 20, changed
"""


#: What is trained, and what other threads call meanwhile.
TOGGLES = {
    "padded": """
def toggle():
    hf_packfix.enable()
    hf_packfix.disable()
""",
    "packed": """
def toggle():
    hf_packfix.enable()
    assert hf_packfix.is_enabled()
    assert hf_packfix.status().enabled
""",
}


@pytest.mark.parametrize("layout", TOGGLES)
def test_training_does_not_notice_others_toggling(layout):
    train(
        THREADS
        + TOGGLES[layout]
        + f"""
alone = losses(build({layout}_batch, epochs=6))
close(alone, expected)
found, toggles = together(16, toggle, [build({layout}_batch, epochs=6) for _ in range(4)])
assert toggles >= 16, toggles
for each in found:
    assert each == alone, (each, alone)  # to the last bit
hf_packfix.disable()
assert targets() == originals
assert not hf_packfix.is_enabled()
hf_packfix.enable()
assert targets() == wrapped
assert hf_packfix.is_enabled()
close(losses(build(packed_batch, epochs=6)), expected)
"""
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_another_thread_holds_the_lock():
    printed = train(
        """
        import multiprocessing
        from hf_packfix.activation.control import state
        held, done = threading.Event(), threading.Event()
        def hold():
            with state.lock:
                held.set()
                done.wait()
        threading.Thread(target=hold, daemon=True).start()
        held.wait()
        def child():
            hf_packfix.status()
            hf_packfix.enable()
            hf_packfix.disable()
            assert not hf_packfix.is_enabled()
            hf_packfix.enable()
            losses(build(packed_batch))
        process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
        process.start()
        process.join(60)
        done.set()
        assert process.exitcode == 0, process.exitcode
        assert hf_packfix.is_enabled()  # the parent is as it was
        print("done")
        """
    )
    assert printed.endswith("done\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_children_forked_while_threads_toggle_can_toggle():
    train(
        THREADS
        + """
import multiprocessing
stop = threading.Event()
def keep_toggling():
    while not stop.is_set():
        hf_packfix.enable()
        hf_packfix.disable()
threads = [threading.Thread(target=keep_toggling, daemon=True) for _ in range(4)]
for thread in threads:
    thread.start()

def child():  # the fork may have caught a thread in the middle of a change
    hf_packfix.enable()
    assert hf_packfix.is_enabled()
    assert all(targets()[name].__wrapped__ is originals[name] for name in changed)
    hf_packfix.disable()
    assert targets() == originals

for _ in range(30):
    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0, process.exitcode
stop.set()
for thread in threads:
    thread.join()
"""
    )


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_child_trains_on_packed_sequences(tmp_path, method):
    # From a file, which `spawn` imports again: that is where the child is activated.
    program = tmp_path / "program.py"
    program.write_text(
        """
import sys
import hf_packfix
import multiprocessing, torch
from tests.support.oracle import PlainTagger, packed_batch, padded_batch, rows, train

def child(queue, expected, folder):
    torch.set_num_threads(1)
    assert hf_packfix.is_enabled()
    run = train(folder, PlainTagger, rows(6), packed_batch, num_train_epochs=1)
    torch.testing.assert_close(run.losses, expected, rtol=2e-5, atol=2e-5)
    queue.put(len(run.losses))

if __name__ == "__main__":
    folder, method = sys.argv[1:]
    torch.set_num_threads(1)
    expected = train(folder, PlainTagger, rows(6), padded_batch, num_train_epochs=1).losses
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue, expected, folder))
    process.start()
    process.join(200)
    assert process.exitcode == 0, process.exitcode
    assert queue.get() == len(expected) == 2
"""
    )
    # Of its own, so that a hanging child is a failure and not a hanging test.
    result = python(program, tmp_path, method)
    assert result.returncode == 0, result.stderr


# --- imports in threads ---------------------------------------------------------------------------------

#: A deadlock ends the program, and shows where every thread stands.
BEGIN = """
import faulthandler, sys, threading, time
faulthandler.dump_traceback_later(60, exit=True)

def together(*functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
"""


IMPORTS = {
    # Before ours: the thread that enables finds the class, and its probe waits for the end of the import.
    "enabling at the last line": """
import wrapt
importing = threading.Event()

def last_line(module):
    importing.set()
    time.sleep(1)

wrapt.register_post_import_hook(last_line, "transformers.feature_extraction_utils")
import torch, hf_packfix

def turn_on():
    assert importing.wait(30)
    hf_packfix.enable()

def load():
    import transformers.feature_extraction_utils
""",
    "enabling again and again": """
import torch, hf_packfix
through = threading.Event()

def turn_on():
    while not through.is_set():
        hf_packfix.enable()
        hf_packfix.status()
        time.sleep(1e-3)

def load():
    try:
        import transformers.trainer_seq2seq
    finally:
        through.set()
""",
    "a first activation": """
import torch, transformers

def load():
    import transformers.trainer

def turn_on():
    while "transformers.trainer" not in sys.modules:
        time.sleep(1e-4)
    assert not hasattr(sys.modules["transformers.trainer"], "Trainer")
    import hf_packfix
""",
}


@pytest.mark.parametrize("when", IMPORTS)
def test_turning_on_while_another_thread_imports_leaves_no_patch_out(when):
    end = "together(load, turn_on)\nfrom transformers import Seq2SeqTrainer, Trainer\n"
    execute(BEGIN + IMPORTS[when] + end + TRAINS)


def test_probes_wait_for_the_end_of_the_import_of_torch():
    execute(
        BEGIN
        + """
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
