"""The layers of ``hf_packfix.rnn`` compute what torch's own do, and leave to torch what they do not cover."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from hf_packfix import rnn
from hf_packfix.rnn import cost
from hf_packfix.rnn.schedule import Schedule

KINDS = ["LSTM", "GRU", "tanh", "relu"]
#: Against torch: how far apart results may be, relative to the largest of them.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}
LENGTHS = [3, 12, 1, 12, 7]


@pytest.fixture(autouse=True)
def always_faster(monkeypatch) -> None:
    """Run here whatever the cost model says: the packings of these tests are small."""
    monkeypatch.setattr("hf_packfix.rnn.stack.has_enough_steps", lambda *_: True)
    monkeypatch.setattr("hf_packfix.rnn.stack.is_one_block", lambda *_: False)


def new_layer(kind: str, inputs: int = 3, hidden: int = 4, **options: Any) -> nn.RNNBase:
    if kind in ("tanh", "relu"):
        return nn.RNN(inputs, hidden, nonlinearity=kind, **options)
    return getattr(nn, kind)(inputs, hidden, **options)


def new_packed(lengths: list[int] = LENGTHS, inputs: int = 3, *, is_sorted: bool = False, **options: Any):
    lengths = sorted(lengths, reverse=True) if is_sorted else lengths
    packed = pack_sequence([torch.randn(n, inputs, **options) for n in lengths], enforce_sorted=is_sorted)
    return packed._replace(data=packed.data.requires_grad_())


def new_state(layer: nn.RNNBase, sequences: int) -> Any:
    shape = (layer.num_layers * (1 + layer.bidirectional), sequences, layer.hidden_size)
    dtype = layer.weight_ih_l0.dtype
    hidden, cell = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    return (hidden, cell) if layer.mode == "LSTM" else hidden


def flat(result: tuple[PackedSequence, Any]) -> list[Tensor]:
    output, state = result
    return [output.data, *(state if isinstance(state, tuple) else [state])]


def leaves(layer: nn.RNNBase, packed: PackedSequence, state: Any) -> list[Tensor]:
    states = [] if state is None else list(state) if isinstance(state, tuple) else [state]
    return [packed.data, *states, *layer.parameters()]


def gradients(results: list[Tensor], inputs: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (torch.randn(r.shape, generator=generator, dtype=r.dtype) * r).sum() / r.numel() ** 0.5 for r in results
    )
    return torch.autograd.grad(loss, inputs, **options)


def assert_close(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        scale = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[theirs.dtype] * scale)


def assert_as_torch(layer: nn.RNNBase, packed: PackedSequence, state: Any = None) -> None:
    torch.manual_seed(5)
    ours = rnn.run(layer, packed, state)
    assert ours is not None
    drawn = torch.get_rng_state()
    torch.manual_seed(5)
    theirs = layer(packed, state)
    assert torch.equal(drawn, torch.get_rng_state())
    assert type(ours[0]) is type(theirs[0])
    assert type(ours[1]) is type(theirs[1])
    for index in range(1, 4):
        assert ours[0][index] is theirs[0][index]
    assert_close(flat(ours), flat(theirs))
    inputs = leaves(layer, packed, state)
    assert_close(gradients(flat(ours), inputs), gradients(flat(theirs), inputs))


# --- equality -------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_results_and_gradients_are_those_of_torch(data):
    def draw(strategy):
        return data.draw(strategy)

    torch.manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    inputs, hidden = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    options = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.4])),
        "batch_first": draw(st.booleans()),
        "dtype": dtype,
    }
    with warnings.catch_warnings(action="ignore"):  # dropout with one layer
        layer = new_layer(draw(st.sampled_from(KINDS)), inputs, hidden, **options)
    layer.train(draw(st.booleans()))
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    packed = new_packed(lengths, inputs, is_sorted=draw(st.booleans()), dtype=dtype)
    state = new_state(layer, len(lengths)) if draw(st.booleans()) else None
    with mock.patch("hf_packfix.rnn.steps._CHUNK_BYTES", 1), mock.patch("hf_packfix.rnn.steps._FEWEST_ROWS", 4):
        assert_as_torch(layer, packed, state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_long_sequences_of_many_chunks(kind, bidirectional):
    torch.manual_seed(0)
    layer = new_layer(kind, 16, 32, bidirectional=bidirectional, num_layers=2)
    packed = new_packed([300, 4, 55, 120, 30, 7, 30, 299], 16)
    assert_as_torch(layer, packed, new_state(layer, 8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["output", "state", "inputs alone", "weights alone", "some weights"])
def test_parts_of_the_graph(kind, part):
    torch.manual_seed(0)
    layer, packed = new_layer(kind, dtype=torch.float64), new_packed(dtype=torch.float64)
    inputs = leaves(layer, packed, None)
    if part == "inputs alone":
        layer.requires_grad_(False)
        inputs = [packed.data]
    elif part == "weights alone":
        packed = packed._replace(data=packed.data.detach())
        inputs = inputs[1:]
    elif part == "some weights":
        layer.weight_hh_l0.requires_grad_(False)
        layer.bias_ih_l0.requires_grad_(False)
        inputs = [leaf for leaf in inputs if leaf.requires_grad]
    which = {"output": slice(0, 1), "state": slice(1, None)}.get(part, slice(None))
    ours, theirs = (flat(function(packed))[which] for function in (lambda p: rnn.run(layer, p), layer))
    assert_close(gradients(ours, inputs), gradients(theirs, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_accumulate_and_the_graph_can_be_kept(kind):
    torch.manual_seed(0)
    layer, packed = new_layer(kind), new_packed()
    loss = rnn.run(layer, packed)[0].data.sum()
    loss.backward(retain_graph=True)
    once = [weight.grad.clone() for weight in layer.parameters()]
    biases = [layer.bias_ih_l0.grad, layer.bias_hh_l0.grad]
    assert biases[0].data_ptr() != biases[1].data_ptr()
    loss.backward()
    assert_close([weight.grad for weight in layer.parameters()], [2 * value for value in once])


def test_what_the_backward_needs_may_not_change():
    packed = new_packed()
    output = rnn.run(nn.GRU(3, 4), packed)[0].data
    loss = output.sum()
    output.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_under_autocast_keeps_the_precision_of_its_forward(kind, create_graph):
    torch.manual_seed(0)
    layer, packed = new_layer(kind), new_packed()
    inputs = leaves(layer, packed, None)
    expected = gradients(flat(layer(packed)), inputs)
    results = flat(rnn.run(layer, packed))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(gradients(results, inputs, create_graph=create_graph), expected)


# --- gradients of gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradcheck_and_gradgradcheck(kind, bidirectional):
    torch.manual_seed(0)
    layer = new_layer(kind, 2, 2, bidirectional=bidirectional, dtype=torch.float64)
    packed = new_packed([2, 3, 1], 2, dtype=torch.float64)
    state = new_state(layer, 3)
    inputs = leaves(layer, packed, state)
    names = [name for name, _ in layer.named_parameters()]
    states = 2 if kind == "LSTM" else 1

    def function(data: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        hx = others[:states] if states == 2 else others[0]
        values = dict(zip(names, others[states:], strict=True))
        return torch.func.functional_call(
            Ours(layer), {f"layer.{k}": v for k, v in values.items()}, (packed, data, hx)
        )

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


class Ours(nn.Module):
    """A layer as a function of tensors that is never torch's own."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, packed: PackedSequence, data: Tensor, hx: Any) -> tuple[Tensor, ...]:
        result = rnn.run(self.layer, packed._replace(data=data), hx)
        assert result is not None
        return tuple(flat(result))


