"""Real Trainers copied and pickled, and what Python's own tools say of the patched functions."""

from __future__ import annotations

import copy
import inspect
import operator
import pickle
import pydoc
from typing import Any

import pytest
from transformers import Trainer

from hf_packfix.engine.patch import Patch
from hf_packfix.engine.targets import resolve
from hf_packfix.patches import PATCHES
from tests.support.oracle import Tagger, new_trainer, packed_batch, padded_batch, rows, stock

pytestmark = pytest.mark.slow  # starts many processes


def test_a_trainer_holds_what_it_holds_in_stock_and_a_copy_goes_on_as_it_does(tmp_path):
    def used(collate: Any) -> Trainer:
        trainer = new_trainer(tmp_path, Tagger, rows(6), collate, num_train_epochs=1)
        trainer.train()
        trainer.evaluate()
        trainer.predict(rows(6))
        return trainer

    trainer = used(packed_batch)
    with stock():
        expected = vars(used(padded_batch))
    assert {name: type(value) for name, value in vars(trainer).items()} == {k: type(v) for k, v in expected.items()}
    # The scheduler of a run cannot be copied: it holds a weak reference to the method of its optimizer.
    trainer.optimizer = trainer.lr_scheduler = None
    copied = copy.deepcopy(trainer)
    losses = [each.train().training_loss for each in (copied, trainer)]
    assert losses[0] == losses[1] > 0


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
