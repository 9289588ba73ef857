"""A launch that is stuck ends, and says where each of its processes was."""

from __future__ import annotations

import os
import sys
import time

from tests.support import stuck
from tests.support.installed import ROOT

DEADLOCK = """
import os, signal
from tests.support import stuck

def in_the_first_process():
    signal.pause()

def in_the_second_process():
    signal.pause()

second = os.fork()
stuck.answer()
print("before", flush=True)
in_the_first_process() if second else in_the_second_process()
"""


def test_every_process_says_where_it_is():
    start = time.monotonic()
    result = stuck.run([sys.executable, "-c", DEADLOCK], seconds=4, env=dict(os.environ), cwd=ROOT)
    assert time.monotonic() - start < 20
    assert (result.returncode, result.stdout) == (1, "before\nbefore\n")
    assert result.stderr.count(stuck.MESSAGE) == 2
    assert "in in_the_first_process" in result.stderr
    assert "in in_the_second_process" in result.stderr
