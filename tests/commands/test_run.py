"""``hf-packfix run`` beside Python itself: the same program, the same way, on every Python at hand.

What hf_packfix depends on is a stand-in here, since the test is how a program runs; ``test_installed.py`` trains.
"""

from __future__ import annotations

import itertools
import re
import shutil
import zipfile
from pathlib import Path

import packaging
import pytest

from tests.support.installed import ROOT, Environment, interpreters

pytestmark = pytest.mark.slow  # starts many processes

RUN = ["-m", "hf_packfix", "run"]

#: What a program can see of how it was started; it is read late, from elsewhere, and in another thread.
SHOWS = """
import atexit, os, pickle, sys, threading
class Mine: pass
def late(when):
    print(when, type(pickle.loads(pickle.dumps(Mine()))).__name__, sys.modules["__main__"].__dict__ is globals())
print(sys.argv, sys.path)
print(sorted(globals().keys() - {"__annotations__"}))  # which Python sets up to 3.13
print(__name__, __package__, __spec__ and __spec__.name, __builtins__, __doc__)
loader = getattr(__loader__, "__name__", type(__loader__).__name__)
print(loader.replace("Sourceless", "Source"), globals().get("__cached__"))
os.chdir("/")
file = globals().get("__file__")
print(file, file and os.path.exists(file), "hf_packfix" in sys.argv)
atexit.register(late, "atexit")
main = threading.main_thread()
threading.Thread(target=lambda: (main.join(), late("thread"))).start()
"""

#: Ways to name a program, each with the words behind ``python`` and what stands on standard input.
FORMS = {
    "script": ["folder/program.py"],
    "absolute": ["{folder}/folder/program.py"],
    "after --": ["--", "folder/program.py"],
    "link": ["link.py"],
    "byte code": ["program.pyc"],
    "folder": ["app"],
    "zip": ["app.zip"],
    "-m": ["-m", "package.program"],
    "-mMODULE": ["-mpackage.program"],
    "-m PACKAGE": ["-m", "app"],
    "-c": ["-c", "{program}"],
    "-cCODE": ["-c{program}"],
    "-": ["-"],
    "/dev/stdin": ["/dev/stdin"],
}


@pytest.fixture(scope="module", params=interpreters(), ids=str)
def environment(request, tmp_path_factory):
    """The package, and stand-ins for what it requires."""
    environment = Environment(tmp_path_factory.mktemp("venv") / "venv", interpreters()[request.param])
    install(environment.site)
    for name in ("transformers", "accelerate"):
        environment.write(f"{name}-99.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 99\n")
    return environment


def install(site):
    shutil.copytree(ROOT / "hf_packfix", site / "hf_packfix", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(packaging.__file__).parent, site / "packaging")
    (site / "wrapt.py").write_text("def register_post_import_hook(hook, name): pass\n")
    (site / "importlib_metadata.py").write_text("from importlib.metadata import *\n")


@pytest.fixture
def folder(tmp_path, environment):
    """Return a folder that takes a program in every form."""
    for name in ("folder", "package", "app"):
        (tmp_path / name).mkdir()
    (tmp_path / "link.py").symlink_to("folder/program.py")
    return tmp_path


def write(folder, environment, program):
    for name in ("folder/program.py", "package/program.py", "app/__main__.py"):
        (folder / name).write_text(program)
    with zipfile.ZipFile(folder / "app.zip", "w") as archive:
        archive.writestr("__main__.py", program)
    compile_it = "import py_compile; py_compile.compile('folder/program.py', 'program.pyc')"
    environment.run("-c", compile_it, cwd=folder)


