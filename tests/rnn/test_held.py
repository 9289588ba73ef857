"""Layers over padding that holds their state: what they do beside torch's results, which ``test_stack`` compares."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from hf_packfix.rnn import held
from hf_packfix.rnn.held import is_held_faster, run_held
from tests.support.recurrent import (
    HELD,
    LENGTHS,
    assert_as_torch,
    assert_close,
    assert_equal_to_torch,
    flat,
    gradients,
    new_layer,
    new_packed,
    ours,
)


def new_sorted(*args: Any, **options: Any) -> PackedSequence:
    return new_packed(*args, is_sorted=True, **options)


def run(layer: nn.RNNBase, packed: PackedSequence) -> list[Tensor]:
    """Return the output data and the final states of a sorted sequence, without what is around ``run_held``."""
    weights = [[*tensors, *([] if layer.bias else [None, None])] for tensors in layer.all_weights]
    output, finals = run_held(
        layer.mode,
        packed.data,
        packed.batch_sizes.tolist(),
        [],
        weights,
        bidirectional=layer.bidirectional,
        dropout=layer.dropout,
        training=layer.training,
    )
    return [output, *finals]


@pytest.mark.parametrize("kind", HELD)
def test_a_width_whose_inputs_are_filled_up_to_128(kind):
    assert_equal_to_torch(kind, new_layer(kind, 130, 256, num_layers=2), new_packed([4, 2], 130))


@pytest.mark.parametrize("kind", HELD)
def test_weights_that_autocast_flattens(kind, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
    layer, packed = new_layer(kind, num_layers=2, bidirectional=True), new_packed()
    assert_equal_to_torch(kind, layer, packed)
    with mock.patch.object(held._Flat, "apply", side_effect=AssertionError):
        ours(kind, layer, packed)


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_column_shuts_and_opens_gates_exactly(kind, dtype):
    column = held._column(kind.removeprefix("held "), 2, 8, dtype, (torch.device("cpu"),))
    assert column.isfinite().all()
    for other in (-50.0, 0.0, 50.0):  # what the other columns and the bias may add
        opened = torch.sigmoid(column[:, 0].float() + other).view(-1, 2)[:, 0].tolist()
        assert opened[:2] == ([0.0, 1.0] if "LSTM" in kind else [torch.sigmoid(torch.tensor(other)).item(), 1.0])
    assert not column[:, 1:].any()


@pytest.mark.parametrize("kind", HELD)
def test_bfloat16(kind):
    layer = new_layer(kind, 8, 16, num_layers=2, bidirectional=True, dtype=torch.bfloat16)
    packed = new_sorted(LENGTHS, 8, dtype=torch.bfloat16)
    assert_close(run(layer, packed), flat(layer(packed)))


# --- padding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HELD)
def test_padding_is_zero_but_for_the_column(kind, monkeypatch):
    inputs = []
    layer, packed = new_layer(kind, num_layers=2), new_sorted()
    name = layer.mode.lower()
    original = getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda *a: inputs.append(a[0]) or original(*a))
    run(layer, packed)
    padded, lengths = pad_packed_sequence(packed)
    behind = torch.arange(12)[:, None] >= lengths
    first, second = inputs
    torch.testing.assert_close(first[..., :3], padded, rtol=0, atol=0)
    for inputs_of_layer, width in ((first, 3), (second, 4)):
        assert inputs_of_layer.shape == (12, 5, 8)
        assert torch.equal(inputs_of_layer[..., width:], behind[..., None].double().expand(-1, -1, 8 - width))
        assert inputs_of_layer.isfinite().all()


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_where_torch_has_them(kind, bidirectional, value):
    def case(layer: Any) -> Any:
        packed = new_packed()
        with torch.no_grad():
            packed.data[6, 0] = value  # the second sequence at its second step
        results = flat(layer(packed))
        assert results[0].isfinite().any()
        return [*results, *gradients(results, [packed.data])]

    assert_as_torch(case, kind, num_layers=2, bidirectional=bidirectional)


@pytest.mark.parametrize("kind", HELD)
def test_an_infinite_gradient_is_not_lost(kind):
    layer, packed = new_layer(kind), new_sorted()
    ranks = torch.cat([torch.arange(int(size)) for size in packed.batch_sizes])
    for result in run(layer, packed):
        gradient = torch.zeros_like(result)
        gradient.view(-1, 4)[2, 0] = float("inf")
        found = torch.autograd.grad(result, [packed.data, *layer.parameters()], gradient, retain_graph=True)
        assert not any(tensor.isfinite().all() for tensor in found)
        # A loss scaler looks for just this; other sequences have their own gradients.
        assert found[0][ranks != 2].isfinite().all()


# --- what happens between forward and backward ----------------------------------------------------------


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("changed", ["weights", "data"])
def test_what_is_replaced_after_the_forward_does_not_matter(kind, changed):
    layer, packed = new_layer(kind), new_sorted()
    inputs = [packed.data] if changed == "weights" else [*layer.parameters()]
    expected = gradients(flat(layer(packed)), inputs)
    results = run(layer, packed)
    if changed == "data":
        packed.data.detach().zero_()
    else:
        for weight in layer.parameters():
            weight.data = torch.zeros(0)
    assert_close(gradients(results, inputs), expected)


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
def test_a_weight_that_is_changed_in_place_is_an_error(kind, name):
    """As in torch's layers on a GPU; on a CPU they do not save the biases."""
    layer, packed = new_layer(kind), new_packed()
    loss = run(layer, packed)[0].sum()
    with torch.no_grad():
        getattr(layer, name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- dropout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HELD)
