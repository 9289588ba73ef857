"""The padded kernel on packed sequences: as exact as torch's packed layers, without waiting, in every precision."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import hf_packfix
from hf_packfix.rnn import held
from tests.gpu.device import DEVICE, ON_GPU, on_device
from tests.support.oracle import Tagger, new_trainer, packed_batch, padded_batch, rows
from tests.support.recurrent import flat

pytestmark = pytest.mark.gpu

#: Long-tailed, and a multiple of 8 sequences.
LENGTHS = (120, 64, 41, 30, 22, 9, 4, 1)
CELLS = ["LSTM", "GRU"]
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False},
    {"hidden_size": 128},
    {"num_layers": 3},
]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="of cuDNN")
Results = list[Tensor]


def new_layer(cell: str, input_size: int = 24, hidden_size: int = 64, **options: Any) -> nn.RNNBase:
    torch.manual_seed(0)
    layer: nn.RNNBase = getattr(nn, cell)(input_size, hidden_size, **options)
    return layer


def new_packed(width: int) -> PackedSequence:
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randn(length, width, generator=generator) for length in LENGTHS]
    return pack_sequence(sequences[::2] + sequences[1::2], enforce_sorted=False)


def place(layer: nn.RNNBase, packed: PackedSequence, **where: Any) -> tuple[nn.RNNBase, PackedSequence]:
    """Return copies somewhere else, with data that needs a gradient."""
    data = packed.data.to(**where).requires_grad_()
    return copy.deepcopy(layer).to(**where), packed.to(where.get("device", "cpu"))._replace(data=data)


def by_torch(layer: nn.RNNBase, packed: PackedSequence) -> Results:
    return flat(layer(packed))


def by_held(layer: nn.RNNBase, packed: PackedSequence) -> Results:
    weights = [[*tensors, *([] if layer.bias else [None, None])] for tensors in layer.all_weights]
    output, states = held.run_held(
        layer.mode, packed.data, packed.batch_sizes.tolist(), [], weights, bidirectional=layer.bidirectional
    )
    return [output, *(state.index_select(1, packed.unsorted_indices) for state in states)]


def with_gradients(run: Any, layer: nn.RNNBase, packed: PackedSequence) -> Results:
    """Return the results of a layer and the gradients of its data and weights."""
    results: Results = run(layer, packed)
    generator = torch.Generator().manual_seed(2)
    loss = sum(
        (torch.randn(result.shape, generator=generator).to(result.device, result.dtype) * result).float().sum()
        for result in results
    )
    assert isinstance(loss, Tensor)
    return [*results, *torch.autograd.grad(loss, [packed.data, *layer.parameters()])]


def errors(found: Results, exact: Results) -> list[float]:
    """Return how far results are from the exact ones, relative to the largest of each."""
    pairs = zip(found, exact, strict=True)
    return [float((a.detach().cpu().double() - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return a list of the modes of all calls of ``run_held`` by layers."""
    called: list[str] = []
    original = held.run_held

    def run_held(mode: str, *args: Any, **kwargs: Any) -> Any:
        called.append(mode)
        return original(mode, *args, **kwargs)

    monkeypatch.setattr("hf_packfix.rnn.stack.run_held", run_held, raising=False)
    yield called
    hf_packfix.enable(fast_rnn=False)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_exact(cell: str, shape: dict[str, Any]) -> None:
    layer, packed = new_layer(cell, **shape), new_packed(24)
    exact = with_gradients(by_torch, *place(layer, packed, dtype=torch.float64))
    found = with_gradients(by_held, *place(layer, packed, device=DEVICE))
    assert max(errors(found, exact)) < 1e-5


@needs_gpu
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_float16_rounds_as_torch(cell: str, shape: dict[str, Any]) -> None:
    layer, packed = place(new_layer(cell, **shape), new_packed(24), device=DEVICE, dtype=torch.float16)
    assert_rounds_as_torch(layer, packed)


@needs_gpu
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_autocast_rounds_as_torch(cell: str, dtype: torch.dtype, shape: dict[str, Any]) -> None:
    layer, packed = place(new_layer(cell, **shape), new_packed(24), device=DEVICE)
    with torch.autocast("cuda", dtype):
        assert_rounds_as_torch(layer, packed)


@needs_gpu
@pytest.mark.parametrize("how", ["half", "autocast"])
def test_a_wide_lstm_in_half_precision_rounds_as_torch(how: str) -> None:
    where = {"device": DEVICE, **({"dtype": torch.float16} if how == "half" else {})}
    layer, packed = place(new_layer("LSTM", 100, 256), new_packed(100), **where)
    with torch.autocast("cuda", enabled=how == "autocast"):
        assert_rounds_as_torch(layer, packed)


