"""Real Trainers copied and pickled, and what Python's own tools say of the patched functions."""

from __future__ import annotations

import copy
import inspect
import operator
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
    def copied(collate: Any) -> Trainer:
        trainer = new_trainer(tmp_path, kind, rows(6), collate, num_train_epochs=1)
        {"new": lambda: None, "trained": trainer.train, "evaluated": trainer.evaluate}[when]()
        found = copy.deepcopy(trainer)
        assert type(found) is type(trainer)
        assert found.model is not trainer.model
        return found

    trainer = copied(packed_batch)
    with stock():
        expected = trained(copied(padded_batch))
        with pytest.raises(AssertionError, match="Expected data to be a list or tuple"):
            trained(trainer)
    found = trained(trainer)
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert trainer.evaluate()["eval_loss"] > 0


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


def patched(patch: Patch) -> Any:
    """Return what stands in the place of a patch's target; None where that is not ours."""
    function = resolve(patch.module, patch.path)[1]
    return function if patch.status(True).state == "applied" else None


TOOLS = [inspect.unwrap, inspect.getsource, inspect.getsourcelines, inspect.signature, pydoc.render_doc]
TOOLS += [inspect.getmodule, inspect.getdoc]
TOOLS += map(operator.attrgetter, ("__module__", "__name__", "__qualname__", "__doc__", "__annotations__"))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_inspection_shows_upstream(patch):
    function = patched(patch)
    if function is None:
        assert patch.status(True).state in ("not-needed", "not-applicable")
        return
    with stock():
        original = resolve(patch.module, patch.path)[1]
        expected = [tool(original) for tool in TOOLS]
    assert function is not original
    assert [tool(function) for tool in TOOLS] == expected
    # It does not follow `__wrapped__`, as for any decorated function: where the code that runs is, a reader can see.
    assert "hf_packfix" in (inspect.getsourcefile(function) or "")
    assert inspect.isfunction(function)
