"""The start-up files: what an interpreter does with them, on every Python at hand.

``transformers`` and, mostly, the package itself are stand-ins here, since what is tested is the way there.
"""

from __future__ import annotations

import ast
import pkgutil
import runpy
import shutil
import sys

import pytest

from hf_packfix.activation import environment as settings
from tests.support.installed import ROOT, STARTUP, STARTUP_FILES, Environment, interpreters

ON = ["1", "true", "YES", " On ", "force"]
OFF = ["0", "False", "no", " OFF"]
MODULES = "import sys; print(sorted(sys.modules))"
WAITING = "import sys; print(sum('packfix' in type(finder).__module__ for finder in sys.meta_path))"

FAKE_PACKAGE = "import sys\nsys.modules.setdefault('log', []).append('hf_packfix')\n__version__ = '0'\n"
FAKE_TRANSFORMERS = "import sys\nsys.modules.setdefault('log', []).append('transformers')\nfrom . import trainer\n"
USES = """
import sys
before = "hf_packfix" in sys.modules
import transformers
print(before, sys.modules["log"], type(transformers.__spec__.loader).__name__, type(transformers.__loader__).__name__)
print([type(finder).__name__ for finder in sys.meta_path if "packfix" in type(finder).__module__])
"""
ACTIVATED = "False ['hf_packfix', 'transformers'] SourceFileLoader SourceFileLoader\n[]\n"
UNTOUCHED = "False ['transformers'] SourceFileLoader SourceFileLoader\n[]\n"


@pytest.fixture(scope="module", params=interpreters(), ids=str)
def environment(request, tmp_path_factory):
    """The start-up files beside stand-ins for the package and for transformers."""
    environment = Environment(tmp_path_factory.mktemp("venv") / "venv", interpreters()[request.param])
    for name in STARTUP_FILES:
        shutil.copy(STARTUP / name, environment.site)
    environment.write("hf_packfix/__init__.py", FAKE_PACKAGE)
    environment.write("transformers/__init__.py", FAKE_TRANSFORMERS)
    environment.write("transformers/trainer.py", "")
    return environment


@pytest.fixture(scope="module")
def without_us(tmp_path_factory, environment):
    """An environment with start-up files of another package.

    Python itself imports modules for such files: a codec to decode any `.pth`; from 3.15 on, `pkgutil` and `re` to
    resolve any `.start`.
    """
    without = Environment(tmp_path_factory.mktemp("venv") / "venv", str(environment.python))
    without.write("other.pth", "# nothing\n")
    without.write("other.start", "sys:getrecursionlimit\n")
    return without


@pytest.fixture
def fresh(environment, tmp_path):
    """A copy of the environment: the same Python, the same site-packages."""
    fresh = Environment(tmp_path / "venv", str(environment.python))
    shutil.copytree(environment.site, fresh.site, dirs_exist_ok=True)
    return fresh


def version(environment):
    """Return the version of its Python, such as ``(3, 15)``."""
    printed = environment.run("-c", "import sys; print(*sys.version_info[:2])").stdout
    return tuple(map(int, printed.split()))


# --- what the variable says -----------------------------------------------------------------------------


@pytest.mark.parametrize("variable", [None, "", "  ", *OFF])
def test_off_leaves_no_trace(environment, without_us, variable):
    found = environment.run("-c", MODULES, variable=variable)
    expected = without_us.run("-c", MODULES, variable=variable)
    assert (found.stdout, found.stderr, found.returncode) == (expected.stdout, "", 0)
    assert environment.run("-c", USES, variable=variable).stdout == UNTOUCHED


@pytest.mark.parametrize("variable", ON)
def test_on_imports_nothing_until_transformers_is(environment, without_us, variable):
    found = ast.literal_eval(environment.run("-c", MODULES, variable=variable).stdout)
    expected = ast.literal_eval(without_us.run("-c", MODULES, variable=variable).stdout)
    assert set(found) - set(expected) == {"_hf_packfix_boot"}
    used = environment.run("-c", USES, variable=variable)
    assert (used.stdout, used.stderr) == (ACTIVATED, "")


