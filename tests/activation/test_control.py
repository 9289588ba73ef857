"""Turning the plugin on and off, in every order, and what it says of itself."""

from __future__ import annotations

import os
import sys
import warnings

import pytest
from transformers import Trainer

import hf_packfix
from hf_packfix.activation import control, versions
from hf_packfix.activation.control import state
from hf_packfix.patches import PATCHES
from tests.support.interpreters import TRAINS, execute
from tests.support.patched import patch_of


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import hf_packfix\nfrom transformers import Trainer",
        "from transformers import Trainer\nimport hf_packfix",
        "import transformers\nimport hf_packfix\nfrom transformers import Trainer",
        "import hf_packfix, transformers\nTrainer = transformers.Trainer",
        "import torch, hf_packfix\nfrom transformers.trainer import Trainer",
        "from transformers import Trainer as T\nclass Trainer(T): pass\nimport hf_packfix",
    ],
)
def test_any_order_of_imports_patches_the_trainer(first):
    # `Seq2SeqTrainer` brings in the last of the modules that are patched.
    execute(first + "\nfrom transformers import Seq2SeqTrainer, BatchFeature" + TRAINS)


PROGRAMS = {
    "an import loads neither torch nor transformers nor the models": """
        import sys, hf_packfix
        text = str(hf_packfix.status())
        assert not {"torch", "transformers", "accelerate"} & set(sys.modules)
        assert "_prepare_input" in text and "pending" in text, text
        assert hf_packfix.is_enabled()
        hf_packfix.DataCollatorForPackedSequence()
        import transformers.trainer
        assert hf_packfix.is_enabled()
        assert not [name for name in sys.modules if name.startswith("hf_packfix.models")]
        """,
    "a program without torch is not made to load it": """
        import sys, types
        stand_in = types.ModuleType("transformers.feature_extraction_utils")
        exec("class BatchFeature:\\n    def to(self): pass", vars(stand_in))
        import hf_packfix
        from hf_packfix.activation.control import on_module_imported
        sys.modules[stand_in.__name__] = stand_in
        on_module_imported(stand_in)
        assert "torch" not in sys.modules
        assert not hasattr(stand_in.BatchFeature.to, "__wrapped__")
        (found,) = [patch for patch in hf_packfix.status().patches if patch.target.startswith(stand_in.__name__)]
        assert (found.state, found.detail) == ("pending", "torch is not loaded"), found
        del sys.modules[stand_in.__name__]
        from transformers import Trainer
        assert Trainer._prepare_input.__wrapped__
        """,
    # Creating it fixes whether the process is distributed, which is up to the Trainer's arguments.
    "activation leaves the process state of accelerate alone": """
        import hf_packfix
        from transformers import Seq2SeqTrainer, Trainer
        hf_packfix.enable()
        from accelerate.state import AcceleratorState, GradientState, PartialState
        assert not PartialState._shared_state and not AcceleratorState._shared_state
        """,
}


@pytest.mark.parametrize("promise", PROGRAMS)
def test_an_import_changes_no_more_than_it_must(promise):
    execute(PROGRAMS[promise])


def test_disable_leaves_nothing_of_ours_in_any_module():
    import transformers.trainer_seq2seq  # the last of the modules that are patched

    hf_packfix.enable()
    assert not {patch.status(True).state for patch in PATCHES} & {"refused", "off"}, str(hf_packfix.status())
    wrapper = vars(transformers.trainer_seq2seq.Trainer)["_prepare_input"]
    hf_packfix.disable()
    assert not hf_packfix.is_enabled()
    assert vars(Trainer)["_prepare_input"] is wrapper.__wrapped__
    package = os.path.dirname(hf_packfix.__file__) + os.sep
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if module.__name__.startswith(("transformers", "accelerate")) and callable(value):
                code = getattr(value, "__code__", None)
                assert code is None or not code.co_filename.startswith(package), (module, name)


def test_an_overwritten_patch_is_reported_and_applied_again():
    wrapper = vars(Trainer)["_prepare_input"]
    Trainer._prepare_input = wrapper.__wrapped__
    assert not hf_packfix.is_enabled()
    assert "a patch was overwritten since" in hf_packfix.status().reason
    hf_packfix.enable()
    assert vars(Trainer)["_prepare_input"] is wrapper


