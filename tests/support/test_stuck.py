"""What is left of a launch that was stuck: the stacks of every process, forked ones included, and no process."""

from __future__ import annotations

import os
import sys
import time

import psutil

from tests.support import stuck
from tests.support.installed import ROOT

#: A process that forks another one while a thread of its own holds a lock: the classic.
DEADLOCK = """
import multiprocessing, os, threading
from tests.support import stuck

stuck.answer()
lock = threading.Lock()
lock.acquire()

def in_the_forked_process():
    lock.acquire()

forked = multiprocessing.get_context("fork").Process(target=in_the_forked_process)
forked.start()
print("before", flush=True)

def in_the_first_process():
    forked.join()

in_the_first_process()
"""

#: One that leaves a process behind, which keeps standard output open.
ORPHAN = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True).pid)
sys.exit(3)
"""


def run(program: str, seconds: float):
    return stuck.run([sys.executable, "-c", program], seconds=seconds, env=dict(os.environ), cwd=ROOT)


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_every_process_says_where_it_is():
    result = run(DEADLOCK, seconds=4)
    assert result.returncode == -9
    assert result.stdout == "before\n"
    assert f"{stuck.MESSAGE} 4 seconds" in result.stderr
    first, forked = result.stderr.split("--- process ")[1:]
    assert "in in_the_first_process" in first
    assert "in in_the_forked_process" in forked
    assert not any(is_alive(int(part.split(",")[0])) for part in (first, forked))


def test_what_is_left_behind_is_ended_and_not_waited_for():
    start = time.monotonic()
    result = run(ORPHAN, seconds=50)
    assert time.monotonic() - start < 30
    assert (result.returncode, result.stderr) == (3, "")
    assert not is_alive(int(result.stdout))


def test_a_process_that_does_not_answer_is_named():
    result = run("import time; time.sleep(60)", seconds=1)
    assert result.returncode == -9
    assert "import time; time.sleep(60)" in result.stderr.split("--- process ")[1]