@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_on_the_gradient(kind):
    torch.manual_seed(0)
    layer = new_layer(kind, num_layers=2, bidirectional=True, dtype=torch.float64)
    packed = new_packed(dtype=torch.float64)
    inputs = leaves(layer, packed, None)

    def penalty(function: Any) -> tuple[Tensor, ...]:
        # The state depends on the data: what flows through it is counted once.
        state = packed.data.mean() * torch.ones(4, len(LENGTHS), 4, dtype=torch.float64)
        state = (state, state.sin()) if kind == "LSTM" else state
        first = gradients(flat(function(packed, state)), inputs, create_graph=True)
        return first + torch.autograd.grad(sum((g**2).sum() for g in first), inputs)

    assert_close(penalty(lambda *a: rnn.run(layer, *a)), penalty(layer))


@pytest.mark.parametrize("kind", KINDS)
def test_a_vectorized_backward(kind):
    torch.manual_seed(0)
    layer, packed = new_layer(kind, dtype=torch.float64), new_packed([2, 1], dtype=torch.float64)
    weights = torch.randn(5, 3, 4, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(function(packed)[0].data, packed.data, weights, is_grads_batched=True)
        for function in (lambda p: rnn.run(layer, p), layer)
    )
    assert_close(ours, theirs)


# --- what is left to torch ------------------------------------------------------------------------------


def as_half(tensor: Tensor) -> Tensor:
    return tensor.detach().bfloat16().requires_grad_()


class Subclass(Tensor):
    pass


class OwnChecks(nn.LSTM):
    def check_forward_args(self, *arguments: Any) -> None:
        super().check_forward_args(*arguments)


class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Dispatch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def assert_left_to_torch(layer: nn.RNNBase, packed: Any, state: Any = None) -> None:
    assert rnn.run(layer, packed, state) is None