@pytest.mark.parametrize("variable", ["2", "maybe", "1; import os", "オン"])
def test_anything_else_is_named_and_activates_nothing(environment, variable):
    result = environment.run("-c", USES, variable=variable)
    assert result.returncode == 0
    assert result.stdout == UNTOUCHED
    (line,) = result.stderr.splitlines()
    assert line.startswith("hf_packfix: HF_PACKFIX=")
    assert "is not one of: 1, true, yes, on, force, 0, false, no, off" in line


def test_one_process_of_a_distributed_run_speaks(environment):
    assert environment.run("-c", "", variable="maybe", env={"RANK": "1"}).stderr == ""
    assert environment.run("-c", "", variable="maybe", env={"RANK": "0"}).stderr != ""


@pytest.mark.parametrize("flag", ["-I", "-E", "-S"])
def test_isolated_modes_are_left_alone(environment, flag):
    result = environment.run(flag, "-c", MODULES, variable="1")
    assert "packfix" not in result.stdout
    assert (result.stderr, result.returncode) == ("", 0)


def test_the_two_tables_of_values_agree():
    boot = runpy.run_path(str(STARTUP / "_hf_packfix_boot.py"))
    assert boot["ACCEPTED"] == settings.ACCEPTED
    assert boot["VARIABLE"] == settings.VARIABLE
    for value in [None, "", " ", "maybe", *ON, *OFF]:
        assert boot["parse"](value) == settings.parse(value)


# --- where it runs --------------------------------------------------------------------------------------


#: What a program may do before it imports transformers.
BEFORE = {
    "look for transformers": """
import importlib.util
assert importlib.util.find_spec("transformers").loader.is_package("transformers")
""",
    "start again": "import _hf_packfix_boot as boot; boot.start(); boot.start()",
    "put in import hooks": """
import importlib.util, sys
class Nothing:
    def find_spec(self, name, path=None, target=None): return None
class Asks:
    asking = False
    def find_spec(self, name, path=None, target=None):
        if name != "transformers" or Asks.asking: return None
        Asks.asking = True
        try: return importlib.util.find_spec(name)
        finally: Asks.asking = False
sys.meta_path[:0] = [Nothing(), Asks()]
sys.meta_path += [Nothing()]
""",
}


@pytest.mark.parametrize("what", BEFORE)
def test_activation_survives_what_a_program_does_before_it_imports_transformers(environment, what):
    result = environment.run("-c", f"{BEFORE[what]}\n{USES}", variable="1")
    assert (result.stdout, result.stderr) == (ACTIVATED, "")


#: Finders whose loaders are of a given shape: `put()` puts theirs around ours, as mlflow does; `put_below()` around
#: the file's own, so that ours is around theirs; `answer()` in place of ours, as typeguard and jaxtyping do.
STAND_INS = """
import importlib.util, sys
from importlib.machinery import PathFinder, SourceFileLoader
class Finder:
    def __init__(self, shape, find): self.shape, self.find, self.asking = shape, find, False
    def find_spec(self, name, path=None, target=None):
        if name != "transformers" or self.asking: return None
        self.asking = True
        try: spec = self.find(name, path, target)
        finally: self.asking = False
        spec.loader = self.shape(spec.loader)
        return spec
def put(shape): sys.meta_path.insert(0, Finder(shape, lambda name, *_: importlib.util.find_spec(name)))
def put_below(shape): sys.meta_path.insert(1, Finder(shape, PathFinder.find_spec))
def answer(shape): sys.meta_path.insert(0, Finder(shape, PathFinder.find_spec))
class Around:
    def __init__(self, loader): self.loader = loader
class LoadModule(Around):
    def load_module(self, name): return self.loader.load_module(name)
class ExecModule(Around):
    def create_module(self, spec): return self.loader.create_module(spec)
    def exec_module(self, module): self.loader.exec_module(module)
class All(LoadModule, ExecModule): pass
class Delegates(Around):
    def __getattr__(self, name): return getattr(self.loader, name)
class Slots:
    __slots__ = ("loader", "load_module")
    def __init__(self, loader): self.load_module = loader.load_module
class GetsCode(Around):
    def create_module(self, spec): return None
    def exec_module(self, module): exec(self.loader.get_code(module.__name__), vars(module))
class OfAnotherFile(SourceFileLoader):
    def __init__(self, loader): super().__init__(loader.name, loader.path)
"""
#: Those that run the module without a method of ours: the package comes before the next module.
LATE = ("GetsCode", "OfAnotherFile")