def test_dropout_is_between_layers(kind, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "dropout", lambda x, p, train: calls.append((p, train)) or 2 * x)
    layer, packed = new_layer(kind, num_layers=3, dropout=0.25), new_sorted()
    found = run(layer, packed)[0]
    assert calls == [(0.25, True)] * 2
    assert_close(run(layer.eval(), packed), flat(layer(packed)))
    assert len(calls) == 2
    for number in range(3):
        one = new_layer(kind, 4 if number else 3)
        one.load_state_dict({name: getattr(layer, f"{name[:-1]}{number}") for name in one.state_dict()})
        packed = packed._replace(data=one(packed)[0].data * (2 if number < 2 else 1))
    assert_close([found], [packed.data])


# --- launches -------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Lists the operations that a GPU runs a kernel for."""

    VIEWS = (
        "detach",
        "view",
        "slice",
        "select",
        "expand",
        "unsqueeze",
        "split_with_sizes",
        "_unsafe_view",
        "is_same_size",
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).split(".")[1]
        if name not in self.VIEWS and "empty" not in name:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


class Layer(torch.autograd.Function):
    """Stands in for ``torch.lstm`` and ``torch.gru``, with gradients of the right layouts and no operations."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.inputs = (inputs, *weights)
        directions, width = len(weights) // 4, weights[1].shape[1]
        state = inputs.new_empty(directions, inputs.shape[1], width)
        return inputs.new_empty(*inputs.shape[:2], directions * width), state

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.inputs)


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_operations_around_the_kernels(kind, layers, bidirectional, monkeypatch):
    monkeypatch.setattr(torch, "lstm", lambda x, _, weights, *__: (*Layer.apply(x, *weights), torch.empty(1)))
    monkeypatch.setattr(torch, "gru", lambda x, _, weights, *__: Layer.apply(x, *weights))
    layer, packed = new_layer(kind, 4, 4, num_layers=layers, bidirectional=bidirectional), new_sorted(inputs=4)
    run(layer, packed)  # makes what is kept
    with Operations() as forward:
        output = run(layer, packed)[0]
    with Operations() as backward:
        output.backward(output.detach())
    # The column of the input, that of each direction's weights, and all weights in a buffer; the last hidden state.
    of_layer = ["cat"] * (3 + bidirectional) + ["index_select"] * ("LSTM" in kind)
    of_states = ["cat"] * ((2 if "LSTM" in kind else 1) if layers == 2 else 0)
    assert forward.names == ["new_zeros", "index_copy_", *of_layer * layers, "index_select", *of_states]
    # The gradient of the first weight of each direction, a part of its rows, is copied when it becomes `grad`.
    copies = ["copy_"] * (layers * (1 + bidirectional))
    assert sorted(backward.names) == sorted(["new_zeros", "index_add", "index_select", *copies])


# --- what is kept ---------------------------------------------------------------------------------------


def test_weights_lie_in_one_buffer_in_the_order_of_cudnn(monkeypatch):
    seen = []
    original = torch.lstm
    monkeypatch.setattr(torch, "lstm", lambda *a: seen.append(a[2]) or original(*a))
    for bias in (True, False):
        run(new_layer("LSTM", bidirectional=True, bias=bias), new_sorted())
        weights = seen.pop()
        # (w_ih, w_hh) of every direction, then (b_ih, b_hh) of every direction.
        ordered = [weights[index] for index in (0, 1, 4, 5, 2, 3, 6, 7)]
        ends = 0
        for weight in ordered:
            assert weight.is_contiguous()
            assert weight.storage_offset() == ends
            assert weight.untyped_storage().data_ptr() == weights[0].untyped_storage().data_ptr()
            ends += weight.numel()
        assert ends * 8 == weights[0].untyped_storage().nbytes()


def test_places_are_shared_by_all_layers_over_a_packing():
    packed, layer = new_packed(), new_layer("GRU", num_layers=2)
    ours("held GRU", layer, packed)
    kept = held._kept
    ours("held GRU", layer, packed._replace(batch_sizes=packed.batch_sizes.clone()))
    assert held._kept is kept
    with mock.patch("numpy.arange", side_effect=AssertionError):
        ours("held GRU", layer, packed)
    assert_equal_to_torch("held GRU", layer, new_packed([5, 5]))
    assert held._kept is not kept
    for bidirectional, dtype in ((False, torch.float64), (True, torch.float64), (False, torch.float32)):
        changed = new_layer("GRU", bidirectional=bidirectional, dtype=dtype)
        assert_equal_to_torch("held GRU", changed, new_packed(dtype=dtype))


def test_what_inference_mode_keeps_does_not_reach_training():
    packed, layer = new_sorted([9, 2, 1]), new_layer("LSTM", 3, 5, bias=False)
    with torch.inference_mode():
        found = run(layer, packed)
    torch.testing.assert_close([result.clone() for result in found], flat(layer(packed)))
    assert_equal_to_torch("held LSTM", layer, packed)


# --- the cost model -------------------------------------------------------------------------------------


def faster(mode: str = "LSTM", dtype: Any = torch.float32, width: int = 64, **options: Any) -> bool:
    sizes = options.pop("sizes", [32] * 60)
    properties = mock.Mock(major=9, minor=0, multi_processor_count=132)
    properties.configure_mock(**options.pop("device", {}))
    with mock.patch("torch.cuda.get_device_properties", return_value=properties):
        return is_held_faster(mode, dtype, width, sizes, options.pop("directions", 1), torch.device("cuda", 0))


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_narrow_layers_are_taken(mode, dtype):
    for width in (1, 64, 128):
        assert faster(mode, dtype, width)
        assert faster(mode, dtype, width, directions=2)
    assert not faster(mode, dtype, 64, sizes=[512] * 60)


def test_what_was_slower_is_left_to_torch():
    assert faster(width=192)
    assert not faster("GRU", width=192)
    for width in (193, 256, 512, 1024):
        assert not faster(width=width)
    assert not faster("RNN_TANH")
    assert not faster(dtype=torch.float64)
    assert not faster(dtype=torch.bfloat16)


def test_wide_layers_in_half_precision():
    half = torch.float16
    for width in (256, 512, 1024):
        assert faster("LSTM", half, width)
        assert not faster("GRU", half, width)
        assert not faster("LSTM", half, width, directions=2)
        assert not faster("LSTM", half, width, sizes=[30] * 60)  # not a multiple of 8
        assert not faster("LSTM", half, width, sizes=[136] * 60)
    assert not faster("LSTM", half, 200)
    assert not faster("LSTM", half, 1152)
    for device in ({"major": 7}, {"minor": 6}, {"multi_processor_count": 58}):
        assert not faster("LSTM", half, 512, device=device)


def test_a_few_steps_and_much_padding_are_left_to_torch():
    assert not faster(sizes=[32] * 30)
    assert faster(sizes=[32] * 30, directions=2)
    assert not faster(sizes=[32] + [1] * 200)
    assert faster(sizes=[32] * 10 + [4] * 200)
