"""``hf-packfix doctor``: does the plugin work here, and if not, why?"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import importlib
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hf_packfix._warnings import in_a_line
from hf_packfix.activation import Status, difference, status
from hf_packfix.activation.environment import ACCEPTED, FAST_RNN_VARIABLE, VARIABLE, fast_rnn, switch, value
from hf_packfix.commands.selftest import selftest
from hf_packfix.commands.trainers import cuts_of_batches, handled_apart, load_lazy, overridden_methods, patched_methods
from hf_packfix.patches import FAST_RNN, PATCHES

__all__ = ["run"]

STARTUP_FILES = ("hf_packfix_auto.pth", "hf_packfix_auto.start", "_hf_packfix_boot.py")


@dataclasses.dataclass
class Report:
    """What was found.

    Attributes:
        python: version and executable.
        platform: the operating system.
        variable: the value of ``HF_PACKFIX``; None where it is unset.
        fast_rnn_variable: the value of ``HF_PACKFIX_FAST_RNN``; None where it is unset.
        fast_rnn: whether ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` use ``hf_packfix.rnn`` on packed data on a CPU.
        startup_files: for each start-up file its path, and "intact", "changed" or "missing".
        status: where the plugin and each patch stand.
        trainers: for each Trainer subclass of the imported modules, the patched methods it overrides, and whether
            each of them calls ``super()``.
        selftest: of a packed batch through the Trainer: "passed", "skipped: ..." or "failed: ...".
        models: of every check of ``hf_packfix.models``: "passed" or "failed: ..."; empty if skipped.
        problems: what keeps the plugin from working; empty if it is healthy.
        warnings: what may surprise a user.
    """

    healthy: bool
    python: str
    platform: str
    variable: str | None
    fast_rnn_variable: str | None
    fast_rnn: bool
    startup_files: dict[str, str]
    status: Status
    trainers: dict[str, dict[str, bool]]
    selftest: str
    models: dict[str, str]
    problems: list[str]
    warnings: list[str]


def run(modules: Sequence[str], *, as_json: bool) -> int:
    """Print a report.

    Args:
        modules: names of modules to import and to search for Trainer subclasses.
        as_json: print JSON instead of text.

    Returns:
        The exit status: 0 where the plugin is healthy or off by the user's choice, 1 where it is not.
    """
    # What the modules print is no part of the report.
    with contextlib.redirect_stdout(sys.stderr):
        report = examine(modules)
    print(json.dumps(dataclasses.asdict(report), indent=2) if as_json else _text(report))
    return 1 if report.problems else 0


def examine(modules: Sequence[str]) -> Report:
    """Look at everything; imports transformers, and the given modules."""
    problems: list[str] = []
    warnings: list[str] = []
    asks = switch()
    if asks is None:
        accepted = ", ".join(word for words in ACCEPTED.values() for word in words)
        problems.append(f"{VARIABLE}={value()!r} is not one of: {accepted}")
    if fast_rnn() is None:
        accepted = ", ".join(ACCEPTED["on"] + ACCEPTED["off"])
        problems.append(f"{FAST_RNN_VARIABLE}={value(FAST_RNN_VARIABLE)!r} is not one of: {accepted}")

    files = dict(_startup_files())
    broken = [f"{path} is {state}" for path, state in files.items() if state != "intact"]
    if broken and asks in ("on", "force"):
        problems.append(
            f"{VARIABLE} is on, but the start-up files are not all there, so that it may do nothing in a program that "
            f"does not import hf_packfix ({'; '.join(broken)}); reinstall hf-packfix, or use: hf-packfix run"
        )
    elif broken:
        warnings.append(f"{VARIABLE}=1 may not work here: {'; '.join(broken)}")

    imported = True
    if status().enabled or modules:
        try:
            importlib.import_module("transformers.trainer_seq2seq")  # so that its patches are not pending
        except Exception as error:
            problems.append(f"the Trainer cannot be imported: {in_a_line(error)}")
            modules, imported = (), False
    tested = "skipped: the Trainer cannot be imported" if not imported else "skipped: hf_packfix is not enabled"
    models: dict[str, str] = {}
    if status().enabled and imported:
        failure = selftest()
        tested = "passed" if failure is None else f"failed: {failure}"
        if failure is not None:
            problems.append(f"the self-test failed: {failure}")
        models = _check_models()
        problems += [f"hf_packfix.models, {name}: {result}" for name, result in models.items() if result != "passed"]
    trainers: dict[str, dict[str, bool]] = {}
    for name in modules:
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a script may end when it is imported
            problems.append(f"--import {name}: {type(error).__name__}: {error}")
            continue
        warnings += load_lazy(module)
        found = overridden_methods(name)
        if not found:
            warnings.append(f"--import {name}: found no Trainer subclass; name the module that defines it")
        trainers.update(found)
        warnings += [*handled_apart(name), *cuts_of_batches(name)]
    for method, fix in patched_methods().items():
        without = [name for name, methods in trainers.items() if methods.get(method) is False]
        if without:
            warnings.append(
                f"{method} does not call super() in {', '.join(without)}, so the patch of Trainer.{method} does not "
                f"act there. What it does: {fix}"
            )

    now = status()
    if not now.enabled and asks not in ("off", None):  # None: said above
        problems.append(now.reason)
    layers = {patch.target for patch in FAST_RNN}
    patches = {patch.target: patch for patch in (*PATCHES, *FAST_RNN)}
    for stands in now.patches:
        text = difference(patches[stands.target], stands)
        if text:
            (warnings if stands.state == "applied" else problems).append(text)
    return Report(
        healthy=not problems,
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        variable=value(),
        fast_rnn_variable=value(FAST_RNN_VARIABLE),
        fast_rnn=all(stands.state == "applied" for stands in now.patches if stands.target in layers),
        startup_files=files,
        status=now,
        trainers=trainers,
        selftest=tested,
        models=models,
        problems=problems,
        warnings=warnings,
    )


def _check_models() -> dict[str, str]:
    """Return the result of each check of the recurrent models."""
    try:
        # Imported here: they need all of transformers.
        from hf_packfix.models.selftest import selftest

        return {name: f"failed: {failure}" if failure else "passed" for name, failure in selftest().items()}
    except Exception as error:
        return {"import": f"failed: {in_a_line(error)}"}


def _startup_files() -> Iterator[tuple[str, str]]:
    """Yield the path of every start-up file and its state, from what the installation recorded of it."""
    import importlib_metadata

    try:
        files = importlib_metadata.files("hf-packfix") or ()
        recorded = {str(file): file for file in files}
    except importlib_metadata.PackageNotFoundError:
        recorded = {}
    for name in STARTUP_FILES:
        file = recorded.get(name)
        if file is None or file.hash is None:
            yield name, "missing: this copy of hf_packfix was not installed"
            continue
        path = Path(str(file.locate()))
        try:
            digest = hashlib.new(file.hash.mode, path.read_bytes()).digest()
        except OSError as error:
            yield str(path), f"missing: {error.strerror}"
            continue
        # RECORD holds digests in URL-safe base64 without padding.
        intact = base64.urlsafe_b64encode(digest).decode().rstrip("=") == file.hash.value
        yield str(path), "intact" if intact else "changed"


def _set(variable: str | None) -> str:
    return "unset" if variable is None else repr(variable)


def _text(report: Report) -> str:
    lines = ["healthy" if report.healthy else "not healthy"]
    lines += [f"problem: {text}" for text in report.problems]
    lines += [f"warning: {text}" for text in report.warnings]
    lines += [
        "",
        f"Python {report.python} on {report.platform}",
        f"{VARIABLE} is {_set(report.variable)}",
        f"{FAST_RNN_VARIABLE} is {_set(report.fast_rnn_variable)}: nn.LSTM, nn.GRU and nn.RNN "
        + ("use hf_packfix.rnn on packed data on a CPU" if report.fast_rnn else "are torch's own"),
        "",
        str(report.status),
        "",
        f"self-test (a packed batch through train and evaluate): {report.selftest}",
        *(f"self-test of hf_packfix.models ({name}): {result}" for name, result in report.models.items()),
        "",
        "start-up files:",
        *(f"  {state:<10} {path}" for path, state in report.startup_files.items()),
    ]
    if report.trainers:
        lines += ["", "Trainer subclasses, and the patched methods they override:"]
        for name, methods in report.trainers.items():
            told = [f"{key} ({'calls' if calls else 'does not call'} super())" for key, calls in methods.items()]
            lines.append(f"  {name}: {', '.join(told) or 'none'}")
    return "\n".join(lines)
