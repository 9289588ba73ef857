"""Where the versions of the packages are read from when their metadata are missing."""

from __future__ import annotations

import compileall
import sys
import types

import pytest

from hf_packfix.activation import versions
from tests.support.interpreters import execute


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that makes an importable package without metadata; it is unloaded afterwards."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(source, *, byte_code_only=False):
        folder = tmp_path / "made_up_package"
        folder.mkdir()
        (folder / "__init__.py").write_text(source)
        if byte_code_only:
            compileall.compile_dir(folder, quiet=1, legacy=True)
            (folder / "__init__.py").unlink()
        monkeypatch.setattr(versions, "MINIMUM", {"made-up-package": "2.0"})

    yield make
    sys.modules.pop("made_up_package", None)


def refused():
    conflict = versions.conflict()
    return conflict and (conflict.package, conflict.found)


@pytest.mark.parametrize("quote", ["'", '"'])
@pytest.mark.parametrize(("version", "conflict"), [("2.1.0", None), ("1.9", ("made-up-package", "1.9"))])
def test_the_version_is_read_from_the_source_without_an_import(package, quote, version, conflict):
    package(f"import this_is_not_there\n__version__ = {quote}{version}{quote}\n")
    assert versions.found("made-up-package") == version
    assert refused() == conflict
    assert "made_up_package" not in sys.modules


def test_the_version_of_a_loaded_module_comes_before_that_of_its_source(package, monkeypatch):
    package("__version__ = '1.9'\n")
    loaded = types.ModuleType("made_up_package")
    loaded.__version__ = "3.0"
    monkeypatch.setitem(sys.modules, "made_up_package", loaded)
    assert versions.found("made-up-package") == "3.0"


@pytest.mark.parametrize("source", ["", "__version__ = 3\n", "raise RuntimeError('broken')\n"])
@pytest.mark.parametrize("byte_code_only", [False, True])
def test_a_package_that_tells_no_version_is_refused(package, source, byte_code_only):
    package(source, byte_code_only=byte_code_only)
    assert refused() == ("made-up-package", None)
    assert "made_up_package" not in sys.modules


def test_no_such_package_or_one_that_raises_when_asked(monkeypatch):
    class Asked(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError(name)

    assert versions.found("made-up-package") is None
    monkeypatch.setitem(sys.modules, "made_up_package", Asked("made_up_package"))
    assert versions.found("made-up-package") is None


def test_without_metadata_our_dependencies_are_found_all_the_same(monkeypatch):
    import accelerate
    import importlib_metadata
    import torch
    import transformers

    expected = {"transformers": transformers.__version__, "accelerate": accelerate.__version__}

    def missing(name):
        raise importlib_metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib_metadata, "version", missing)
    assert {name: versions.found(name) for name in expected} == expected
    assert versions.found("torch") == str(torch.__version__)
    assert versions.conflict() is None
    for name in expected:
        monkeypatch.delitem(sys.modules, name)
        assert versions.found(name) == expected[name]  # from the source
        assert name not in sys.modules


@pytest.mark.parametrize("package", versions.NEEDED)
def test_a_missing_package_that_activation_needs_is_one_clear_error(package):
    module = package.replace("-", "_")
    needed = f"hf_packfix needs {package} >= {versions.NEEDED[package]}, but {package} is not installed"
    imports = execute(f"import sys; sys.modules['{module}'] = None; import hf_packfix", status=1)
    assert imports.stderr.count("Traceback") == 1
    assert f"UnsupportedVersionError: {needed}" in imports.stderr.splitlines()[-1]
    doctor = execute(
        f"""
        import sys
        sys.modules['{module}'], sys.argv = None, ["hf-packfix", "doctor"]
        from hf_packfix.commands.cli import main
        sys.exit(main())
        """,
        status=1,
    )
    assert doctor.stderr == ""
    verdict, problem, rest = doctor.stdout.split("\n", 2)
    assert verdict == "not healthy"
    assert problem.startswith(f"problem: {needed}")
    assert "problem: " not in rest