@pytest.mark.parametrize("where", ["put", "put_below", "answer"])
@pytest.mark.parametrize("shape", ["LoadModule", "ExecModule", "All", "Delegates", "Slots", *LATE])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_loaders_of_every_shape_load_transformers_and_us(environment, shape, where):
    result = environment.run("-c", f"{STAND_INS}\n{where}({shape})\n{USES}", variable="1")
    first, rest = result.stdout.split("\n", 1)
    late = where == "answer" or (where == "put" and shape in LATE)
    order = ["transformers", "hf_packfix"] if late else ["hf_packfix", "transformers"]
    assert first.startswith(f"False {order} "), result.stdout + result.stderr
    assert rest == "[]\n"
    assert "_Loader" not in first.split()  # ours is gone
    assert (result.returncode, result.stderr) == (0, "")


def test_loaders_fail_as_without_us(environment):
    code = (
        STAND_INS
        + """
class NoCreateModule(Around):
    def exec_module(self, module): self.loader.exec_module(module)
class Neither(Around): pass
class Raises(Around):
    def load_module(self, name): raise ImportError("theirs")
def outcome():
    for where in (put, put_below, answer):
        for shape in (NoCreateModule, Neither, Raises):
            before = list(sys.meta_path)
            where(shape)
            try: import transformers
            except Exception as error: print(type(error).__name__, error)
            else: print("loaded")
            sys.meta_path[:] = before
            sys.modules.pop("transformers", None)
outcome()
try: import transformers.nowhere
except ModuleNotFoundError as error: print(error.name)
"""
    )
    with_us, without = (environment.run("-c", code, variable=variable) for variable in ("1", None))
    assert with_us.stdout == without.stdout
    assert "theirs" in with_us.stdout
    assert with_us.stdout.endswith("transformers.nowhere\n")


def test_a_program_that_imports_the_package_after_a_finder_in_front(environment):
    result = environment.run("-c", f"{STAND_INS}\nanswer(OfAnotherFile)\nimport hf_packfix\n{USES}", variable="1")
    assert result.stdout.startswith("True ['hf_packfix', 'transformers'] "), result.stderr
    assert (result.stdout.splitlines()[-1], result.stderr) == ("[]", "")


def test_a_spec_that_takes_no_loader_activates_after_transformers(environment):
    code = """
import sys
from importlib.machinery import ModuleSpec, PathFinder
class ReadOnly(ModuleSpec):
    loader = property(lambda self: vars(self)["loader"])
class Theirs:
    def find_spec(self, name, path=None, target=None):
        if name != "transformers": return None
        spec = PathFinder.find_spec(name, path)
        spec.__class__ = ReadOnly
        return spec
sys.meta_path.insert(1, Theirs())
"""
    result = environment.run("-c", code + USES, variable="1")
    assert result.stdout.startswith("False ['transformers', 'hf_packfix'] "), result.stderr
    assert (result.stdout.splitlines()[-1], result.stderr) == ("[]", "")


def test_a_module_run_by_m_and_a_repl_are_activated(environment):
    environment.write("program.py", USES)
    assert environment.run("-m", "program", variable="1").stdout == ACTIVATED
    session = environment.run("-i", input="import transformers, sys\nprint(sys.modules['log'])\n", variable="1")
    assert "['hf_packfix', 'transformers']" in session.stdout


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_child_processes_are_activated_as_well(environment, tmp_path, method):
    program = tmp_path / "program.py"
    program.write_text(f"""
import multiprocessing, sys
def child():
    exec({USES!r}, {{}})
    sys.stdout.flush()
if __name__ == "__main__":
    process = multiprocessing.get_context({method!r}).Process(target=child)
    process.start(); process.join()
    sys.exit(process.exitcode)
""")
    result = environment.run(str(program), variable="1")
    assert (result.stdout, result.returncode) == (ACTIVATED, 0), result.stderr


