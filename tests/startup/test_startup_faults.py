"""Faults at start-up, injected into a real installation: the program must run as if we were not there.

What is damaged is the package itself, what it depends on, the metadata that it reads, and transformers.
``tests/startup/test_startup.py`` damages the start-up files.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys

import pytest

from hf_packfix.activation.versions import NEWEST_TESTED
from tests.support.installed import Environment

pytestmark = pytest.mark.slow  # starts many processes

METADATA = f"Metadata-Version: 2.1\nName: transformers\nVersion: {NEWEST_TESTED['transformers']}\n"
DIST_INFO = f"transformers-{NEWEST_TESTED['transformers']}.dist-info"
# The exit status is one that nobody else has.
PROGRAM = "import transformers, sys; print('ran'); sys.exit(7)"
RAN = ("ran\n", 7)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("venv") / "venv").share_packages().unpack()
    for link in (environment.site.parent / "shared").glob("transformers*"):
        link.unlink()
    # A transformers of a tested version, with an empty Trainer, in the place of the real one.
    environment.write("transformers/__init__.py", "")
    environment.write("transformers/trainer.py", "class Trainer: pass\n")
    environment.write(f"{DIST_INFO}/METADATA", METADATA)
    return environment


@pytest.fixture
def environment(pristine):
    """The installation, put back afterwards to what it was."""
    saved = pristine.site.parent / "saved"
    shutil.copytree(pristine.site, saved, ignore=shutil.ignore_patterns("__pycache__"))
    yield pristine
    shutil.rmtree(pristine.site)
    saved.rename(pristine.site)


def without_privileges():
    """Take the right to read every file from root, for a child that is about to start."""
    prctl, pr_capbset_drop = ctypes.CDLL(None).prctl, 24
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        prctl(pr_capbset_drop, capability, 0, 0, 0)


def check(environment, message, program=PROGRAM, expected=RAN, **options):
    """Run a program with the plugin on, and check what it prints, its exit status, and the one line on stderr.

    ``message`` is a pattern for that line; None for no line.
    """
    result = environment.run("-c", program, variable="1", preexec_fn=without_privileges, **options)
    assert (result.stdout, result.returncode) == expected, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == (message is not None), result.stderr
    if message is not None:
        assert lines[0].startswith("hf_packfix: ")
        assert re.search(message, lines[0]), lines[0]
    return result


def explicit(environment):
    """Return the last line of what an import of the user's own says; empty where it succeeds."""
    result = environment.run("-c", "import hf_packfix", preexec_fn=without_privileges)
    assert result.stdout == ""
    return result.stderr.splitlines()[-1] if result.returncode else ""


def test_a_whole_installation_says_nothing(environment):
    check(environment, None)
    assert explicit(environment) == ""


# --- the package ----------------------------------------------------------------------------------------

FILES = ["__init__.py", "_version.py", "activation/control.py", "engine/patch.py", "patches/transformers_trainer.py"]
#: What is done to a file, and what is then raised.
DAMAGES = {
    "missing": (lambda path: path.unlink(), "(ModuleNotFound|Import)Error"),
    "empty": (lambda path: path.write_bytes(b""), "(Import|Attribute)Error"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes().rpartition(b")")[0]), "(Syntax|Import)Error"),
    "not UTF-8": (lambda path: path.write_bytes(path.read_bytes() + b"x = '\xff'\n"), "SyntaxError"),
    "UTF-16": (lambda path: path.write_text(path.read_text(), encoding="utf-16"), "SyntaxError"),
    "zeros": (lambda path: path.write_bytes(bytes(4096)), "SyntaxError"),
    "unreadable": (lambda path: path.chmod(0), "PermissionError"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_the_package_is_one_line_and_the_program_runs(environment, name, damage):
    harm, error = DAMAGES[damage]
    harm(environment.site / "hf_packfix" / name)
    check(environment, f"not activated: {error}: ")
    # Where the file that says what the package is has gone, none of our code is there to say it.
    if (name, damage) not in {("__init__.py", "missing"), ("__init__.py", "empty")}:
        assert re.match(error, explicit(environment))


def half_removed(environment):
    for path in (environment.site / "hf_packfix").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def garbage_in_cache(environment):
    """Compile, and damage the byte code of ``activation/control.py`` behind its header."""
    environment.run("-c", "import hf_packfix", env={"PYTHONDONTWRITEBYTECODE": ""})
    (cached,) = (environment.site / "hf_packfix/activation/__pycache__").glob("control.*.pyc")
    cached.write_bytes(cached.read_bytes()[:16] + b"\xff" * 64)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (half_removed, "ImportError: cannot import name '__version__' from 'hf_packfix'"),
        (lambda e: shutil.rmtree(e.site / "hf_packfix"), "No module named 'hf_packfix'"),
        (lambda e: shutil.rmtree(e.site / "hf_packfix/patches"), "No module named 'hf_packfix.patches'"),
        (lambda e: (e.site / "hf_packfix").chmod(0), "Error: "),
        (garbage_in_cache, "not activated: "),
    ],
    ids=["half removed", "gone", "without patches", "unreadable folder", "damaged byte code"],
)
def test_a_damaged_folder_of_the_package_is_one_line_and_the_program_runs(environment, harm, message):
    harm(environment)
    try:
        check(environment, message)
    finally:
        (environment.site / "hf_packfix").exists() and (environment.site / "hf_packfix").chmod(0o755)


