"""The life of one patch, on an upstream of a few lines: applied, wrapped, overwritten, reloaded, copied, reverted."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import types
from typing import Any

import pytest

from hf_packfix.engine.patch import Patch, apply, raise_if_unsafe, revert

NAME = "upstream_of_these_tests"
FAILS = "class C:\n    def f(self, data): return 'stock'"
HANDLES = "class C:\n    def f(self, data): return 'right'"


@pytest.fixture
def upstream(monkeypatch) -> types.ModuleType:
    module = types.ModuleType(NAME)
    exec(FAILS, vars(module))
    monkeypatch.setitem(sys.modules, NAME, module)
    return module


def handles(function: Any) -> bool:
    return function(None, "packed") == "right"


def new_patch(*, supports: Any = handles, path: str = "C.f", **declared: Any) -> Patch:
    """Return a patch that makes ``f`` do what is right."""

    def make(original: Any, patch: Patch) -> Any:
        return lambda self, data: "right" if patch.active else original(self, data)

    names = ("self", "data")
    return Patch(
        f"{NAME}:{path}",
        make,
        problem="a problem",
        fix="a fix",
        parameters=names,
        knows=names,
        upstream_supports=supports,
        **declared,
    )


def state(of: Patch) -> tuple[str, str]:
    status = of.status(True)
    return status.state, status.detail


def test_nothing_acts_before_it_is_applied(upstream):
    declared = new_patch()
    assert declared.active is False
    assert state(declared) == ("pending", "")
    assert str(declared.status(True)) == f"{'pending':<14} {NAME}:C.f\n{'':<14}   a problem. With the patch: a fix."
    assert not declared.overwritten()
    assert declared.status(False).state == "off"
    assert upstream.C().f(0) == "stock"
    with pytest.raises(dataclasses.FrozenInstanceError):
        declared.status(True).state = "applied"


@pytest.mark.parametrize(
    ("source", "expected", "detail"),
    [
        ("", "not-applicable", "has no C.f here"),
        ("class B:\n    def f(self, data): return 'stock'\nclass C(B): pass", "not-applicable", "has no C.f here"),
        ("class C:\n    f = 3", "refused", "expected a function, found int"),
        (HANDLES, "not-needed", "handles PackedSequence"),
        (FAILS, "applied", ""),
        ("class C:\n    def f(self, data, more=None): return 'stock'", "applied", ""),
        *(
            (f"class C:\n    def f({names}): return 'stock'", "refused", f"(self, data), found ({names})")
            for names in ("self", "self, batch", "a, b", "zelf, data", "data, self")
        ),
    ],
)
def test_the_state_is_what_upstream_has_there_and_reverting_leaves_no_trace(upstream, source, expected, detail):
    del upstream.C
    exec(source, vars(upstream))
    before = dict(vars(upstream))
    declared = new_patch()
    apply([declared])
    assert state(declared)[0] == expected
    assert state(declared)[1].endswith(detail)
    assert declared.active is (expected == "applied")
    revert([declared])
    assert vars(upstream) == before


def test_a_module_that_is_not_loaded_leaves_the_patch_pending():
    declared = new_patch()
    apply([declared])
    assert declared.active is False
    assert state(declared) == ("pending", "")
    revert([declared])


def test_applying_and_reverting_twice_gives_the_same_two_functions(upstream):
    declared, original = new_patch(), vars(upstream.C)["f"]
    wrappers = []
    for _ in range(2):
        for _ in range(2):
            apply([declared])
            assert (declared.active, state(declared)) == (True, ("applied", ""))
            assert upstream.C().f(0) == "right"
        wrappers.append(vars(upstream.C)["f"])
        revert([declared])
        assert declared.active is False
        assert vars(upstream.C)["f"] is original
        assert wrappers[0](None, 0) == "stock"  # whoever kept it
    assert wrappers[0] is wrappers[1]
    assert wrappers[0].__wrapped__ is original


@pytest.mark.parametrize("says_what_it_wraps", [True, False])
@pytest.mark.parametrize("probed", [True, False])
def test_a_wrapper_around_ours_stays_and_ours_becomes_a_no_op(upstream, says_what_it_wraps, probed):
    declared = new_patch(supports=handles if probed else None)
    apply([declared])
    ours = vars(upstream.C)["f"]

    def theirs(self, data):
        return ours(self, data)

    upstream.C.f = functools.wraps(ours)(theirs) if says_what_it_wraps else theirs
    # Without a word of theirs, and without a probe, nothing can tell.
    known = says_what_it_wraps or probed
    assert declared.overwritten() is not known
    found, detail = state(declared)
    assert found == ("applied" if known else "refused")
    assert detail.startswith("wrapped in turn by theirs (" if known else "theirs (")
    assert (__file__ in detail) is True
    standing = vars(upstream.C)["f"]
    apply([declared])
    assert (vars(upstream.C)["f"] is standing) is known
    revert([declared])
    assert vars(upstream.C)["f"] is standing
    assert upstream.C().f(0) == "stock"


@pytest.mark.parametrize("what", ["original", "another", "nothing"])
def test_a_wrapper_that_somebody_removed_is_applied_again(upstream, what):
    declared, original = new_patch(), vars(upstream.C)["f"]
    apply([declared])
    ours = vars(upstream.C)["f"]
    if what == "nothing":
        del upstream.C.f
    else:
        upstream.C.f = original if what == "original" else lambda self, data: "another"
    assert declared.overwritten()
    found, detail = state(declared)
    assert found == "refused"
    assert detail.endswith("replaced it after activation; hf_packfix.enable() wraps again")
    apply([declared])
    if what == "nothing":
        assert state(declared) == ("not-applicable", f"{NAME} has no C.f here")
        assert declared.active is False
    else:
        assert state(declared) == ("applied", "")
        assert upstream.C().f(0) == "right"
        assert (vars(upstream.C)["f"] is ours) is (what == "original")


def test_upstream_that_does_what_is_right_is_left_alone(upstream):
    exec(HANDLES, vars(upstream))
    declared, original = new_patch(), vars(upstream.C)["f"]
    apply([declared])
    assert vars(upstream.C)["f"] is original
    assert declared.active is False
    assert state(declared)[0] == "not-needed"
    assert state(declared)[1].startswith("f (<string>:")
    upstream.C.f = lambda self, data: "right"  # another way to do it
    assert not declared.overwritten()
    upstream.C.f = lambda self, data: "wrong"
    assert declared.overwritten()
    assert state(declared)[0] == "refused"
    del upstream.C.f
    assert declared.overwritten()


def test_a_wrapper_that_was_there_before_ours_is_wrapped_and_comes_back(upstream):
    stock = vars(upstream.C)["f"]
    upstream.C.f = theirs = lambda self, data: stock(self, data)
    declared = new_patch()
    apply([declared])
    assert upstream.C().f(0) == "right"
    revert([declared])
    assert vars(upstream.C)["f"] is theirs


def test_what_somebody_else_fixed_meanwhile_is_left_alone(upstream):
    declared = new_patch()
    apply([declared])
    revert([declared])
    upstream.C.f = theirs = lambda self, data: "right"
    apply([declared])  # what answers is not ours
    assert state(declared)[0] == "not-needed"
    assert declared.active is False
    assert vars(upstream.C)["f"] is theirs


def test_a_function_that_does_not_tell_its_parameters_is_refused(upstream):
    def liar(self, data):
        return "stock"

    def circular(self, data):
        return "stock"

    liar.__signature__ = 5
    circular.__wrapped__ = functools.wraps(circular)(lambda self, data: circular(self, data))
    for function in (min, liar, circular):
        upstream.C.f = function
        with pytest.raises((TypeError, ValueError)):
            inspect.signature(function)
        declared = new_patch()
        apply([declared])
        assert state(declared) == ("refused", "expected the parameters (self, data), found ()")
        assert vars(upstream.C)["f"] is function


def test_what_is_visible_acts_already(upstream):
    class Watched(type):
        def __setattr__(cls, name, value):
            answers.append(value(None, 0))
            super().__setattr__(name, value)

    answers = []
    upstream.C = Watched("C", (), {"f": vars(upstream.C)["f"]})
    declared = new_patch()
    apply([declared])  # another thread may call it at once
    revert([declared])
    assert answers == ["right", "stock"]


def test_a_class_that_is_defined_again_is_wrapped_beside_the_old_one(upstream):
    declared, old = new_patch(), upstream.C
    before = vars(old)["f"]
    apply([declared])
    exec(FAILS, vars(upstream))
    new, after = upstream.C, vars(upstream.C)["f"]
    assert declared.overwritten()
    for _ in range(3):
        apply([declared])
        assert (vars(old)["f"].__wrapped__, vars(new)["f"].__wrapped__) == (before, after)
        assert (old().f(0), new().f(0)) == ("right", "right")
        revert([declared])
        assert (vars(old)["f"], vars(new)["f"]) == (before, after)
    # One function for two classes is wrapped for each.
    new.f = before
    apply([declared])
    assert (old().f(0), new().f(0)) == ("right", "right")
    revert([declared])
    assert (vars(old)["f"], vars(new)["f"]) == (before, before)


def test_the_last_of_two_copies_has_it(upstream):
    original = vars(upstream.C)["f"]
    first, second = new_patch(), new_patch()
    for last, other in ((second, first), (first, second), (second, first)):
        apply([other])
        apply([last])
        assert (last.active, other.active) == (True, False)
        assert vars(upstream.C)["f"].__wrapped__ is original
        assert state(last) == ("applied", "")
        assert other.overwritten()
        assert state(other)[0] == "refused"
        revert([other])  # nothing of it is left
        assert upstream.C().f(0) == "right"
    revert([second])
    assert vars(upstream.C)["f"] is original


def test_a_function_lives_in_all_modules_that_imported_it(upstream, monkeypatch):
    exec("def f(self, data): return 'stock'", vars(upstream))
    importer, other = types.ModuleType("importer"), types.ModuleType("other")
    importer.f = importer.under_another_name = original = upstream.f
    other.f = lambda self, data: "stock"  # of the same name, and nobody's business
    untouched = other.f
    monkeypatch.setitem(sys.modules, "importer", importer)
    monkeypatch.setitem(sys.modules, "other", other)
    declared = new_patch(path="f")
    apply([declared])
    assert importer.f is importer.under_another_name is upstream.f is not original
    assert other.f is untouched
    late = types.ModuleType("late")
    late.f = upstream.f
    monkeypatch.setitem(sys.modules, "late", late)
    exec("def f(self, data): return 'stock'", vars(upstream))  # a reload: who has imported it keeps what it was
    reloaded = upstream.f
    for _ in range(2):
        assert declared.overwritten()
        apply([declared])
        assert (importer.f.__wrapped__, upstream.f.__wrapped__) == (original, reloaded)
        revert([declared])
        assert importer.f is importer.under_another_name is late.f is original
        assert upstream.f is reloaded
    assert other.f is untouched


# --- names that a patch uses -----------------------------------------------------------------------------

USED = """
import collections, functools

