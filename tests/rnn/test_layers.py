"""Our layers are torch's own to whatever sees a module; weights are read when and as often as torch reads them."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import hf_packfix.rnn
from hf_packfix import rnn
from hf_packfix.packing.packed import with_data
from hf_packfix.rnn import stack
from tests.support.recurrent import (
    HELD,
    KINDS,
    assert_as_torch,
    assert_close,
    flat,
    gradients,
    leaves,
    new_layer,
    new_packed,
)

NAMES = ["LSTM", "GRU", "RNN"]


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, padded: Tensor) -> Tensor:
        return self.layer(padded)[0]


def pair(name: str) -> tuple[Any, Any]:
    """Return a layer of ours and one of torch's with the same weights, in double precision."""
    torch.manual_seed(0)
    ours, theirs = (getattr(of, name)(3, 4, 2, bidirectional=True, dtype=torch.float64) for of in (rnn, nn))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def is_fast(layer: nn.Module) -> bool:
    with mock.patch.object(stack, "Recurrence", wraps=stack.Recurrence) as recurrence:
        layer(new_packed())
    return recurrence.apply.called


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_of_torchs_class_and_its_copies_are_fast(name):
    ours, theirs = pair(name)
    assert type(ours) is type(theirs)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    copied = copy.deepcopy(ours)
    assert is_fast(ours)
    assert is_fast(copied)
    assert not is_fast(theirs)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied(new_packed())[0].data.any()  # it runs its own weights
    assert ours(new_packed())[0].data.all()
    assert_close(flat(ours(new_packed())), flat(theirs(new_packed())))
    padded = torch.randn(5, 2, 3, dtype=torch.float64)
    assert torch.equal(ours(padded)[0], theirs(padded)[0])
    for again in (pickle.loads(pickle.dumps(ours)), torch.load(saved(ours), weights_only=False)):
        assert type(again) is type(theirs)
        assert_close(flat(again(new_packed())), flat(theirs(new_packed())))
        assert b"hf_packfix" not in pickle.dumps(ours)


def saved(layer: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("name", NAMES)
def test_a_subclass_is_one_of_ours_and_its_methods_count(name):
    class Doubled(getattr(rnn, name)):
        def forward(self, input: Any, hx: Any = None) -> Any:
            output, state = super().forward(input, hx)
            return with_data(output, 2 * output.data), state

    layer, theirs = Doubled(3, 4, dtype=torch.float64), getattr(nn, name)(3, 4, dtype=torch.float64)
    theirs.load_state_dict(layer.state_dict())
    assert isinstance(layer, (Doubled, getattr(nn, name)))
    assert is_fast(layer)
    assert_close([layer(new_packed())[0].data], [2 * theirs(new_packed())[0].data])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tool", ["script", "fx", "quantize", "trace", "hooks", "call", "functional_call", "replica"])
def test_tools_see_torchs_layer(name, tool):
    ours, theirs = pair(name)
    padded, packed = torch.randn(5, 2, 3, dtype=torch.float64), new_packed()
    if tool == "script" and name != "RNN":
        assert torch.equal(torch.jit.script(Model(ours))(padded), theirs(padded)[0])
    elif tool == "fx":
        graph = torch.fx.symbolic_trace(Model(ours)).graph
        assert [node.op for node in graph.nodes] == [
            node.op for node in torch.fx.symbolic_trace(Model(theirs)).graph.nodes
        ]
    elif tool == "quantize" and name != "RNN":
        with warnings.catch_warnings(action="ignore"):
            found = torch.ao.quantization.quantize_dynamic(Model(ours.float()), {type(theirs)})
        assert type(found.layer).__module__.startswith("torch.ao.nn.quantized.dynamic")
    elif tool == "trace":
        with warnings.catch_warnings(action="ignore"):
            assert torch.equal(torch.jit.trace(Model(ours), padded)(padded), theirs(padded)[0])
    elif tool in ("hooks", "call"):
        layer, seen = ours if tool == "hooks" else theirs, []
        layer.register_forward_pre_hook(lambda *_: seen.append("before"))
        layer.register_forward_hook(lambda *_: seen.append("after"))
        layer.register_full_backward_hook(lambda *_: seen.append("backward"))
        output = layer(packed) if tool == "hooks" else rnn.call(layer, packed)
        output[1][0].sum().backward()
        assert seen[:2] == ["before", "after"]
        assert "forward" not in vars(theirs)
        assert torch.equal(rnn.call(theirs, padded)[0], theirs(padded)[0])
    elif tool == "functional_call":
        doubled = {key: (2 * value).detach().requires_grad_() for key, value in ours.named_parameters()}
        found, expected = (flat(torch.func.functional_call(of, doubled, (packed,))) for of in (ours, theirs))
        assert_close(found, expected)
        assert_close(gradients(found, [*doubled.values()]), gradients(expected, [*doubled.values()]))
    elif tool == "replica":
        replica = ours._replicate_for_data_parallel()
        replica._flat_weights = [torch.zeros_like(weight) for weight in replica._flat_weights]
        for key, weight in zip(replica._flat_weights_names, replica._flat_weights, strict=True):
            setattr(replica, key, weight)
        assert not replica(padded)[0].any()


class Drop(nn.Module):
    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        Drop.calls += 1
        return nn.functional.dropout(weight, 0.5)


@pytest.mark.parametrize("kind", KINDS + HELD)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", ["dropout", "spectral_norm", "weight_norm", "old_weight_norm", "by hand", "replaced"])
@pytest.mark.filterwarnings("ignore")
def test_weights_are_read_as_torch_reads_them(kind, frozen, how):
    def case(layer: Any) -> Any:
        Drop.calls = 0
        if how == "dropout":
            parametrize.register_parametrization(layer, "weight_hh_l0", Drop())
        elif how == "spectral_norm":
            parametrizations.spectral_norm(layer, "weight_hh_l0")
        elif how == "weight_norm":
            parametrizations.weight_norm(layer, "weight_hh_l0")
        elif how == "old_weight_norm":
            nn.utils.weight_norm(layer, "weight_hh_l0")
        elif how == "by hand":
            layer._flat_weights = [2 * weight for weight in layer._flat_weights]
        else:
            layer.weight_ih_l0 = nn.Parameter(3 * layer.weight_ih_l0.detach())
        if frozen:
            layer.requires_grad_(False)
        torch.manual_seed(7)
        packed = new_packed()
        results = flat(layer(packed))
        inputs = leaves(layer, packed)
        found = gradients(results, inputs, allow_unused=True)
        kept = [buffer for _, buffer in sorted(layer.named_buffers())]
        return [*results, *(g for g in found if g is not None), *kept, torch.tensor(float(Drop.calls)), torch.rand(2)]

    assert_as_torch(case, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_function_runs_torchs_own(kind):
    # "eager" captures and runs the graphs without a compiler.
    layer, packed = new_layer(kind), new_packed()

    def function(data: Tensor) -> Tensor:
        return rnn.call(layer, with_data(packed, data))[0].data * 2

    compiled = torch.compile(function, backend="eager")
    torch.testing.assert_close(compiled(packed.data), layer(packed)[0].data * 2)


def test_what_is_not_torchs_forward_is_all_that_is_called():
    def theirs(self: Any, input: Any, hx: Any = None) -> str:
        return "theirs"

    assert hf_packfix.rnn.faster(theirs)(nn.GRU(3, 4), new_packed()) == "theirs"