@pytest.mark.parametrize("kind", KINDS)
def test_left_to_torch_by_layer_and_data(kind):
    layer, packed = new_layer(kind), new_packed()
    assert rnn.run(layer, packed) is not None
    assert_left_to_torch(layer, packed.data)
    assert_left_to_torch(layer, None)
    assert_left_to_torch(new_layer(kind, dtype=torch.bfloat16), packed._replace(data=as_half(packed.data)))
    assert_left_to_torch(new_layer(kind, device="meta"), packed.to("meta"))
    assert_left_to_torch(layer, packed._replace(data=packed.data.as_subclass(Subclass)))
    weight = layer.weight_hh_l0
    layer.weight_hh_l0 = nn.Parameter(weight.detach().as_subclass(Subclass))
    assert_left_to_torch(layer, packed)
    layer.weight_hh_l0 = nn.Parameter(weight.detach().double())
    assert_left_to_torch(layer, packed)


def test_left_to_torch_by_options():
    packed = new_packed()
    assert_left_to_torch(nn.LSTM(3, 4, proj_size=2), packed)
    assert_left_to_torch(OwnChecks(3, 4), packed)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_is_left_to_torch(kind):
    layer, packed = new_layer(kind), new_packed()
    with torch.no_grad():
        assert_left_to_torch(layer, packed)
    with torch.inference_mode():
        assert_left_to_torch(layer, packed)
    assert_left_to_torch(layer.requires_grad_(False), packed._replace(data=packed.data.detach()))


