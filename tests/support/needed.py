"""``@pytest.mark.needs_patch(TARGET)``: the test runs once more with this patch switched off, and must fail then.

A patch that no test needs is one patch too many, and a test that does not notice its absence is no test of it. To find
the tests of a patch, search for its target. A test with the mark must be able to run several times.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import hf_packfix
from hf_packfix.engine.patch import Patch, revert
from tests.support.patched import patch_of
from tests.tools.drift import state_here


@contextmanager
def switched_off(patch: Patch) -> Iterator[None]:
    """Revert one patch, and keep it off whatever the test enables."""
    off = property(lambda self: self is not patch, lambda self, value: None)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(type(patch), "active", off, raising=False)
        revert([patch])
        yield
    hf_packfix.enable()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Run a marked test again: with every patch, so that it can, and without each of those that it needs."""
    result = yield
    targets = [target for mark in pyfuncitem.iter_markers("needs_patch") for target in mark.args]
    patches = [patch for patch in map(patch_of, targets) if state_here(patch) == "applied"]
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    for number, patch in enumerate([None, *patches] if patches else []):
        if "tmp_path" in arguments:
            arguments["tmp_path"] = pyfuncitem.funcargs["tmp_path"] / f"again-{number}"
            arguments["tmp_path"].mkdir()
        if patch is None:
            pyfuncitem.obj(**arguments)
            continue
        with switched_off(patch):
            try:
                pyfuncitem.obj(**arguments)
            except Exception:  # a crash of any kind, or a wrong number
                continue
        pytest.fail(f"passes without the patch of {patch.target}, which it is marked to need")
    return result
