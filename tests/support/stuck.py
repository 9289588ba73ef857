"""Run a program of several processes with a time limit; past it, each of them says where it is.

Any of them may be stuck: a worker, a data loader's process that a worker forked, or the launcher; at any time, from
the first import to the last destructor. So each is asked from outside, by a signal that is answered in the middle of
a lock. The output goes to files: a pipe would stay open as long as any process that inherited it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

__all__ = ["MESSAGE", "answer", "run"]

#: What the standard error of a program that was stuck contains.
MESSAGE = "stuck: not done after"

#: An environment variable, inherited by every process of a launch, also by one that has lost its parent.
_MARK = "HF_PACKFIX_TEST_LAUNCH"


def answer() -> None:
    """Let this process, and those that it forks, print the stacks of all threads when :func:`run` asks for them."""
    faulthandler.register(signal.SIGUSR1)


def run(
    command: Sequence[str], *, seconds: float, env: Mapping[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program and return its output; whatever it started is gone afterwards.

    Args:
        command: the program and its arguments.
        seconds: after which it is stuck. Its standard error then ends with :data:`MESSAGE`, a line for each of its
            processes, and the stacks of those that :func:`answer`, and its return code is -9.
        env: its environment.
        cwd: its folder.
    """
    mark = uuid.uuid4().hex
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        program = subprocess.Popen(command, cwd=cwd, env={**env, _MARK: mark}, stdout=out, stderr=err)
        try:
            program.wait(seconds)
        except subprocess.TimeoutExpired:
            _write(err, f"\n{MESSAGE} {seconds:g} seconds\n")
            for process in _processes(mark):
                _describe(process, err)
        finally:
            _end(mark)
            program.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess(command, program.returncode, *texts)


def _processes(mark: str) -> Iterator[psutil.Process]:
    """Yield the living processes of a launch, the oldest first."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _end(mark: str) -> None:
    """Kill the processes of a launch, and those that they start meanwhile, and return when none is left."""
    while living := list(_processes(mark)):
        for process in living:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)


def _describe(process: psutil.Process, file: IO[str]) -> None:
    """Write who a process is, what it waits for, and, if it can be had, where it is."""
    with contextlib.suppress(psutil.Error):
        waits = _read(process.pid, "wchan") or "?"
        line = f"{process.status()} in {waits}, {process.num_threads()} threads: {' '.join(process.cmdline())}"
        _write(file, f"\n--- process {process.pid}, started by {process.ppid()}, {line}\n")
        if (spy := shutil.which("py-spy")) is not None:  # sees the frames below Python, too
            subprocess.run([spy, "dump", "--native", "--pid", str(process.pid)], stdout=file, stderr=file, check=False)
        # Only a process that answers: any other would be ended by the signal.
        caught = next((line for line in _read(process.pid, "status").splitlines() if line.startswith("SigCgt")), "0 0")
        if int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1:
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)  # until it has printed, so that no two do at a time


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:  # gone, or no Linux
        return ""


def _write(file: IO[str], text: str) -> None:
    # At the end of the file, which the processes share, and at once.
    os.write(file.fileno(), text.encode())
