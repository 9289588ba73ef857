"""Layers over padding that holds their state compute what torch's packed layers do; here on a CPU."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from hf_packfix.rnn import held
from hf_packfix.rnn.held import is_held_faster, run_held

KINDS = ["LSTM", "GRU"]
#: Against torch: how far apart results may be, relative to the largest of them.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 3e-2}
LENGTHS = [3, 12, 1, 12, 7]
Results = list[Tensor]


def new_layer(kind: str, inputs: int = 3, hidden: int = 4, **options: Any) -> nn.RNNBase:
    torch.manual_seed(0)
    return getattr(nn, kind)(inputs, hidden, **options)


def new_packed(lengths: list[int] = LENGTHS, inputs: int = 3, **options: Any) -> PackedSequence:
    """Return random sequences, the longest first, whose data needs a gradient."""
    rows = [torch.randn(n, inputs, **options) for n in sorted(lengths, reverse=True)]
    packed = pack_sequence(rows)
    return packed._replace(data=packed.data.requires_grad_())


def new_state(layer: nn.RNNBase, sequences: int) -> tuple[Tensor, ...]:
    shape = (layer.num_layers * (1 + layer.bidirectional), sequences, layer.hidden_size)
    count = 2 if layer.mode == "LSTM" else 1
    return tuple(torch.randn(shape, dtype=layer.weight_ih_l0.dtype, requires_grad=True) for _ in range(count))


def ours(layer: nn.RNNBase, packed: PackedSequence, state: tuple[Tensor, ...] = ()) -> Results:
    """Return the output data and the final states."""
    weights = [[*tensors, *([] if layer.bias else [None, None])] for tensors in layer.all_weights]
    output, finals = run_held(
        layer.mode,
        packed.data,
        packed.batch_sizes.tolist(),
        state,
        weights,
        bidirectional=layer.bidirectional,
        dropout=layer.dropout,
        training=layer.training,
    )
    return [output, *finals]


def torchs(layer: nn.RNNBase, packed: PackedSequence, state: tuple[Tensor, ...] = ()) -> Results:
    hx = None if not state else state if layer.mode == "LSTM" else state[0]
    output, final = layer(packed, hx)
    return [output.data, *(final if isinstance(final, tuple) else [final])]


def gradients(results: Results, inputs: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(r.shape, generator=generator).to(r.dtype) * r).sum() / r.numel() ** 0.5 for r in results)
    return torch.autograd.grad(loss, inputs, **options)


def assert_close(found: Any, expected: Any, tolerance: float | None = None) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        scale = max(1.0, float(other.detach().nan_to_num(0, 0, 0).abs().max()))
        atol = (tolerance or TOLERANCE[other.dtype]) * scale
        torch.testing.assert_close(one, other, rtol=0, atol=atol, equal_nan=True)


def assert_as_torch(layer: nn.RNNBase, packed: PackedSequence, state: tuple[Tensor, ...] = ()) -> None:
    found, expected = ours(layer, packed, state), torchs(layer, packed, state)
    assert_close(found, expected)
    inputs = [packed.data, *state, *layer.parameters()]
    assert_close(gradients(found, inputs), gradients(expected, inputs))


# --- equality -------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_results_and_gradients_are_those_of_torch(data):
    def draw(strategy):
        return data.draw(strategy)

    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from([torch.float32, torch.float64]))
    inputs, hidden = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    options = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    layer = new_layer(kind, inputs, hidden, dtype=dtype, **options)
    torch.manual_seed(draw(st.integers(0, 1000)))
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    packed = new_packed(lengths, inputs, dtype=dtype)
    takes_state = kind == "GRU" or not layer.bidirectional
    state = new_state(layer, len(lengths)) if takes_state and draw(st.booleans()) else ()
    assert_as_torch(layer, packed, state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("scale", [1, 30])
def test_states_are_held_over_long_padding(kind, bidirectional, scale):
    layer = new_layer(kind, 16, 32, bidirectional=bidirectional, num_layers=2)
    with torch.no_grad():  # gates that are wide open or shut
        for name, weight in layer.named_parameters():
            weight.mul_(1 if "weight_hh" in name else scale)
    packed = new_packed([300, 4, 55, 120, 30, 1], 16)
    assert_close(ours(layer, packed), torchs(layer, packed), tolerance=1e-6 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_a_width_whose_inputs_are_filled_up_to_128(kind):
    assert_as_torch(new_layer(kind, 130, 256, num_layers=2), new_packed([4, 2], 130))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["output", "state", "inputs alone", "weights alone", "some weights"])
def test_parts_of_the_graph(kind, part):
    layer, packed = new_layer(kind, num_layers=2, dtype=torch.float64), new_packed(dtype=torch.float64)
    if part == "inputs alone":
        layer.requires_grad_(False)
    elif part == "weights alone":
        packed = packed._replace(data=packed.data.detach())
    elif part == "some weights":
        for name in ("weight_hh_l0", "bias_ih_l0", "weight_ih_l1"):
            getattr(layer, name).requires_grad_(False)
    inputs = [leaf for leaf in (packed.data, *layer.parameters()) if leaf.requires_grad]
    which = {"output": slice(0, 1), "state": slice(1, None)}.get(part, slice(None))
    found, expected = ours(layer, packed)[which], torchs(layer, packed)[which]
    assert_close(gradients(found, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_recorded_that_needs_no_gradient(kind):
    layer, packed = new_layer(kind), new_packed()
    data = packed._replace(data=packed.data.detach())
    assert not any(result.requires_grad for result in ours(layer.requires_grad_(False), data))
    with torch.no_grad():
        assert not any(result.requires_grad for result in ours(layer, packed))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_accumulate_and_the_graph_can_be_kept(kind):
    layer, packed = new_layer(kind, bidirectional=True), new_packed()
    loss = ours(layer, packed)[0].sum()
    loss.backward(retain_graph=True)
    once = [weight.grad.clone() for weight in layer.parameters()]
    assert all(weight.grad.is_contiguous() for weight in layer.parameters())
    loss.backward()
    assert_close([weight.grad for weight in layer.parameters()], [2 * value for value in once])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_autocast_flattens(kind, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
    layer, packed = new_layer(kind, num_layers=2, bidirectional=True), new_packed()
    assert_as_torch(layer, packed)
    with mock.patch.object(held._Flat, "apply", side_effect=AssertionError):
        ours(layer, packed)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_computed(kind):
    layer = new_layer(kind)
    parametrize.register_parametrization(layer, "weight_ih_l0", nn.Tanh())
    parametrize.register_parametrization(layer, "weight_hh_l0", nn.Tanh())
    assert_as_torch(layer, new_packed())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_column_shuts_and_opens_gates_exactly(kind, dtype):
    column = held._column(kind, 2, 8, dtype, (torch.device("cpu"),))
    assert column.isfinite().all()
    for other in (-50.0, 0.0, 50.0):  # what the other columns and the bias may add
        opened = torch.sigmoid(column[:, 0].float() + other).view(-1, 2)[:, 0].tolist()
        assert opened[:2] == ([0.0, 1.0] if kind == "LSTM" else [torch.sigmoid(torch.tensor(other)).item(), 1.0])
    assert not column[:, 1:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind):
    layer = new_layer(kind, 8, 16, num_layers=2, bidirectional=True, dtype=torch.bfloat16)
    packed = new_packed(LENGTHS, 8, dtype=torch.bfloat16)
    assert_close(ours(layer, packed), torchs(layer, packed))


# --- padding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_zero_but_for_the_column(kind, monkeypatch):
    inputs = []
    original = getattr(torch, kind.lower())
    monkeypatch.setattr(torch, kind.lower(), lambda *a: inputs.append(a[0]) or original(*a))
    layer, packed = new_layer(kind, num_layers=2), new_packed()
    ours(layer, packed)
    padded, lengths = pad_packed_sequence(packed)
    behind = torch.arange(12)[:, None] >= lengths
    first, second = inputs
    torch.testing.assert_close(first[..., :3], padded, rtol=0, atol=0)
    for inputs_of_layer, width in ((first, 3), (second, 4)):
        assert inputs_of_layer.shape == (12, 5, 8)
        assert torch.equal(inputs_of_layer[..., width:], behind[..., None].float().expand(-1, -1, 8 - width))
        assert inputs_of_layer.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_where_torch_has_them(kind, bidirectional, value):
    layer = new_layer(kind, num_layers=2, bidirectional=bidirectional)
    packed = new_packed()
    with torch.no_grad():
        packed.data[6, 0] = value  # the second sequence at its second step
    found, expected = ours(layer, packed), torchs(layer, packed)
    assert_close(found, expected)
    assert found[0].isfinite().any()
    own, torch_s = (gradients(results, [packed.data])[0] for results in (found, expected))
    assert_close([own], [torch_s])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_infinite_gradient_is_not_lost(kind, which):
    layer, packed = new_layer(kind), new_packed()
    results = ours(layer, packed)
    if which >= len(results):
        pytest.skip("a GRU has one state")
    gradient = torch.zeros_like(results[which])
    gradient.view(-1, 4)[2, 0] = float("inf")
    found = torch.autograd.grad(results[which], [packed.data, *layer.parameters()], gradient)
    assert not any(tensor.isfinite().all() for tensor in found)
    # A loss scaler looks for just this; other sequences have their own gradients.
    ranks = torch.cat([torch.arange(int(size)) for size in packed.batch_sizes])
    assert found[0][ranks != 2].isfinite().all()


# --- what happens between forward and backward ----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
def test_all_results_may_be_changed_in_place(kind, options):
    layer, packed = new_layer(kind, **options), new_packed()
    inputs = [packed.data, *layer.parameters()]
    expected = gradients([result.relu() for result in torchs(layer, packed)], inputs)
    assert_close(gradients([result.relu_() for result in ours(layer, packed)], inputs), expected)
    results = ours(layer, packed)
    copies = [result * 1 for result in results]
    for result in results:
        result.detach().zero_()
    assert_close(gradients([copy.relu() for copy in copies], inputs), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_swapped_after_the_forward(kind):
    layer, packed = new_layer(kind), new_packed()
    inputs = [packed.data, *layer.parameters()]
    expected = gradients(torchs(layer, packed), inputs)
    results = ours(layer, packed)
    for weight in layer.parameters():
        weight.data = torch.zeros(0)
    found = gradients(results, inputs[:1])
    assert_close(found, expected[:1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
def test_a_weight_that_is_changed_in_place_is_an_error(kind, name):
    """As in torch's layers on a GPU; on a CPU they do not save the biases."""
    layer, packed = new_layer(kind), new_packed()
    loss = ours(layer, packed)[0].sum()
    with torch.no_grad():
        getattr(layer, name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_is_changed_in_place(kind):
    layer, packed = new_layer(kind), new_packed()
    expected = gradients(torchs(layer, packed), list(layer.parameters()))
    results = ours(layer, packed)
    with torch.no_grad():
        packed.data.zero_()
    assert_close(gradients(results, list(layer.parameters())), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients(kind):
    layer = new_layer(kind, 2, 2, num_layers=2, bidirectional=True, dtype=torch.float64)
    packed = new_packed([2, 3, 1], 2, dtype=torch.float64)
    inputs = [packed.data, *layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def function(data: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        all_weights = [list(weights[index : index + 4]) for index in range(0, len(weights), 4)]
        output, finals = run_held(kind, data, packed.batch_sizes.tolist(), [], all_weights, bidirectional=True)
        return output, *finals

    assert names[:4] == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vectorized_backward(kind):
    layer, packed = new_layer(kind, dtype=torch.float64), new_packed([2, 1], dtype=torch.float64)
    weights = torch.randn(5, 3, 4, dtype=torch.float64)
    inputs = [packed.data, *layer.parameters()]
    found, expected = (
        torch.autograd.grad(function(layer, packed)[0], inputs, weights, is_grads_batched=True)
        for function in (ours, torchs)
    )
    assert_close(found, expected)


# --- dropout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_between_layers(kind, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "dropout", lambda x, p, train: calls.append((p, train)) or 2 * x)
    layer, packed = new_layer(kind, num_layers=3, dropout=0.25), new_packed()
    found = ours(layer, packed)[0]
    assert calls == [(0.25, True)] * 2
    assert_close(ours(layer.eval(), packed), torchs(layer, packed))
    assert len(calls) == 2
    for number in range(3):
        one = new_layer(kind, 4 if number else 3)
        one.load_state_dict({name: getattr(layer, f"{name[:-1]}{number}") for name in one.state_dict()})
        packed = packed._replace(data=torchs(one, packed)[0] * (2 if number < 2 else 1))
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_operations_around_the_kernels(kind, layers, bidirectional, monkeypatch):
    monkeypatch.setattr(torch, "lstm", lambda x, _, weights, *__: (*Layer.apply(x, *weights), torch.empty(1)))
    monkeypatch.setattr(torch, "gru", lambda x, _, weights, *__: Layer.apply(x, *weights))
    layer, packed = new_layer(kind, 4, 4, num_layers=layers, bidirectional=bidirectional), new_packed(inputs=4)
    ours(layer, packed)  # makes what is kept
    with Operations() as forward:
        output = ours(layer, packed)[0]
    with Operations() as backward:
        output.backward(output.detach())
    # The column of the input, that of each direction's weights, and all weights in a buffer; the last hidden state.
    of_layer = ["cat"] * (3 + bidirectional) + ["index_select"] * (kind == "LSTM")
    of_states = ["cat"] * ((2 if kind == "LSTM" else 1) if layers == 2 else 0)
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
        ours(new_layer("LSTM", bidirectional=True, bias=bias), new_packed())
        weights = seen.pop()
        # (w_ih, w_hh) of every direction, then (b_ih, b_hh) of every direction.
        ordered = [weights[index] for index in (0, 1, 4, 5, 2, 3, 6, 7)]
        ends = 0
        for weight in ordered:
            assert weight.is_contiguous()
            assert weight.storage_offset() == ends
            assert weight.untyped_storage().data_ptr() == weights[0].untyped_storage().data_ptr()
            ends += weight.numel()
        assert ends * 4 == weights[0].untyped_storage().nbytes()


def test_places_are_shared_by_all_layers_over_a_packing():
    packed, layer = new_packed(), new_layer("GRU", num_layers=2)
    ours(layer, packed)
    kept = held._kept
    ours(layer, packed._replace(batch_sizes=packed.batch_sizes.clone()))
    assert held._kept is kept
    with mock.patch("numpy.arange", side_effect=AssertionError):
        ours(layer, packed)
    other = new_packed([5, 5])
    assert_as_torch(layer, other)
    assert held._kept is not kept
    assert_as_torch(layer, packed)
    for changed in (new_layer("GRU", bidirectional=True), new_layer("GRU", dtype=torch.float64)):
        assert_as_torch(
            changed, packed._replace(data=packed.data.detach().to(changed.weight_hh_l0.dtype).requires_grad_())
        )


def test_what_inference_mode_keeps_does_not_reach_training():
    packed, layer = new_packed([9, 2, 1]), new_layer("LSTM", 3, 5, bias=False)
    with torch.inference_mode():
        found = ours(layer, packed)
    expected = torchs(layer, packed)
    assert_close([result.clone() for result in found], expected)
    assert_as_torch(layer, packed)


# --- the cost model -------------------------------------------------------------------------------------


def faster(mode: str = "LSTM", dtype: Any = torch.float32, width: int = 64, **options: Any) -> bool:
    sizes = options.pop("sizes", [32] * 60)
    properties = mock.Mock(major=9, minor=0, multi_processor_count=132)
    properties.configure_mock(**options.pop("device", {}))
    with mock.patch("torch.cuda.get_device_properties", return_value=properties):
        return is_held_faster(mode, dtype, width, sizes, options.pop("directions", 1), torch.device("cuda", 0))


@pytest.mark.parametrize("mode", KINDS)
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