# --- what can be wrong ----------------------------------------------------------------------------------


def broken(fresh, change):
    """Run a program after ``change`` to its environment."""
    change(fresh)
    return fresh.run("-c", "import transformers; print('ran')", variable="1")


FAULTS = {
    "the package is gone": (lambda e: shutil.rmtree(e.site / "hf_packfix"), "No module named 'hf_packfix'"),
    "our code raises": (lambda e: e.write("hf_packfix/__init__.py", "raise KeyError('x')"), "KeyError: 'x'"),
    "our code exits": (lambda e: e.write("hf_packfix/__init__.py", "raise SystemExit(3)"), "SystemExit: 3"),
    "our error has several lines": (
        lambda e: e.write("hf_packfix/__init__.py", "raise OSError('a\\nb')"),
        "OSError: a b",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_on_stderr(fresh, fault):
    change, message = FAULTS[fault]
    result = broken(fresh, change)
    assert (result.stdout, result.returncode) == ("ran\n", 0)
    (line,) = set(result.stderr.splitlines())
    assert line.startswith("hf_packfix: ")
    assert message in line


# A path file that is not UTF-8 is not here: Python itself stops at it up to 3.12, whoever wrote it.
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("_hf_packfix_boot.py", b""),
        ("_hf_packfix_boot.py", b"def start("),
        ("_hf_packfix_boot.py", b"x = '\xff'"),
        ("_hf_packfix_boot.py", b"\x00"),
        ("hf_packfix_auto.pth", b""),
        ("hf_packfix_auto.pth", b"import os, sys; os.environ.get("),
        ("hf_packfix_auto.start", b""),
        ("hf_packfix_auto.start", b"_hf_packfix_boot"),
        ("hf_packfix_auto.start", b"\xff"),
    ],
)
def test_a_damaged_start_up_file_stops_nothing(fresh, name, content):
    result = broken(fresh, lambda e: e.write(name, content))
    assert (result.stdout, result.returncode) == ("ran\n", 0)


def test_a_missing_boot_module_is_named(fresh):
    result = broken(fresh, lambda e: (e.site / "_hf_packfix_boot.py").unlink())
    assert (result.stdout, result.returncode) == ("ran\n", 0)
    if version(fresh) >= (3, 15):
        # Python resolves the entry point of the `.start` file before any code of ours runs, and reports it itself.
        assert "_hf_packfix_boot:start" in result.stderr.splitlines()[0]
        assert "ModuleNotFoundError: No module named '_hf_packfix_boot'" in result.stderr
    else:
        (line,) = set(result.stderr.splitlines())
        assert line.startswith("hf_packfix: ")
        assert "_hf_packfix_boot.py is gone" in line


def test_a_broken_transformers_fails_as_without_us(fresh):
    raising = "raise RuntimeError('theirs')"
    result = broken(fresh, lambda e: e.write("transformers/__init__.py", raising))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "RuntimeError: theirs"


# --- what the files hold --------------------------------------------------------------------------------


def test_the_path_file_is_one_plain_line():
    (line,) = (STARTUP / "hf_packfix_auto.pth").read_text(encoding="ascii").splitlines()
    assert line.startswith("import os, sys; os.environ.get(")
    names = {node.id for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Name)}
    assert not names & {"exec", "eval", "compile"}


def test_the_start_file_obeys_its_rules():
    # PEP 829: UTF-8, an entry point `module:callable` a line, `#` comments; resolved with
    # `pkgutil.resolve_name` and called without arguments; the same stem silences the path file's import line.
    text = (STARTUP / "hf_packfix_auto.start").read_text(encoding="utf-8")
    entries = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
    assert entries == ["_hf_packfix_boot:start"]
    assert (STARTUP / "hf_packfix_auto.start").stem == (STARTUP / "hf_packfix_auto.pth").stem
    sys.path.insert(0, str(STARTUP))
    try:
        assert pkgutil.resolve_name(entries[0])() is None
    finally:
        sys.path.remove(str(STARTUP))
        sys.modules.pop("_hf_packfix_boot", None)