@pytest.mark.parametrize("kind", KINDS)
def test_left_to_torch_by_what_surrounds_it(kind):
    layer, packed = new_layer(kind), new_packed()
    with torch.autocast("cpu", torch.bfloat16):
        assert_left_to_torch(layer, packed)
    with Mode():
        assert_left_to_torch(layer, packed)
    with Dispatch():
        assert_left_to_torch(layer, packed)
    with forward_ad.dual_level():
        assert_left_to_torch(layer, packed)
    with mock.patch("hf_packfix.rnn.coverage._is_compiling", return_value=True):
        assert_left_to_torch(layer, packed)
    assert rnn.run(layer, packed) is not None

    def function(data: Tensor) -> Tensor:
        assert_left_to_torch(layer, packed._replace(data=data))
        assert_left_to_torch(layer, packed)
        return data.sum()

    torch.func.grad(function)(packed.data)
    torch.func.vmap(function)(packed.data.detach()[None])
    torch.jit.trace(function, packed.data.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_function_runs_torchs_own(kind):
    # "eager" captures and runs the graphs without a compiler.
    layer, packed = new_layer(kind), new_packed()
    calls = []

    def function(data: Tensor) -> Tensor:
        result = rnn.run(layer, packed._replace(data=data))
        calls.append(result is None)
        return (layer(packed._replace(data=data)) if result is None else result)[0].data * 2

    compiled = torch.compile(function, backend="eager")
    torch.testing.assert_close(compiled(packed.data), layer(packed)[0].data * 2)
    assert calls[-1]


def inconsistent_sequences(packed: PackedSequence) -> dict[str, PackedSequence]:
    sizes = packed.batch_sizes
    return {
        "3-D": packed._replace(data=packed.data[None]),
        "another number of features": packed._replace(data=packed.data[:, :2]),
        "another dtype": packed._replace(data=packed.data.double()),
        "too many rows": packed._replace(data=torch.cat([packed.data, packed.data])),
        "too few rows": packed._replace(data=packed.data[:-1]),
        "increasing": packed._replace(batch_sizes=sizes.flip(0)),
        "int32": packed._replace(batch_sizes=sizes.int()),
        "no steps": packed._replace(batch_sizes=sizes[:0], data=packed.data[:0]),
        "indices too short": packed._replace(sorted_indices=packed.sorted_indices[:-1]),
        "indices as floats": packed._replace(unsorted_indices=packed.unsorted_indices.float()),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", inconsistent_sequences(new_packed()))
def test_inconsistent_sequences_are_left_to_torch(kind, name):
    assert_left_to_torch(new_layer(kind), inconsistent_sequences(new_packed())[name])


@pytest.mark.parametrize("kind", KINDS)
def test_bad_states_are_left_to_torch(kind):
    layer, packed = new_layer(kind), new_packed()
    state = new_state(layer, len(LENGTHS))
    assert rnn.run(layer, packed, state) is not None
    assert_left_to_torch(layer, packed, torch.zeros(1, 2, 4))
    assert_left_to_torch(layer, packed, (torch.zeros(1, 5, 4),))
    if kind == "LSTM":
        assert_left_to_torch(layer, packed, state[0])
        assert_left_to_torch(layer, packed, (state[0], state[1].double()))
        assert_left_to_torch(layer, packed, (state[0], state[1][:, :3]))
    else:
        assert_left_to_torch(layer, packed, (state, state))
        assert_left_to_torch(layer, packed, state.double())


# --- the cost model, the schedule, dropout, memory --------------------------------------------------------


@pytest.mark.parametrize(("mode", "fewest"), cost._FEWEST_STEPS.items())
def test_a_few_steps_are_left_to_torch(mode, fewest):
    assert cost.has_enough_steps(mode, torch.ones(fewest))
    assert not cost.has_enough_steps(mode, torch.ones(fewest - 1))


def test_an_lstm_over_one_length_is_left_to_onednn():
    assert cost.is_one_block("LSTM", torch.float32, [3] * 50)
    assert not cost.is_one_block("LSTM", torch.float32, [3] * 50 + [2])
    assert not cost.is_one_block("LSTM", torch.float64, [3] * 50)
    assert not cost.is_one_block("GRU", torch.float32, [3] * 50)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_model_is_asked(kind, monkeypatch):
    layer, packed = new_layer(kind), new_packed()
    monkeypatch.setattr("hf_packfix.rnn.stack.is_one_block", lambda *_: True)
    assert_left_to_torch(layer, packed)
    monkeypatch.undo()
    assert_left_to_torch(layer, new_packed([5, 4]))
    assert rnn.run(layer, packed) is not None


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 20))
def test_the_schedule(lengths, rows):
    packed = pack_sequence([torch.tensor([[i, t] for t in range(n)]) for i, n in enumerate(sorted(lengths)[::-1])])
    schedule = Schedule(packed.batch_sizes, packed.batch_sizes.tolist())
    steps = packed.data.tolist()
    ends = dict(steps)  # the last step of every rank
    assert [steps[row] for row in schedule.first_rows] == [[rank, 0] for rank in range(len(lengths))]
    assert [steps[row] for row in schedule.last_rows] == [[rank, ends[rank]] for rank in range(len(lengths))]
    for row, (rank, step) in enumerate(steps):
        if step:
            assert steps[schedule.rows_before[row]] == [rank, step - 1]
        if step < ends[rank]:
            assert steps[schedule.rows_after[row]] == [rank, step + 1]
        assert steps[schedule.reversal[row]] == [rank, ends[rank] - step]
    chunks = list(schedule.chunks(rows, backwards=False))
    assert list(schedule.chunks(rows, backwards=True)) == chunks[::-1]
    assert [size for chunk in chunks for size in chunk.sizes] == schedule.sizes
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    for chunk in chunks:
        assert sum(chunk.sizes) == chunk.stop - chunk.start < rows + len(lengths)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_draws_what_torch_draws(kind, bidirectional):
    torch.manual_seed(0)
    layer = new_layer(kind, num_layers=3, dropout=0.5, bidirectional=bidirectional, dtype=torch.float64)
    packed = new_packed(dtype=torch.float64)
    masks: list[list[Tensor]] = []
    for function in (lambda p: rnn.run(layer, p), layer):
        with mock.patch("torch.dropout", wraps=torch.dropout) as dropout:
            torch.manual_seed(3)
            output = function(packed)[0].data
        masks.append([output, torch.rand(3)])
        assert dropout.call_count == (2 if function is not layer else 0)
    assert_close(masks[0], masks[1])
    assert torch.equal(masks[0][1], masks[1][1])
    # A mask that differs in one place gives another result.
    assert not torch.allclose(masks[0][0], rnn.run(layer, packed)[0].data)


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


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_layers_are_torchs_layers(name):
    torch.manual_seed(0)
    theirs = getattr(nn, name)(3, 4, 2, bidirectional=True, batch_first=True)
    ours = getattr(rnn, name)(3, 4, 2, bidirectional=True, batch_first=True)
    assert isinstance(ours, type(theirs))
    ours.load_state_dict(theirs.state_dict())
    packed, padded = new_packed(), torch.randn(2, 5, 3)
    seen = []
    ours.register_forward_hook(lambda *_: seen.append(1))
    for layer in (ours, copy.deepcopy(ours)):
        assert_close(flat(layer(packed)), flat(theirs(packed)))
        assert torch.equal(layer(padded)[0], theirs(padded)[0])
        assert repr(layer) == repr(theirs)
    assert len(seen) == 4
    ours._forward_hooks.clear()
    assert_close(flat(pickle.loads(pickle.dumps(ours))(packed)), flat(theirs(packed)))
    assert "LSTMFunction" not in repr(theirs(packed)[0].data.grad_fn)
    bad = packed._replace(data=packed.data[:, :2])
    with pytest.raises(RuntimeError) as expected:
        theirs(bad)
    with pytest.raises(RuntimeError) as found:
        ours(bad)
    assert str(found.value) == str(expected.value)