def helper(): pass

class Base(collections.UserDict):
    declared: int
    here = 3

    @property
    def computed(self): return self.behind_a_property

    @functools.lru_cache
    def wrapped(self): return self.behind_a_wrapper

    @staticmethod
    def static(other): return other.behind_a_static_method

class C(Base):
    def __init__(self): self.assigned = [self.nested for _ in range(3)]
    def f(self, data): return 'stock'

Alias = C
"""
THERE = ("helper", "Base", "C.assigned", "C.nested", "C.here", "C.declared", "C.computed", "C.behind_a_property")
THERE += ("C.behind_a_wrapper", "C.behind_a_static_method", "C.data", f"{NAME}:Alias.assigned", f"{NAME}:helper")
MISSING = (
    "helped",
    "C.missing",
    "B.assigned",
    "C.f.g",
    "C.lru_cache_",
    f"{NAME}:helped",
    "no_such_module:f",
    "no.such.module:f",
)


@pytest.mark.parametrize("name", THERE)
def test_a_name_that_is_there_is_found(upstream, name):
    exec(USED, vars(upstream))
    declared = new_patch(uses=(name,))
    apply([declared])
    assert state(declared) == ("applied", "")
    revert([declared])


@pytest.mark.parametrize("name", MISSING)
def test_a_patch_that_lacks_a_name_is_refused_by_that_name(upstream, name):
    exec(USED, vars(upstream))
    before = vars(upstream.C)["f"]
    declared = new_patch(uses=("helper", name))
    apply([declared])
    assert state(declared) == ("refused", f"it needs {name}, not found here")
    assert vars(upstream.C)["f"] is before
    assert declared.deviation().endswith(f"it needs {name}, not found here. Without the patch, it a problem")


def test_a_name_in_our_own_wrapper_does_not_count(upstream):
    exec(USED, vars(upstream))
    first = new_patch()
    first.make = lambda original, patch: lambda self, data: self.named_by_ours
    apply([first])
    second = new_patch(path="Base.wrapped", uses=("C.named_by_ours",), supports=None)
    second.parameters = second.knows = ("self",)
    apply([second])
    assert state(second)[0] == "refused"
    revert([first])


@pytest.mark.parametrize("missing", ["a name", "the target", "the parameters", None])
@pytest.mark.parametrize("silent", ["training", "evaluation", "always", None])
def test_packed_batches_raise_where_a_missing_patch_would_give_wrong_numbers(upstream, monkeypatch, missing, silent):
    monkeypatch.setattr(upstream, "__version__", "3.0", raising=False)
    declared = new_patch(silent=silent, uses=("C.missing",) if missing == "a name" else ())
    if missing == "the target":
        del upstream.C.f
    if missing == "the parameters":
        declared.parameters = ("self", "batch")
    apply([declared])
    for evaluates in (False, True):
        if missing and silent in ("always", "evaluation" if evaluates else "training"):
            with pytest.raises(RuntimeError, match=f"wrong numbers here. hf_packfix does not patch {NAME}:C.f: "):
                raise_if_unsafe(evaluates=evaluates)
        else:
            raise_if_unsafe(evaluates=evaluates)
    revert([declared])
    raise_if_unsafe(evaluates=True)


def test_a_target_that_a_release_need_not_have_makes_nothing_unsafe(upstream, monkeypatch):
    monkeypatch.setattr(upstream, "__version__", "3.0", raising=False)
    del upstream.C.f
    later, gone = new_patch(silent="always", since="4.0"), new_patch(silent="always", until="2.0")
    apply([later, gone])
    raise_if_unsafe(evaluates=False)
