"""Results, gradients, errors and what may be changed are torch's, compared with torch in the same test."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

from hf_packfix import rnn
from hf_packfix.packing.packed import with_data
from tests.support.recurrent import (
    HELD,
    KINDS,
    LENGTHS,
    assert_as_torch,
    assert_equal_to_torch,
    flat,
    gradients,
    leaves,
    loss_of,
    new_layer,
    new_packed,
    new_state,
    ours,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_results_and_gradients_are_those_of_torch(data):
    draw = data.draw
    kind = draw(st.sampled_from(KINDS + HELD))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    inputs, hidden = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    options = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "dropout": 0.0 if kind in HELD else draw(st.sampled_from([0.0, 0.4])),
        "batch_first": draw(st.booleans()),
        "dtype": dtype,
    }
    with warnings.catch_warnings(action="ignore"):  # dropout with one layer
        layer = new_layer(kind, inputs, hidden, **options)
    layer.train(draw(st.booleans()))
    for parameter in layer.parameters():
        parameter.requires_grad_(draw(st.sampled_from([True, True, False])))
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    packed = new_packed([2, *lengths], inputs, is_sorted=draw(st.booleans()), dtype=dtype)
    # On a CPU, ours run only what needs a gradient.
    packed.data.requires_grad_((kind in KINDS and not leaves(layer, packed)[1:]) or draw(st.booleans()))
    takes_state = kind != "held LSTM" or not layer.bidirectional
    state = new_state(layer, 1 + len(lengths)) if takes_state and draw(st.booleans()) else None
    which = draw(st.sampled_from([slice(None), slice(1), slice(1, None)]))
    assert_equal_to_torch(kind, layer, packed, state, which)


@pytest.mark.parametrize("kind", KINDS + HELD)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_long_sequences_and_long_padding(kind, bidirectional):
    layer = new_layer(kind, 16, 32, bidirectional=bidirectional, num_layers=2, dtype=torch.float32)
    packed = new_packed([300, 4, 55, 120, 30, 7, 30, 299, 1], 16, dtype=torch.float32)
    assert_equal_to_torch(kind, layer, packed, None if kind in HELD else new_state(layer, 9))


# --- what may be changed between forward and backward ---------------------------------------------------

IN_PLACE = {
    "add": lambda t: t.add_(1),
    "relu": lambda t: nn.functional.relu(t, inplace=True),
    "dropout": lambda t: nn.functional.dropout(t, 0.5, inplace=True),
    "zero a row": lambda t: t[0].zero_(),
    "behind the back of autograd": lambda t: t.data.clamp_(0),
    "detached": lambda t: t.detach().mul_(2),
}


@pytest.mark.parametrize("kind", KINDS + HELD)
@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}], ids=str)
def test_every_result_may_be_changed_in_place(kind, change, options):
    def case(layer: Any, index: int) -> Any:
        packed = new_packed()
        results = flat(layer(packed))
        change(results[index])
        return [*results, *gradients(results, leaves(layer, packed))]

    for index in range(3 if kind.endswith("LSTM") else 2):
        assert_as_torch(lambda layer, index=index: case(layer, index), kind, **options)


CHANGES = {"in place": lambda t: t.mul_(2), "data": lambda t: setattr(t, "data", t.data * 2)}
CHANGED = ["data", "hx", "cx", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_ih_l1"]
FROZEN = ["", "data", "weight_ih", "weight_hh", "bias", "hx", "weight_hh bias hx", "data hx weight_ih", "weight", "l0"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("how", CHANGES)
def test_inputs_may_be_changed_exactly_if_torch_allows_it(kind, frozen, how):
    def case(layer: Any, changed: str, is_sorted: bool) -> Any:
        packed, state = new_packed(is_sorted=is_sorted), new_state(layer)
        states = list(state) if kind == "LSTM" else [state]
        named = {
            "data": packed.data,
            **dict(zip(["hx", "cx"], states, strict=False)),
            **dict(layer.named_parameters()),
        }
        for name, tensor in named.items():
            tensor.requires_grad_(not any(part in name for part in frozen.split()))
        results = flat(layer(packed, state))
        with torch.no_grad():
            CHANGES[how](named.get(changed, packed.data))
        return gradients(results, leaves(layer, packed, state))

    for changed in CHANGED:
        for is_sorted in (False, True)[: 1 + (changed in ("hx", "cx"))]:
            assert_as_torch(lambda layer, c=changed, s=is_sorted: case(layer, c, s), kind, num_layers=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["", "weight_ih", "weight_hh", "weight"])
@pytest.mark.parametrize("which", ["data", "state"])
def test_inference_tensors_are_taken_exactly_if_torch_takes_them(kind, frozen, which):
    def case(layer: Any) -> Any:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not frozen or frozen not in name)
        with torch.inference_mode(which == "data"):
            packed = with_data(new_packed(is_sorted=True), new_packed(is_sorted=True).data.detach().clone())
        with torch.inference_mode(which == "state"):
            state = new_state(layer)
            state = tuple(s.detach().clone() for s in state) if kind == "LSTM" else state.detach().clone()
        return gradients(flat(layer(packed, state)), leaves(layer, packed))

    assert_as_torch(case, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_accumulate_are_tensors_of_their_own_and_the_graph_can_be_kept(kind):
    def case(layer: Any) -> Any:
        packed = new_packed()
        loss = loss_of(flat(layer(packed)))
        first = torch.autograd.grad(loss, leaves(layer, packed), retain_graph=True)
        before = [gradient.clone() for gradient in first]
        for gradient in first:
            gradient.add_(1)  # no other one changes
        loss.backward(retain_graph=True)
        loss.backward()
        return [*before, *first, *(leaf.grad for leaf in leaves(layer, packed))]

    assert_as_torch(case, kind)
    assert_as_torch(lambda layer: [case(layer), loss_of(flat(layer(new_packed()))).backward()][0], kind)

    def twice(layer: Any) -> Any:
        loss = loss_of(flat(layer(new_packed())))
        loss.backward()
        loss.backward()

    assert_as_torch(twice, kind)


# --- numbers at the edge --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("where", ["data", "gradient", "state", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_nan_and_infinity_go_where_torch_lets_them_go(kind, bidirectional, where, value):
    def case(layer: Any) -> Any:
        packed, state = new_packed(), new_state(layer)
        named = {"data": packed.data, "state": state[0] if kind == "LSTM" else state, **dict(layer.named_parameters())}
        with torch.no_grad():
            if where in named:
                named[where].view(-1)[3] = value
        output, *others = flat(layer(packed, state))
        of_output = torch.ones_like(output)
        if where == "gradient":
            of_output[11, 1] = value
        found = torch.autograd.grad(output, leaves(layer, packed, state), of_output)
        # Of huge values, sums in another order differ in what is left.
        return [output, *others, *(tensor.clamp(-1e12, 1e12) for tensor in found)]

    assert_as_torch(case, kind, bidirectional=bidirectional)


# --- gradients of gradients, vmap, dual tensors, autocast -------------------------------------------------


@pytest.mark.parametrize("kind", KINDS + HELD)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_penalty_on_the_gradient(kind, bidirectional, bias):
    def case(layer: Any) -> Any:
        packed = new_packed()
        inputs = leaves(layer, packed)
        # The state depends on the data: what flows through it is counted once.
        count = 2 * (1 + bidirectional)
        state = packed.data.mean() * torch.ones(count, len(LENGTHS), 4, dtype=torch.float64)
        state = (state, state.sin()) if kind.endswith("LSTM") else state
        state = None if kind == "held LSTM" and bidirectional else state
        first = gradients(flat(layer(packed, state)), inputs, create_graph=True)
        return first + torch.autograd.grad(sum((g**2).sum() for g in first), inputs)

    assert_as_torch(case, kind, num_layers=2, bidirectional=bidirectional, bias=bias)


@pytest.mark.parametrize("kind", KINDS + HELD)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_vectorized_backward_and_a_dual_tensor_as_gradient(kind, bidirectional):
    def vectorized(layer: Any) -> Any:
        packed = new_packed()
        output = layer(packed)[0].data
        of_output = torch.randn(3, *output.shape, dtype=output.dtype)
        return torch.autograd.grad(output, leaves(layer, packed), of_output, is_grads_batched=True)

    def dual(layer: Any) -> Any:
        packed = new_packed()
        output = layer(packed)[0].data
        with forward_ad.dual_level():
            of_output = forward_ad.make_dual(torch.ones_like(output), torch.randn_like(output))
            found = torch.autograd.grad(output, leaves(layer, packed), of_output)
            return [part for gradient in found for part in forward_ad.unpack_dual(gradient)]

    assert_as_torch(vectorized, kind, bidirectional=bidirectional)
    assert_as_torch(dual, kind, bidirectional=bidirectional)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_under_autocast_is_that_of_torch(kind, create_graph):
    def case(layer: Any) -> Any:
        packed = new_packed(dtype=torch.float32)
        results = flat(layer(packed))
        with torch.autocast("cpu", torch.bfloat16):  # in which torch rounds the products of a backward
            return gradients(results, leaves(layer, packed), create_graph=create_graph)

    with mock.patch.dict("tests.support.recurrent.TOLERANCE", {torch.float32: 1e-2}):
        assert_as_torch(case, kind, dtype=torch.float32)


# --- dropout, frozen layers, memory -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("trained", ["l", "l1", "l2"])
def test_dropout_draws_what_torch_draws_over_frozen_layers_as_well(kind, bidirectional, trained):
    def case(layer: Any) -> Any:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(trained in name)
        packed = with_data(new_packed(), new_packed().data.detach())
        results = flat(layer(packed))
        return [*results, *gradients(results, leaves(layer, packed)), torch.rand(3)]

    assert_as_torch(case, kind, num_layers=3, dropout=0.5, bidirectional=bidirectional)


PEAK = """
import resource, sys, torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from hf_packfix import rnn
name, ours = sys.argv[1:]
torch.set_num_threads(1)
layer = getattr(rnn if ours == "ours" else nn, name)(64, 64)
sizes = torch.arange(320, 20, -3)
data = torch.randn(int(sizes.sum()), 64, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
layer(PackedSequence(data, sizes))[0].data.sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_the_peak_memory_is_no_higher_than_torchs(name):
    def peak(whose: str) -> int:
        return int(subprocess.check_output([sys.executable, "-c", PEAK, name, whose], text=True, timeout=300))

    ours, theirs = peak("ours"), peak("torch")
    assert ours <= 1.05 * theirs, f"{ours} KiB against {theirs} KiB"


def test_a_gpu_leaves_to_torch_what_it_does_not_run_faster_or_cannot_hold():
    layer, packed = new_layer("LSTM"), new_packed()
    with mock.patch.multiple("hf_packfix.rnn.stack", uses_cudnn=lambda _: True, is_held_faster=lambda *_: False):
        assert rnn.run(layer, packed) is None
    both = new_layer("LSTM", bidirectional=True)
    with pytest.raises(AssertionError, match="left to torch"):
        ours("held LSTM", both, packed, new_state(both))
