"""Run a program of several processes with a time limit; past it, each of them prints where it is, and ends."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

#: What the standard error of a program that was stuck contains.
MESSAGE = "Timeout ("

#: The environment variable with the limit.
_SECONDS = "HF_PACKFIX_TEST_SECONDS"


def answer() -> None:
    """Let this process print the stacks of all its threads and end, if :func:`run` has waited for too long."""
    faulthandler.dump_traceback_later(float(os.environ[_SECONDS]), exit=True)


def run(
    command: Sequence[str], *, seconds: float, env: Mapping[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program and return its output.

    After so many seconds it is stuck: its processes that have called :func:`answer` print :data:`MESSAGE` and their
    stacks, and end; 20 seconds later, the program is killed. The output goes to files: a pipe would stay open as long
    as any process that inherited it.
    """
    variables = {**env, _SECONDS: str(seconds)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        program = subprocess.Popen(command, cwd=cwd, env=variables, stdout=out, stderr=err, start_new_session=True)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(seconds + 20)
                if program.returncode:  # the others are about to print theirs
                    _wait_for_group(program.pid, 5)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess(command, program.returncode, *texts)


def _wait_for_group(group: int, seconds: float) -> None:
    """Return when no process is left in a group, or after so many seconds."""
    end = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.05)