#: The Pythons that run a start-up file which is there without the other one (PEP 829).
RUN = {".pth": lambda version: version < (3, 18), ".start": lambda version: version >= (3, 15)}
FLAGS = pytest.mark.parametrize("flags", [(), ("-W", "error", "-X", "dev")], ids=["", "-W error"])


@FLAGS
@pytest.mark.parametrize(("kept", "deleted"), [(".pth", ".start"), (".start", ".pth")], ids=RUN)
def test_one_start_up_file_without_the_other(fresh, kept, deleted, flags):
    """A Python that does not know the kept file runs the program as if we were not installed."""
    (fresh.site / f"hf_packfix_auto{deleted}").unlink()
    expected = ACTIVATED if RUN[kept](version(fresh)) else UNTOUCHED
    for variable, printed in [("1", expected), ("0", UNTOUCHED), (None, UNTOUCHED)]:
        result = fresh.run(*flags, "-c", USES, variable=variable)
        assert (result.stdout, result.stderr, result.returncode) == (printed, "", 0)
    for isolated in ("-E", "-I", "-S"):
        result = fresh.run(*flags, isolated, "-c", f"{MODULES}; {WAITING}", variable="1")
        assert "packfix" not in result.stdout.splitlines()[0]
        assert (result.stdout.splitlines()[1], result.stderr, result.returncode) == ("0", "", 0)


@FLAGS
def test_both_start_up_files_activate_once(fresh, flags):
    """Python 3.15 and newer ignore the import line of the `.pth`; older ones do not know the `.start` file."""
    fresh.write("counted.py", "path_file, start = [], []\n")
    line = (STARTUP / "hf_packfix_auto.pth").read_text(encoding="ascii")
    fresh.write("hf_packfix_auto.pth", f"import counted; counted.path_file.append(1); {line}")
    boot = (STARTUP / "_hf_packfix_boot.py").read_text(encoding="utf-8")
    counting = "import counted\nreal_start = start\ndef start():\n    counted.start.append(1)\n    real_start()\n"
    fresh.write("_hf_packfix_boot.py", f"{boot}\n{counting}")
    program = f"import counted; print(len(counted.path_file), len(counted.start)); {WAITING}"
    result = fresh.run(*flags, "-c", f"{program}\n{USES}", variable="1")
    counts, waiting, rest = result.stdout.split("\n", 2)
    assert (waiting, rest, result.stderr, result.returncode) == ("1", ACTIVATED, "", 0)
    if version(fresh) >= (3, 15):
        assert counts == "0 1"
    else:  # before python/cpython#75723 was fixed, Python reads the `.pth` files of a virtual environment twice
        assert counts in ("1 1", "2 2")


def test_a_start_file_alone_does_the_same(fresh):
    """Do by hand what Python 3.15 does with the `.start` file, so that every Python checks it."""
    (fresh.site / "hf_packfix_auto.pth").unlink()
    start = "import pkgutil; pkgutil.resolve_name('_hf_packfix_boot:start')()\n"
    assert fresh.run("-c", start + USES, variable="1").stdout == ACTIVATED
    for variable in (None, "0"):
        found = fresh.run("-c", start + "import sys; print('_hf_packfix_boot' in sys.modules)", variable=variable)
        assert found.stdout == "False\n"
    isolated = fresh.run("-E", "-c", start + USES, variable="1")
    assert isolated.stdout == UNTOUCHED


def test_the_page_on_start_up_shows_the_exact_files():
    page = (ROOT / "hf_packfix/docs/startup.md").read_text(encoding="utf-8")
    for name in ("hf_packfix_auto.pth", "hf_packfix_auto.start"):
        assert (STARTUP / name).read_text().strip() in page
