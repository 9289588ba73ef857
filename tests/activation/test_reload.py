"""A second copy of the package in one process."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.support.interpreters import ROOT, train

pytestmark = pytest.mark.slow  # starts many processes

TRAINS = """
expected = losses(build(padded_batch))

def packs_train():
    try:
        close(losses(build(packed_batch)), expected)
    except AssertionError as error:
        assert "Expected data to be a list or tuple" in str(error), error
        return False
    return True
"""

SECOND = {
    "the package imported again": """
for name in [name for name in sys.modules if name.split(".")[0] == "hf_packfix"]:
    del sys.modules[name]
import hf_packfix as second
second.enable(fast_rnn=True)
""",
    "a copy under another name": """
sys.path.insert(0, PATH)
import their_packfix as second
from their_packfix.patches import PATCHES
from hf_packfix.patches import PATCHES as FIRST
assert PATCHES[0] is not FIRST[0]
for last, other in ((second, first), (first, second), (second, first)):
    last.enable(fast_rnn=True)  # the last one enabled has it all; the other one says so
    assert last.is_enabled()
    assert not other.is_enabled()
    assert "replaced it after activation" in str(other.status())
    check_wrapped_once()
""",
}


@pytest.mark.parametrize("kind", SECOND)
def test_a_second_copy_wraps_once_and_restores_the_originals(tmp_path, kind):
    # As a program has it that ships its dependencies under a name of its own.
    copy = shutil.copytree(ROOT / "hf_packfix", tmp_path / "their_packfix", ignore=shutil.ignore_patterns("*.pyc"))
    for path in copy.rglob("*.py"):
        path.write_text(re.sub(r"\bhf_packfix", "their_packfix", path.read_text()))
    train(
        TRAINS
        + f"""
from transformers import Seq2SeqTrainer
from transformers.trainer_pt_utils import EvalLoopContainer
PATH, first = {str(tmp_path)!r}, hf_packfix
hf_packfix.disable()
places = [(Trainer, "_prepare_input"), (Trainer, "prediction_step"), (Trainer, "floating_point_ops")]
places += [(EvalLoopContainer, "add"), (torch.nn.GRU, "forward")]
def standing(): return [vars(owner)[name] for owner, name in places]
originals = standing()
hf_packfix.enable(fast_rnn=True)

def check_wrapped_once():
    assert [function.__wrapped__ for function in standing()] == originals
    assert packs_train()
    assert build(packed_batch).evaluate()["eval_loss"] > 0
{SECOND[kind]}
assert second is not first
for _ in range(2):
    assert second.is_enabled()
    check_wrapped_once()
    second.disable()
    assert not first.is_enabled()
    assert not second.is_enabled()
    assert standing() == originals
    assert not packs_train()
    second.enable(fast_rnn=True)
"""
    )