def as_under_python(environment, folder, form, program, *arguments, flags=()):
    """Check that ``hf-packfix run`` makes of a program what Python does; return output, errors and exit status."""
    write(folder, environment, program)
    words = [word.replace("{folder}", str(folder)).replace("{program}", program) for word in FORMS[form]]
    found = []
    for command in ([], RUN):
        result = environment.run(*flags, *command, *words, *arguments, cwd=folder, input=program)
        # The folder of a pipe holds no modules and has several names. Python shows the frames of runpy for `-m`,
        # folders and zip files; addresses differ from run to run.
        output = re.sub(r"'/(dev|dev/fd|proc/\w+/fd)'", "", result.stdout)
        varies = r'  File "[^"]*runpy(\.py|>)", line .*\n(    .*\n)*| at 0x[0-9a-f]+'
        found.append((output, re.sub(varies, "", result.stderr), result.returncode))
    assert found[1] == found[0]
    return found[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_program_sees_what_it_sees_under_python(environment, folder, form):
    output, *rest = as_under_python(environment, folder, form, SHOWS, "-m", "--help", "x")
    assert rest == ["", 0]
    assert "thread Mine True\natexit Mine True" in output


# `-m` does not find the program where Python does not look in the working directory.
@pytest.mark.parametrize(
    ("form", "flags"),
    [
        *itertools.product(["script", "folder", "-c"], [["-I"], ["-P"]]),
        *itertools.product(["script", "-m"], [["-E"], ["-X", "dev"], ["-O"]]),
    ],
)
def test_options_of_python_mean_what_they_mean_under_python(environment, folder, form, flags):
    if flags == ["-P"] and "unknown option" in environment.run("-P", "-c", "").stderr.lower():
        pytest.skip("this Python has no -P")
    program = "import sys; print(sys.path, sys.flags, __debug__)"
    assert as_under_python(environment, folder, form, program, flags=flags)[1:] == ("", 0)


#: Programs that end in every way.
ENDS = {
    "returns": "pass",
    "exits": "import sys; sys.exit(7)",
    "exits with a text": "import sys; sys.exit('enough')",
    "exits without a status": "raise SystemExit",
    "raises": "def f():\n    1 / 0\ntry:\n    f()\nexcept ZeroDivisionError as e:\n    raise KeyError('x') from e",
    "raises in a thread": "import threading\nthreading.Thread(target=lambda: 1 / 0, name='t').start()",
    "raises at exit": "import atexit\natexit.register(lambda: 1 / 0)",
    "raises in an import": "import json.nowhere",
    "raises what is no Exception": "class Stop(BaseException): pass\nraise Stop",
    "a syntax error": "x = 1\ndef f(:\n    pass",
    # The handler is set since a shell that starts the tests in the background has it ignored.
    "interrupted": "import os, signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)",
    "interrupted, with exit functions": "import atexit\natexit.register(print, 'bye')\nraise KeyboardInterrupt",
    "an excepthook": "import sys, traceback\ndef hook(kind, error, tb):\n    traceback.print_tb(tb)\n"
    "    print(kind, error.__traceback__ is tb, sys.last_traceback is tb)\nsys.excepthook = hook\nraise KeyError(3)",
    "an excepthook that exits": "import sys\nsys.excepthook = lambda *error: sys.exit(5)\nraise KeyError(3)",
    "the future is not ours": "def f(x: undefined): pass\nprint(f.__annotations__)",
}


@pytest.mark.parametrize(
    ("form", "end"),
    [
        *itertools.product(["script", "-m"], ENDS),
        *itertools.product(["folder", "-c", "-"], ["raises", "a syntax error", "an excepthook", "interrupted"]),
    ],
)
def test_a_program_ends_as_under_python(environment, folder, end, form):
    as_under_python(environment, folder, form, ENDS[end])


@pytest.mark.parametrize("source", [b"x = 1\0", b"x = '\xff'", b"# coding: nowhere"])
def test_a_file_that_python_cannot_read(environment, folder, source):
    (folder / "program.py").write_bytes(source)
    result = environment.run(*RUN, "program.py", cwd=folder)
    assert result.returncode == 1
    assert "SyntaxError: " in result.stderr or "ValueError: " in result.stderr  # Python itself differs by version
    assert "Traceback" not in result.stderr


def test_a_package_that_fails_fails_as_under_python(environment, folder):
    (folder / "package/__init__.py").write_text("import no_such_module")
    assert "No module named 'no_such_module'" in as_under_python(environment, folder, "-m", "")[1]


def test_after_the_program_its_names_are_there(environment, folder):
    """``python -i`` goes on where the program has ended."""
    write(folder, environment, "mine = 6 * 7")
    result = environment.run("-i", *RUN, "folder/program.py", cwd=folder, input="print(__name__, mine)\n")
    assert "__main__ 42" in result.stdout


# --- with the plugin on ---------------------------------------------------------------------------------

ON = "import hf_packfix, os, sys; print(hf_packfix.status().reason, os.environ['HF_PACKFIX'], 'torch' in sys.modules)"


@pytest.mark.parametrize(("variable", "value"), [(None, "1"), ("0", "1"), ("maybe", "1"), ("force", "force")])
def test_the_plugin_is_on_whatever_the_variable_says(environment, variable, value):
    result = environment.run(*RUN, "-c", ON, variable=variable)
    assert result.stdout == f"activated by hf-packfix run {value} False\n", result.stderr


@pytest.mark.parametrize("end", ["print('done')", "1 / 0", "raise SystemExit(3)"])
def test_the_status_of_a_program_when_it_has_ended(environment, folder, end):
    program = f"import atexit; atexit.register(lambda: print('end', file=__import__('sys').stderr)); {end}"
    plain = as_under_python(environment, folder, "-c", program)
    result = environment.run(*RUN, "--status", "-c", program)
    assert (result.stdout, result.returncode) == (plain[0], plain[2])
    before, _, status = result.stderr.partition("\nhf_packfix is enabled: activated by hf-packfix run\n")
    assert before.splitlines()[-1] == "end"
    assert "pending        transformers.trainer:Trainer._prepare_input\n" in status


def test_run_needs_no_start_up_files(environment, folder):
    result = environment.run("-S", *RUN, "-c", ON, env={"PYTHONPATH": str(environment.site)})
    assert (result.stdout, result.stderr) == ("activated by hf-packfix run 1 False\n", "")


def test_a_zip_application_runs_programs(environment, folder):
    (folder / "build").mkdir()
    install(folder / "build")
    (folder / "build/__main__.py").write_text("import sys; from hf_packfix.commands.cli import main; sys.exit(main())")
    (folder / "build/beside.py").write_text("")
    for name in ("transformers", "accelerate"):
        shutil.copytree(environment.site / f"{name}-99.dist-info", folder / f"build/{name}-99.dist-info")
    shutil.make_archive(str(folder / "hf"), "zip", folder / "build")
    (folder / "folder/program.py").write_text(f"import beside, mine\n{ON}\nprint(beside.__file__)")
    (folder / "folder/mine.py").touch()
    command = ["-S", "hf.zip", "run", "folder/program.py"]
    result = environment.run(*command, cwd=folder)
    assert result.stdout == f"activated by hf-packfix run 1 False\n{folder}/hf.zip/beside.py\n", result.stderr
    raises = environment.run("-S", "hf.zip", "run", "-c", "1 / 0", cwd=folder)
    assert raises.stderr == environment.run("-c", "1 / 0").stderr


# --- usage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: SCRIPT"),
        (["-m"], "argument -m: expected one argument"),
        (["-c"], "argument -c: expected one argument"),
        (["--epochs", "x.py"], "unrecognized arguments: --epochs; options of Python stand before: python --epochs -m"),
        (["nowhere.py"], "cannot open 'nowhere.py': No such file or directory\n"),
        (["train.txt"], "cannot open 'train.txt': No such file or directory\n"),
        (["package.program"], "No such file or directory; for a module, use: hf-packfix run -m package.program\n"),
        (["train"], "No such file or directory; for a module, use: hf-packfix run -m train\n"),
        (["python", "train.py", "a b"], "did you mean: hf-packfix run train.py 'a b'\n"),
        (["python3", "-m", "train"], "did you mean: hf-packfix run -m train\n"),
        (["bash", "train.sh"], "for a command that is no Python file, use: HF_PACKFIX=1 bash train.sh\n"),
        (["-m", "no.where"], "No module named 'no'"),
        (["-mnowhere"], "No module named nowhere"),
        (["-m", "json"], "'json' is a package and cannot be directly executed"),
        (["empty"], "can't find '__main__' module in '{folder}/empty'"),
    ],
)
def test_wrong_usage_is_named_with_what_to_do(environment, folder, words, message):
    (folder / "empty").mkdir()
    (folder / "train.py").touch()
    result = environment.run(*RUN, *words, cwd=folder)
    assert (result.returncode, result.stdout) == (2, "")
    usage, _, error = result.stderr.rpartition("hf-packfix run: error: ")
    assert usage.startswith("usage: hf-packfix run [--status] SCRIPT [ARGS...]\n")
    assert error.count("\n") == 1
    assert message.replace("{folder}", str(folder)) in error


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["train.py", "--epochs", "3"], "run train.py --epochs 3"),
        (["-m", "my.train"], "run -m my.train"),
        (["app"], "run app"),
        (["doctr", "-v"], "doctor"),
    ],
)
def test_a_hint_instead_of_a_usage_page(environment, folder, words, meant):
    result = environment.run("-m", "hf_packfix", *words, cwd=folder)
    error = f"hf-packfix: error: {words[0]!r} is not a command; did you mean: hf-packfix {meant}\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", error)