def assert_rounds_as_torch(layer: nn.RNNBase, packed: PackedSequence) -> None:
    """Compare the errors of both with each other: the results of float64 are those of the rounded weights."""
    exact_layer, exact_packed = copy.deepcopy(layer).double().cpu(), packed.to("cpu")
    data = exact_packed.data.detach().double().requires_grad_()
    with torch.autocast("cuda", enabled=False):
        exact = with_gradients(by_torch, exact_layer, exact_packed._replace(data=data))
    theirs, ours = (with_gradients(run, layer, packed) for run in (by_torch, by_held))
    assert [value.dtype for value in ours] == [value.dtype for value in theirs]
    for mine, other in zip(errors(ours, exact), errors(theirs, exact), strict=True):
        assert mine < 2 * other + 1e-3


@needs_gpu
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_waits_and_torch_does_not_copy_weights(cell: str, shape: dict[str, Any], autocast: bool) -> None:
    layer, packed = place(new_layer(cell, **shape), new_packed(24), device=DEVICE)
    other = pack_sequence([torch.randn(length, 24, device=DEVICE) for length in LENGTHS[:5]], enforce_sorted=False)
    with warnings.catch_warnings(), torch.autocast("cuda", enabled=autocast):
        warnings.filterwarnings("error", message="RNN module weights are not part of single contiguous chunk")
        by_held(layer, packed)[0].sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            by_held(layer, other)[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_layers_take_it(cell: str, shape: dict[str, Any], grad: bool, calls: list[str]) -> None:
    layer, packed = place(new_layer(cell, **shape), new_packed(24), device=DEVICE)
    with torch.set_grad_enabled(grad):
        expected = by_torch(layer, packed)
        hf_packfix.enable(fast_rnn=True)
        found = by_torch(layer, packed)
    assert calls == ([cell] if ON_GPU else [])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_initial_states(cell: str, bidirectional: bool, calls: list[str]) -> None:
    layer, packed = place(new_layer(cell, bidirectional=bidirectional), new_packed(24), device=DEVICE)
    state = torch.randn(1 + bidirectional, len(LENGTHS), 64, device=DEVICE, requires_grad=True)
    results = []
    for fast in (False, True):
        hf_packfix.enable(fast_rnn=fast)
        output, final = layer(packed, (state, state.sin()) if cell == "LSTM" else state)
        final = torch.cat(final) if cell == "LSTM" else final
        gradient = torch.autograd.grad(output.data.square().sum() + final.sum(), state)[0]
        results.append([output.data, final, gradient])
    assert calls == ([cell] if ON_GPU and not (cell == "LSTM" and bidirectional) else [])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("cell", CELLS)
def test_a_loss_scaler_finds_overflows(cell: str) -> None:
    layer, packed = place(new_layer(cell), new_packed(24), device=DEVICE)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    # torch.amp has it from 2.3 on, torch.cuda.amp warns of it later.
    scaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)(init_scale=2.0**40)
    before = layer.weight_hh_l0.detach().clone()
    steps = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = by_held(layer, packed)[0].float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(not torch.equal(before, layer.weight_hh_l0))
        assert layer.weight_hh_l0.isfinite().all()
    assert not steps[0]
    assert steps[-1]


@needs_gpu
@pytest.mark.parametrize("cell", CELLS)
def test_errors_are_those_of_torch(cell: str) -> None:
    layer, packed = place(new_layer(cell), new_packed(24), device=DEVICE)
    messages = []
    for run in (by_torch, by_held):
        first = torch.autograd.grad(run(layer, packed)[0].sum(), packed.data, create_graph=True)[0].sum()
        with pytest.raises(RuntimeError, match="CuDNN") as twice:
            first.backward()
        loss = run(layer, packed)[0].sum()
        with torch.no_grad():
            layer.bias_hh_l0.mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        messages.append(str(twice.value)[:120])
    assert messages[0] == messages[1]


def test_40_losses_of_a_training_run(tmp_path: Path, calls: list[str]) -> None:
    """Of a user's tagger, on sequences of up to 120 steps, in 40 steps of 8 sequences."""
    losses = []
    for fast in (False, True):
        hf_packfix.enable(fast_rnn=fast)
        changes = on_device(max_steps=40, logging_steps=1, per_device_train_batch_size=8, seed=0)
        trainer = new_trainer(tmp_path / str(fast), Tagger, rows(80, longest=120), packed_batch, **changes)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(calls) >= (30 if ON_GPU else 0)
    assert len(losses[0]) == 40
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("fast", [False, True])
def test_a_training_step_waits_no_more_often_than_with_padded_batches(
    tmp_path: Path, pinned: bool, fast: bool
) -> None:
    def without_mask(features: Any) -> dict[str, Any]:
        batch = padded_batch(features)
        del batch["attention_mask"]
        return batch

    def waits(collate: Any) -> int:
        changes = on_device(max_steps=20, per_device_train_batch_size=8, dataloader_pin_memory=pinned)
        trainer = new_trainer(tmp_path / collate.__name__, Tagger, rows(80, longest=120), collate, **changes)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                trainer.train()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)

    hf_packfix.enable(fast_rnn=fast)
    try:
        waits(packed_batch)  # the first run of a process waits for what is loaded
        assert 0 < waits(packed_batch) <= waits(without_mask)
    finally:
        hf_packfix.enable(fast_rnn=False)
