"""``hf-packfix doctor``: does the plugin work here, and if not, why?"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from hf_packfix._warnings import in_a_line
from hf_packfix.activation.control import status
from hf_packfix.activation.environment import FAST_RNN_VARIABLE, VARIABLE, misunderstood, raw, requested
from hf_packfix.activation.status_report import Status
from hf_packfix.commands.run import replace_first_path
from hf_packfix.commands.trainers import handled_apart, load_lazy, overridden_methods, patched_methods, try_trainer
from hf_packfix.patches import FAST_RNN, PATCHES

STARTUP_FILES = ("hf_packfix_auto.pth", "hf_packfix_auto.start", "_hf_packfix_boot.py")


@dataclasses.dataclass(kw_only=True)
class Report:
    """What was found.

    Attributes:
        startup_files: for each path "intact", "changed" or "missing: ...".
        trainers: for each Trainer subclass of the imported modules, the patched methods it overrides, and whether
            each of them calls ``super()``.
        selftest: of a packed batch through the Trainer: "passed", "skipped: ..." or "failed: ...".
        models: of every check of ``hf_packfix.models``: "passed" or "failed: ..."; empty if skipped.
        problems: what keeps the plugin from working; empty if it is healthy.
        warnings: what may surprise a user.
    """

    healthy: bool = False
    python: str = f"{platform.python_version()} ({sys.executable})"
    platform: str = platform.platform()
    variable: str | None
    fast_rnn_variable: str | None
    fast_rnn: bool = False
    startup_files: dict[str, str]
    status: Status
    trainers: dict[str, dict[str, bool]] = dataclasses.field(default_factory=dict)
    selftest: str = "skipped: hf_packfix is not enabled"
    models: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: list[str]
    warnings: list[str] = dataclasses.field(default_factory=list)


def run(modules: Sequence[str], *, as_json: bool, verbose: bool = False) -> int:
    """Print a report.

    Args:
        modules: names of modules to import and to search for Trainer subclasses.
        as_json: print JSON instead of text.
        verbose: list every patch, check and file in the text.

    Returns:
        The exit status: 0 if the plugin is healthy, 1 if it is not, 3 if ``HF_PACKFIX`` keeps it off.
    """
    if status().enabled or modules:
        print("hf-packfix doctor: imports transformers and trains a step, in about 10 seconds", file=sys.stderr)
    # What the modules print is no part of the report.
    with contextlib.redirect_stdout(sys.stderr):
        report = examine(modules)
    print(json.dumps(dataclasses.asdict(report), indent=2) if as_json else _text(report, verbose))
    if report.problems:
        return 1
    return 0 if report.healthy else 3


def examine(modules: Sequence[str]) -> Report:
    """Look at everything; imports transformers, and the given modules."""
    asks = requested()
    report = Report(
        variable=raw(),
        fast_rnn_variable=raw(FAST_RNN_VARIABLE),
        startup_files=dict(_startup_files()),
        status=status(),
        problems=[text for text in map(misunderstood, (VARIABLE, FAST_RNN_VARIABLE)) if text],
    )
    problems, warnings = report.problems, report.warnings
    broken = [f"{path} is {state}" for path, state in report.startup_files.items() if state != "intact"]
    if broken and asks in ("on", "force"):
        problems.append(
            f"{VARIABLE} is on, but the start-up files are not all there, so that it may do nothing in a program that "
            f"does not import hf_packfix ({'; '.join(broken)}); reinstall hf-packfix, or use: hf-packfix run"
        )
    elif broken:
        warnings.append(f"{VARIABLE}=1 may not work here: {'; '.join(broken)}")

    imported = True
    if report.status.enabled or modules:
        try:
            importlib.import_module("transformers.trainer_seq2seq")  # so that its patches are not pending
        except Exception as error:
            problems.append(f"the Trainer cannot be imported: {in_a_line(error)}")
            report.selftest = "skipped: the Trainer cannot be imported"
            modules, imported = (), False
    if status().enabled and imported:
        failure = try_trainer()
        report.selftest = "passed" if failure is None else f"failed: {failure}"
        if failure is not None:
            problems.append(f"the self-test failed: {failure}")
        report.models = _check_models()
        results = report.models.items()
        problems += [f"hf_packfix.models, {name}: {result}" for name, result in results if result != "passed"]
    if modules:
        replace_first_path(os.getcwd())  # as for `hf-packfix run -m`
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
        report.trainers.update(found)
        warnings += handled_apart(name)
    for method, patch in patched_methods().items():
        without = [name for name, methods in report.trainers.items() if methods.get(method) is False]
        if without:
            warnings.append(
                f"{method} does not call super() in {', '.join(without)}, so the patch of Trainer.{method} does not "
                f"act there. Without the patch: {patch.problem}. With it: {patch.fix}."
            )

    report.status = status()
    if not report.status.enabled and asks not in ("off", None):  # None: said above
        problems.append(report.status.reason)
    for patch, stands in zip(PATCHES + FAST_RNN, report.status.patches, strict=True):
        if text := patch.deviation(stands):
            (warnings if stands.state == "applied" else problems).append(text)
    report.fast_rnn = all(stands.state == "applied" for stands in report.status.patches[len(PATCHES) :])
    report.healthy = report.status.enabled and not problems
    return report


def _check_models() -> dict[str, str]:
    """Return the result of each check of the recurrent models, with the cell that has the most states."""
    try:
        from hf_packfix.models.selftest import selftest  # here: it needs all of transformers

        return {name: f"failed: {failure}" if failure else "passed" for name, failure in selftest(["lstm"]).items()}
    except Exception as error:
        return {"import": f"failed: {in_a_line(error)}"}


def _startup_files() -> Iterator[tuple[str, str]]:
    """Yield the path of every start-up file and its state, from what the installation recorded of it."""
    try:
        recorded = {str(file): file for file in metadata.files("hf-packfix") or ()}
    except metadata.PackageNotFoundError:
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


#: The effect of ``HF_PACKFIX`` on a program, by what it asks for.
EFFECTS: dict[str | None, str] = {
    "": "only a program that imports hf_packfix is patched, as this command is; to see what is patched in one: "
    "hf-packfix run --status train.py",
    "on": "every program that imports transformers is patched",
    "force": "every program that imports transformers is patched, even if a version is not supported",
    "off": "no program is patched",
    None: "nothing is patched",
}


def _set(variable: str | None) -> str:
    return "unset" if variable is None else repr(variable)


def _text(report: Report, verbose: bool) -> str:
    off = not (report.status.enabled or report.problems)
    lines = [
        "healthy" if report.healthy else f"off: {report.status.reason}" if off else "not healthy",
        *(f"problem: {text}" for text in report.problems),
        *(f"warning: {text}" for text in report.warnings),
        "",
        f"Python {report.python} on {report.platform}",
        f"{VARIABLE} is {_set(report.variable)}: {EFFECTS[requested()]}",
        f"{FAST_RNN_VARIABLE} is {_set(report.fast_rnn_variable)}: nn.LSTM, nn.GRU and nn.RNN "
        + ("use hf_packfix.rnn on packed data" if report.fast_rnn else "are torch's own"),
        *(str(report.status).splitlines() if verbose else report.status.summary()),
        f"self-test (a packed batch through train and evaluate): {report.selftest}",
    ]
    passed = sum(result == "passed" for result in report.models.values())
    if verbose:
        lines += [f"self-test of hf_packfix.models ({name}): {result}" for name, result in report.models.items()]
        lines += [f"start-up file, {state}: {path}" for path, state in report.startup_files.items()]
    else:
        lines += [f"self-test of hf_packfix.models: {passed} of {len(report.models)} passed"] * bool(report.models)
        lines += [f"start-up files: {', '.join(dict.fromkeys(report.startup_files.values()))}"]
    if report.trainers:
        lines += ["", "Trainer subclasses, and the patched methods they override:"]
        for name, methods in report.trainers.items():
            listed = [f"{key} ({'calls' if calls else 'does not call'} super())" for key, calls in methods.items()]
            lines.append(f"  {name}: {', '.join(listed) or 'none'}")
    more = "" if verbose else "every patch and file: hf-packfix doctor -v; "
    return "\n".join([*lines, "", f"{more}errors and their cures: hf-packfix docs troubleshooting"])
