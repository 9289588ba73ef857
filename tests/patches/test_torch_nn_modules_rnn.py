"""``enable(fast_rnn=True)`` and ``HF_PACKFIX_FAST_RNN``: everybody's own layers, when asked."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import hf_packfix
from hf_packfix import HFPackfixWarning
from hf_packfix.activation import environment
from hf_packfix.engine.targets import resolve
from hf_packfix.patches import FAST_RNN
from hf_packfix.rnn.coverage import _is_known
from tests.support.interpreters import execute

pytestmark = pytest.mark.skipif(not _is_known, reason="this torch lacks a name of LEANS_ON: torch's own layers run")

OURS = "RecurrenceBackward"
LAYERS = [nn.LSTM, nn.GRU, nn.RNN]
ORIGINALS = {kind: vars(kind)["forward"] for kind in LAYERS}


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    hf_packfix.enable(fast_rnn=False)


def new_packed() -> PackedSequence:
    torch.manual_seed(0)
    return pack_sequence([torch.randn(n, 3) for n in (12, 30, 7)], enforce_sorted=False)


def is_fast(layer: nn.Module) -> bool:
    """Return whether a layer trains with our backward; its results are torch's all the same."""
    packed = new_packed()
    output = layer(packed)[0].data
    with torch.no_grad():
        torch.testing.assert_close(output, layer(packed)[0].data)
    seen: set[Any] = set()
    nodes = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return any(type(node).__name__ == OURS for node in seen)


def states() -> set[str]:
    return {patch.state for patch in hf_packfix.status().patches if patch.target.startswith("torch.nn.modules.rnn:")}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_layers_are_fast_while_they_are_asked_for(kind):
    layer = kind(3, 4)
    for turn_off in (functools.partial(hf_packfix.enable, fast_rnn=False), hf_packfix.disable):
        hf_packfix.enable()
        assert not is_fast(layer)
        assert states() == {"off"}
        assert vars(kind)["forward"] is ORIGINALS[kind]
        hf_packfix.enable(fast_rnn=True)
        assert states() == {"applied"}
        assert is_fast(layer)
        wrapper = vars(kind)["forward"]
        hf_packfix.enable()
        hf_packfix.enable(fast_rnn=True)
        assert vars(kind)["forward"] is wrapper
        assert wrapper.__wrapped__ is ORIGINALS[kind]
        assert hf_packfix.is_enabled()
        turn_off()
        assert vars(kind)["forward"] is ORIGINALS[kind]
        assert states() == {"off"}


def test_the_status_names_what_turns_them_on():
    assert str(hf_packfix.status()).count("hf_packfix.enable(fast_rnn=True) or HF_PACKFIX_FAST_RNN=1 turns it on") == 3


def test_what_the_environment_asks_for_holds_where_the_word_is_left_out(monkeypatch):
    monkeypatch.setenv("HF_PACKFIX_FAST_RNN", "1")
    hf_packfix.enable()
    assert states() == {"off"}  # enabled already: as it is
    hf_packfix.disable()
    hf_packfix.enable()
    assert states() == {"applied"}
    hf_packfix.enable(fast_rnn=False)
    assert states() == {"off"}
    hf_packfix.disable()
    hf_packfix.enable(fast_rnn=False)
    assert states() == {"off"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", "on"), (" ON ", "on"), ("0", "off"), ("no", "off"), ("", ""), ("force", None), ("2", None)],
)
def test_the_variable_means_on_or_off_and_nothing_else(monkeypatch, value, expected):
    monkeypatch.setenv("HF_PACKFIX_FAST_RNN", value)
    assert environment.requested(environment.FAST_RNN_VARIABLE) == expected


def test_an_unknown_value_is_named(monkeypatch):
    hf_packfix.disable()
    monkeypatch.setenv("HF_PACKFIX_FAST_RNN", "fast")
    with pytest.warns(HFPackfixWarning, match="HF_PACKFIX_FAST_RNN='fast' is not one of: 1, true, yes, on, 0"):
        hf_packfix.enable()
    assert states() == {"off"}


