"""What is not covered is left to torch, and what torch refuses is refused by torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

from hf_packfix import rnn
from hf_packfix.rnn import coverage
from tests.support.recurrent import KINDS, new_layer, new_packed, new_state


class Subclass(Tensor):
    pass


class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_left_to_torch_by_layer_and_data(kind):
    layer, packed = new_layer(kind), new_packed()
    assert rnn.run(layer, packed) is not None
    for other in (packed.data, None, packed._replace(data=packed.data.as_subclass(Subclass))):
        assert rnn.run(layer, other) is None
    half = packed._replace(data=packed.data.detach().bfloat16())
    assert rnn.run(new_layer(kind, dtype=torch.bfloat16), half) is None
    assert rnn.run(new_layer(kind, device="meta"), packed.to("meta")) is None
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach().as_subclass(Subclass))
    assert rnn.run(layer, packed) is None
    assert rnn.run(nn.LSTM(3, 4, proj_size=2, dtype=torch.float64), packed) is None


@pytest.mark.parametrize("kind", KINDS)
def test_inference_is_left_to_torch(kind):
    layer, packed = new_layer(kind), new_packed()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert rnn.run(layer, packed) is None
    assert rnn.run(layer.requires_grad_(False), packed._replace(data=packed.data.detach())) is None


@pytest.mark.parametrize("kind", KINDS)
def test_left_to_torch_by_what_surrounds_it(kind):
    layer, packed = new_layer(kind), new_packed()
    for around in (torch.autocast("cpu", torch.bfloat16), Mode(), Dispatch(), forward_ad.dual_level()):
        with around:
            assert rnn.run(layer, packed) is None
    with mock.patch("hf_packfix.rnn.coverage._is_compiling", return_value=True):
        assert rnn.run(layer, packed) is None
    assert rnn.run(layer, packed) is not None

    def function(data: Tensor) -> Tensor:
        assert rnn.run(layer, packed._replace(data=data)) is None
        assert rnn.run(layer, packed) is None
        return data.sum()

    torch.func.grad(function)(packed.data)
    torch.func.vmap(function)(packed.data.detach()[None])
    torch.jit.trace(function, packed.data.detach())


def inconsistent(packed: PackedSequence) -> dict[str, PackedSequence]:
    sizes, sorted_indices = packed.batch_sizes, packed.sorted_indices
    return {
        "3-D": packed._replace(data=packed.data[None]),
        "another number of features": packed._replace(data=packed.data[:, :2]),
        "another dtype": packed._replace(data=packed.data.float()),
        "too few rows": packed._replace(data=packed.data[:-1]),
        "no steps": packed._replace(batch_sizes=sizes[:0], data=packed.data[:0]),
        "int32": packed._replace(batch_sizes=sizes.int()),
        "sizes as a list": packed._replace(batch_sizes=sizes.tolist()),
        "too many indices": packed._replace(sorted_indices=torch.cat([sorted_indices, sorted_indices])),
    }


def outcome(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", inconsistent(new_packed()))
def test_inconsistent_sequences_end_as_in_torch(kind, name):
    layer, packed = new_layer(kind), inconsistent(new_packed())[name]
    state = new_state(layer) if name == "too many indices" else None
    assert outcome(rnn.faster(type(layer).forward), layer, packed, state) == outcome(layer, packed, state)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_states_end_as_in_torch(kind):
    layer, packed = new_layer(kind), new_packed()
    good = new_state(layer)
    bad: list[Any] = [torch.zeros(1, 2, 4), (torch.zeros(1, 5, 4),), [good], "state"]
    bad += [(good[0], good[1].float()), good[0]] if kind == "LSTM" else [good.float(), (good, good)]
    for state in bad:
        assert outcome(rnn.faster(type(layer).forward), layer, packed, state) == outcome(layer, packed, state)


@pytest.mark.parametrize("name", coverage.LEANS_ON)
def test_without_a_name_of_torch_everything_is_left_to_torch(name):
    module, _, path = name.partition(":")
    code = f"""
import torch, sys
from torch.nn.utils.rnn import pack_sequence
module = sys.modules[{module!r}]
if {path!r} == "_current_level":
    del module._current_level
else:
    value = module.{path}
    delattr(module, {path!r})
import hf_packfix.rnn as rnn
if {path!r} != "_current_level":
    module.{path} = value  # torch needs it
else:
    module._current_level = -1
gru, packed = rnn.GRU(3, 4), pack_sequence([torch.randn(30, 3), torch.randn(12, 3)])
assert rnn.run(gru, packed) is None
gru(packed)[0].data.sum().backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_every_private_name_of_torch_is_declared():
    tree = ast.parse(Path(coverage.__file__).read_text(encoding="utf-8"))
    owners = ("torch", "forward_ad")
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] in owners and node.attr[:1] == "_"
    }
    assert used - {"_C"} <= {name.rpartition(":")[2] for name in coverage.LEANS_ON}