def test_no_place_for_byte_code_is_no_fault(environment):
    for folder in (environment.site, environment.site / "hf_packfix", environment.site / "hf_packfix/patches"):
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
        (folder / "__pycache__").write_text("a file, where Python wants a folder")
    check(environment, None)
    check(environment, None, env={"PYTHONPYCACHEPREFIX": "/dev/full"})


@pytest.mark.parametrize("name", ["_hf_packfix_boot.py", "hf_packfix_auto.pth"])
def test_an_unreadable_start_up_file_stops_nothing(environment, name):
    (environment.site / name).chmod(0)
    # Here Python itself reports, in its own words, what it cannot read.
    result = environment.run("-c", PROGRAM, variable="1", preexec_fn=without_privileges)
    assert (result.stdout, result.returncode) == RAN
    assert ("PermissionError" in result.stderr) == (name == "_hf_packfix_boot.py")


# --- what it depends on ---------------------------------------------------------------------------------

DEPENDENCIES = [
    *(
        (
            name,
            f'raise ModuleNotFoundError("No module named {name!r}")',
            f"but {name.replace('_', '-')} is not installed",
        )
        for name in ("wrapt", "importlib_metadata", "packaging")
    ),
    ("wrapt", "raise RuntimeError('broken')", "RuntimeError: broken"),
    ("wrapt", "raise SystemExit(3)", "SystemExit: 3"),
    ("wrapt", "", "register_post_import_hook"),
    ("wrapt", "def register_post_import_hook(hook, name): hook.__name__", "AttributeError: 'str' object"),
    ("importlib_metadata", "1 / 0", "ZeroDivisionError"),
    ("importlib_metadata", "class PackageNotFoundError(Exception): pass", "has no attribute 'version'"),
    ("packaging", "", "No module named 'packaging.version'"),
    ("packaging", "raise OSError(5, 'broken disk')", "broken disk"),
]


@pytest.mark.parametrize(("name", "code", "message"), DEPENDENCIES)
def test_a_broken_dependency_is_one_line_and_the_program_runs(environment, name, code, message):
    environment.write(f"{name}/__init__.py", code)
    check(environment, message)
    if "SystemExit" not in code:
        assert message in explicit(environment)


NOT_READ = "hf_packfix needs transformers >= 4.46, but transformers is not installed, or its metadata is damaged"
#: What becomes of the file METADATA, and whether the version can still be read.
METADATA_FAULTS = {
    "missing": (lambda path: path.unlink(), False),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), False),
    "unreadable": (lambda path: path.chmod(0), False),
    "empty": (lambda path: path.write_bytes(b""), False),
    "zeros": (lambda path: path.write_bytes(bytes(512)), False),
    "not UTF-8": (lambda path: path.write_bytes(METADATA.encode() + b"Summary: \xff\n"), False),
    "without a version": (lambda path: path.write_text("Metadata-Version: 2.1\nName: transformers\n"), False),
    # A version that says nothing is no reason to refuse: the probes decide.
    "a version that is none": (lambda path: path.write_text(METADATA.rpartition(" ")[0] + " unknown!\n"), True),
    "an empty version": (lambda path: path.write_text(METADATA.rpartition(" ")[0] + " \n"), True),
}


@pytest.mark.parametrize("fault", METADATA_FAULTS)
def test_broken_metadata_are_one_line_and_the_program_runs(environment, fault):
    harm, readable = METADATA_FAULTS[fault]
    harm(environment.site / DIST_INFO / "METADATA")
    check(environment, None if readable else NOT_READ)
    error = explicit(environment)
    assert error == "" if readable else f"UnsupportedVersionError: {NOT_READ}" in error


def test_of_two_versions_at_once_the_one_that_is_read_counts(environment):
    """What a botched upgrade leaves; which of the two is found depends on the order of the folder."""
    environment.write(
        "transformers-4.30.2.dist-info/METADATA", METADATA.replace(NEWEST_TESTED["transformers"], "4.30.2")
    )
    read = environment.run("-c", "import importlib_metadata; print(importlib_metadata.version('transformers'))")
    old = read.stdout == "4.30.2\n"
    check(environment, "found transformers 4.30.2" if old else None)
    assert ("found transformers 4.30.2" in explicit(environment)) == old


# --- transformers ---------------------------------------------------------------------------------------