TRAINS = """
import sys
{before}
import torch
from torch.nn.utils.rnn import pack_sequence
layer = torch.nn.GRU(3, 4)
output = layer(pack_sequence([torch.randn(30, 3), torch.randn(8, 3)]))[0].data
nodes = [output.grad_fn.name(), output.grad_fn.next_functions[0][0].name()]
print("RecurrenceBackward" in nodes, "hf_packfix" in sys.modules)
"""


@pytest.mark.parametrize(
    ("before", "variables", "fast"),
    [
        ("import hf_packfix", {"HF_PACKFIX_FAST_RNN": "1"}, True),
        ("import torch, hf_packfix", {"HF_PACKFIX_FAST_RNN": "1"}, True),
        ("import hf_packfix", {"HF_PACKFIX_FAST_RNN": "1", "HF_PACKFIX": "0"}, False),
        ("import hf_packfix; hf_packfix.enable(fast_rnn=False)", {"HF_PACKFIX_FAST_RNN": "1"}, False),
        ("", {"HF_PACKFIX_FAST_RNN": "1"}, False),
    ],
)
def test_in_a_fresh_interpreter(before, variables, fast):
    printed = execute(TRAINS.format(before=before), **variables).stdout.split()
    assert printed == [str(fast), str(bool(before))]


# --- the layers of others -------------------------------------------------------------------------------


class Scaled(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        output, state = super().forward(input, hx)
        return output._replace(data=2 * output.data), state


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4)

    def forward(self, padded: Tensor) -> Tensor:
        packed = pack_padded_sequence(padded, torch.tensor([12, 9]), enforce_sorted=True)
        return self.rnn(packed)[0].data


def test_subclasses_that_call_super_are_fast():
    scaled = Scaled(3, 4)
    hf_packfix.enable(fast_rnn=True)
    assert is_fast(scaled)


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_pickles_and_inspection_are_those_of_torch(kind):
    hf_packfix.enable(fast_rnn=True)
    layer, function = kind(3, 4), vars(kind)["forward"]
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert is_fast(one)
    assert pickle.loads(pickle.dumps(function)) is function
    assert b"hf_packfix" not in pickle.dumps(function)
    assert inspect.getsource(function) == inspect.getsource(ORIGINALS[kind])
    assert inspect.signature(function) == inspect.signature(ORIGINALS[kind])


@pytest.mark.parametrize("kind", LAYERS)
def test_padded_and_unbatched_inputs_go_to_the_original(kind):
    layer = kind(3, 4)
    inputs = [torch.randn(5, 2, 3), torch.randn(5, 3)]
    expected = [layer(value)[0] for value in inputs]
    hf_packfix.enable(fast_rnn=True)
    for value, output in zip(inputs, expected, strict=True):
        assert torch.equal(layer(value)[0], output)
    with pytest.raises(ValueError, match="Expected input to be 2D or 3D"):
        layer(torch.randn(1, 1, 1, 3))


def test_scripted_and_compiled_layers_are_those_of_torch():
    model, padded = Model(), torch.randn(12, 2, 3)
    expected = model(padded)
    hf_packfix.enable(fast_rnn=True)
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(padded), expected)
    # "eager" captures and runs the graphs without a compiler.
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(padded), expected)
    for patch in FAST_RNN:
        assert patch.active


def test_a_wrapper_around_ours_is_left_standing(monkeypatch):
    hf_packfix.enable(fast_rnn=True)
    ours = nn.GRU.forward

    def theirs(self: Any, input: Any, hx: Any = None) -> Any:
        return ours(self, input, hx)

    theirs.__wrapped__ = ours  # type: ignore[attr-defined]
    monkeypatch.setattr(nn.GRU, "forward", theirs)
    assert hf_packfix.is_enabled()
    assert is_fast(nn.GRU(3, 4))
    hf_packfix.enable(fast_rnn=False)
    assert nn.GRU.forward is theirs
    assert not is_fast(nn.GRU(3, 4))


@pytest.mark.parametrize("patch", FAST_RNN, ids=lambda patch: patch.path)
def test_upstream_is_what_the_patch_was_written_for(patch):
    original = resolve(patch.module, patch.path)[1]
    assert tuple(inspect.signature(original).parameters) == patch.parameters