@pytest.mark.parametrize("command", ["doctor", "demo", "docs"])
def test_an_unknown_option_shows_the_usage_of_its_command(environment, command):
    result = environment.run("-m", "hf_packfix", command, "--no-such-option")
    usage = f"usage: hf-packfix {command} "
    assert result.returncode == 2
    assert result.stderr.startswith(usage)
    assert result.stderr.endswith(f"hf-packfix {command}: error: unrecognized arguments: --no-such-option\n")


def test_an_unsupported_version_is_named(environment, folder):
    old = environment.site / "transformers-99.dist-info/METADATA"
    text = old.read_text()
    try:
        old.write_text(text.replace("99", "4.30.2"))
        result = environment.run(*RUN, "-c", ON)
        assert result.returncode == 2
        assert result.stderr.splitlines()[-1].startswith(
            "hf-packfix run: error: hf_packfix needs transformers >= 4.46"
        )
    finally:
        old.write_text(text)


def test_help_says_what_run_does(environment):
    result = environment.run(*RUN, "--help")
    assert result.returncode == 0
    assert "even if HF_PACKFIX=0 is set" in " ".join(result.stdout.split())
    assert "  -m MODULE" in result.stdout
    assert "run a script, a module or code" in environment.run("-m", "hf_packfix", "--help").stdout
    assert "invalid choice: 'walk'" in environment.run("-m", "hf_packfix", "walk").stderr
    assert environment.run("-m", "hf_packfix", "-V").stdout.startswith("hf-packfix ")