def test_an_import_hook_never_raises(monkeypatch, caplog):
    def damaged():
        raise RuntimeError("the patches cannot be read")

    monkeypatch.setattr(state, "failures", set())
    with monkeypatch.context() as broken:
        broken.setattr(control, "_requested_patches", damaged)
        control.on_module_imported(sys.modules["transformers.trainer"])
    assert "could not patch transformers.trainer: RuntimeError: the patches cannot be read" in caplog.text


def test_the_status_names_every_patch_with_its_problem_and_its_fix():
    status = hf_packfix.status()
    assert status.enabled
    assert status.activated_by
    assert status.versions["transformers"] == versions.found("transformers")
    for patch in status.patches:
        assert patch.target in str(status)
        assert patch.problem
        assert patch.fix
        assert f"{patch.problem}. With the patch: {patch.fix}." in str(status)
    hf_packfix.disable()
    off = hf_packfix.status()
    assert not off.enabled
    assert "disable() was called" in str(off)
    assert {patch.state for patch in off.patches} == {"off"}


def test_too_old_is_refused_with_what_was_found_and_required(monkeypatch):
    monkeypatch.setattr(versions, "found", lambda package: "4.30.2")
    hf_packfix.disable()
    with pytest.raises(hf_packfix.UnsupportedVersionError, match=r"transformers >= 4\.46.*4\.30\.2") as caught:
        hf_packfix.enable()
    assert isinstance(caught.value, ImportError)
    assert (caught.value.conflict.required, caught.value.conflict.found) == ("4.46", "4.30.2")
    assert not hf_packfix.is_enabled()
    hf_packfix.enable(force=True)
    assert hf_packfix.is_enabled()


def test_a_missing_transformers_is_named(monkeypatch):
    monkeypatch.setattr(versions, "found", lambda package: None)
    with pytest.raises(hf_packfix.UnsupportedVersionError, match=r"transformers is not installed.*; install it with"):
        hf_packfix.enable()


def test_the_kill_switch_keeps_an_import_and_enable_off():
    execute(
        """
        import warnings, hf_packfix
        assert not hf_packfix.is_enabled()
        assert "HF_PACKFIX=0 keeps it off" in str(hf_packfix.status())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hf_packfix.enable()
        assert [w.category for w in caught] == [hf_packfix.HFPackfixWarning], caught
        assert not hf_packfix.is_enabled()
        hf_packfix.enable(force=True)
        assert hf_packfix.is_enabled()
        """,
        HF_PACKFIX="0",
    )


@pytest.mark.parametrize("caller", ["somebodys_module", "hf_packfix_examples"])  # whose name begins like ours
def test_warnings_point_at_the_caller(monkeypatch, caller):
    monkeypatch.setenv("HF_PACKFIX", "off")
    monkeypatch.setattr("hf_packfix._warnings._warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile("hf_packfix.enable()", "theirs.py", "exec"), {"hf_packfix": hf_packfix, "__name__": caller})
    assert caught[0].filename == "theirs.py"


def test_disabled_restores_the_originals_inside_and_all_that_was_afterwards():
    patch = patch_of("transformers.trainer:Trainer._prepare_input")
    wrapper = vars(Trainer)["_prepare_input"]
    by = hf_packfix.status().activated_by
    with hf_packfix.disabled():
        assert vars(Trainer)["_prepare_input"] is wrapper.__wrapped__
        assert not hf_packfix.is_enabled()
        with hf_packfix.disabled():
            pass
        assert not hf_packfix.is_enabled()  # as it was before
    assert vars(Trainer)["_prepare_input"] is wrapper
    assert (hf_packfix.is_enabled(), patch.active) == (True, True)
    assert hf_packfix.status().activated_by == by


def test_disabled_turns_nothing_on_that_was_off_and_keeps_the_layers():
    hf_packfix.disable()
    with hf_packfix.disabled():
        pass
    assert not hf_packfix.is_enabled()
    assert hf_packfix.status().reason == "hf_packfix.disable() was called"
    hf_packfix.enable(fast_rnn=True)
    with pytest.raises(ValueError, match="of the program"), hf_packfix.disabled():
        raise ValueError("of the program")
    assert patch_of("torch.nn.modules.rnn:GRU.forward").active
    hf_packfix.enable(fast_rnn=False)