#: ``transformers/trainer.py``, None where there is none, and what our lines on stderr say.
TRAINERS = {
    "Trainer is None": ("Trainer = None", []),
    "no trainer module": (None, []),
    "an empty trainer module": ("", []),
    "the trainer module raises": ("raise RuntimeError('theirs')", []),
    "methods that are no functions": (
        "class Trainer:\n    _prepare_input = property(len)\n    floating_point_ops = 3",
        ["_prepare_input: expected a function, found property", "found int"],
    ),
    "methods that take something else": (
        "class Trainer:\n    def _prepare_input(self, a, b): pass",
        ["_prepare_input: expected the parameters (self, data), found (self, a, b)"],
    ),
    "a Trainer that raises when asked": (
        "class Asked(type):\n    def __getattr__(cls, name): raise RuntimeError('no\\n' + name)\n"
        "class Trainer(metaclass=Asked): pass",
        ["could not patch transformers.trainer: RuntimeError: no _prepare_input"],
    ),
}
ASKS_FOR_TRAINER = """
import torch, sys
try:
    from transformers.trainer import Trainer
    print(Trainer)
except Exception as error:
    print(repr(error))
sys.exit(7)
"""


@pytest.mark.parametrize("fault", TRAINERS)
def test_a_strange_trainer_module_fails_or_loads_as_without_us(environment, fault):
    code, told = TRAINERS[fault]
    path = environment.site / "transformers/trainer.py"
    path.unlink() if code is None else path.write_text(code)
    without = environment.run("-c", ASKS_FOR_TRAINER)
    found = environment.run("-c", ASKS_FOR_TRAINER, variable="1")
    address = re.compile(" at 0x[0-9a-f]+")
    assert (address.sub("", found.stdout), found.returncode) == (address.sub("", without.stdout), 7)
    lines = found.stderr.splitlines()
    assert len(lines) == len(told), found.stderr
    for line, words in zip(lines, told, strict=True):
        # A program that sets up no logging shows the bare message.
        assert line.startswith("hf_packfix: ")
        assert words in line
    assert explicit(environment) == ""  # whoever wants no more than a model can be told nothing yet


TRAINER = """
class Trainer:
    def _prepare_input(self, data): self.args, self.is_deepspeed_enabled
    def floating_point_ops(self, inputs): pass
"""


@pytest.mark.parametrize("first", ["torch", "transformers"])
@pytest.mark.parametrize("name", ["packing/packed.py", "packing/trees.py", "engine/probe.py"])
def test_a_broken_file_that_is_needed_late_is_one_line(environment, name, first):
    """With torch after transformers it is an import hook that fails, again and again."""
    environment.write(f"hf_packfix/{name}", "def f(")
    environment.write("transformers/trainer.py", TRAINER)
    environment.write("transformers/training_args.py", "class TrainingArguments:\n    device = _n_gpu = None\n")
    environment.write("transformers/trainer_pt_utils.py", "def nested_detach(tensors): pass\n")
    modules = ["torch", "transformers"] if first == "torch" else ["transformers", "torch"]
    modules += ["transformers.trainer", "transformers.trainer_pt_utils"]
    program = f"import {', '.join(modules)}, sys; print('ran'); sys.exit(7)"
    check(environment, rf"SyntaxError: .* \({name.rpartition('/')[2]}, line 1\)", program)


FAULTS = {
    "none": lambda site: None,
    "the package is gone": lambda site: shutil.rmtree(site / "hf_packfix"),
    "the boot module is gone": lambda site: (site / "_hf_packfix_boot.py").unlink(),
    "the version is refused": lambda site: (site / DIST_INFO / "METADATA").unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stream", [1, 2], ids=["stdout", "stderr"])
@pytest.mark.parametrize("how", ["closed", "full"])
def test_a_stream_that_takes_nothing_does_not_change_the_exit_status(environment, fault, stream, how):
    FAULTS[fault](environment.site)

    def spoil():
        if how == "closed":
            os.close(stream)
        else:
            os.dup2(os.open("/dev/full", os.O_WRONLY), stream)

    # Python itself complains at the end of stdout that it could not flush, if anything was written there.
    program = "import transformers, sys; sys.exit(7)"
    result = environment.run("-c", program, variable="1", preexec_fn=spoil)
    # Not as it should be: the path file, which has no `try`, raises on a full stderr, and Python ends where it cannot
    # report that there. It takes a deleted boot module as well.
    lost = (how, stream, fault) == ("full", 2, "the boot module is gone")
    # What `logging` could not write stays in the buffer of stderr; Python 3.14 and newer report that when they end.
    unflushed = (how, stream, fault) == ("full", 2, "the version is refused") and sys.version_info >= (3, 14)
    assert result.returncode == (1 if lost else 120 if unflushed else 7)
    if fault == "the boot module is gone" and sys.version_info >= (3, 15):
        return  # Python reports what it could not resolve in lines of its own, on stdout where stderr is closed
    assert result.stdout == ""
    assert len(set(result.stderr.splitlines())) == (stream == 1 and fault != "none"), result.stderr
