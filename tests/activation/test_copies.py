"""Real Trainers copied and pickled, and what Python's own tools say of the patched functions."""

from __future__ import annotations

import copy
import inspect
import pickle
import pydoc
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_packfix.engine.patch import Patch
from hf_packfix.engine.targets import resolve
from hf_packfix.patches import PATCHES
from tests.support.oracle import PlainTagger, Tagger, new_trainer, packed_batch, padded_batch, rows, stock

pytestmark = pytest.mark.slow  # starts many processes


def trained(trainer: Trainer) -> list[float]:
    """Train with a new optimizer, and return the losses."""
    # The scheduler of a run cannot be copied: it holds a weak reference to the method of its optimizer.
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", [PlainTagger, Tagger])
@pytest.mark.parametrize("when", ["new", "trained", "evaluated"])
def test_a_copied_trainer_trains_as_a_copy_of_the_stock_trainer(tmp_path, when, kind):
    def prepared(collate: Any) -> Trainer:
        trainer = new_trainer(tmp_path, kind, rows(6), collate, num_train_epochs=1)
        {"new": lambda: None, "trained": trainer.train, "evaluated": trainer.evaluate}[when]()
        return trainer

    trainer = prepared(packed_batch)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    copied = copy.deepcopy(trainer)
    assert type(copied) is type(trainer)
    assert copied.model is not trainer.model
    found = trained(copied)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name])  # it was the copy that trained
    assert copied.evaluate()["eval_loss"] > 0
    with stock():
        expected = trained(copy.deepcopy(prepared(padded_batch)))
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_a_copy_outlives_what_is_turned_off_and_on(tmp_path):
    trainer = new_trainer(tmp_path, PlainTagger, rows(6), packed_batch, num_train_epochs=1)
    copied = copy.deepcopy(trainer)
    with stock(), pytest.raises(AssertionError, match="Expected data to be a list or tuple"):
        copied.train()
    assert trained(copied) == trained(trainer)


def test_pickling_a_trainer_fails_or_works_as_in_stock(tmp_path):
    def pickled(collate: Any) -> Any:
        try:
            pickle.dumps(new_trainer(tmp_path, PlainTagger, rows(6), collate))
        except Exception as error:
            return type(error), str(error)
        return None

    found = pickled(packed_batch)
    with stock():
        assert found == pickled(packed_batch)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_a_patched_function_holds_its_name_alone(protocol):
    for patch in PATCHES:
        function = patched(patch)
        if "__call__" in patch.path or function is None:
            continue
        data = pickle.dumps(function, protocol)
        assert b"hf_packfix" not in data
        assert pickle.loads(data) is function
        with stock():
            assert pickle.loads(data) is function.__wrapped__


# --- inspection -----------------------------------------------------------------------------------------


def patched(patch: Patch) -> Any:
    """Return what stands in the place of a patch's target; None where that is not ours."""
    function = resolve(patch.module, patch.path)[1]
    return function if patch.status(True).state == "applied" else None


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_inspection_shows_upstream(patch):
    function = patched(patch)
    if function is None:
        assert patch.status(True).state in ("not-needed", "not-applicable")
        return
    with stock():
        original = resolve(patch.module, patch.path)[1]
        source, lines = inspect.getsource(original), inspect.getsourcelines(original)
        signature, text = inspect.signature(original), pydoc.render_doc(original)
        module, doc = inspect.getmodule(original), inspect.getdoc(original)
    assert function is not original
    assert inspect.unwrap(function) is inspect.unwrap(original)
    assert inspect.getsource(function) == source
    assert inspect.getsourcelines(function) == lines
    assert inspect.signature(function) == signature
    assert pydoc.render_doc(function) == text
    # It does not follow `__wrapped__`, as for any decorated function: where the code that runs is, a reader can see.
    assert "hf_packfix" in (inspect.getsourcefile(function) or "")
    assert inspect.getmodule(function) is module
    assert inspect.getdoc(function) == doc
    assert inspect.isfunction(function)
    for name in ("__module__", "__name__", "__qualname__", "__doc__", "__annotations__"):
        assert getattr(function, name) == getattr(original, name)
