"""Recurrent layers and packed sequences for tests, and torch's results beside ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from hf_packfix import rnn

KINDS = ["LSTM", "GRU", "tanh", "relu"]
#: As a GPU runs them: padded, with a state that is held over the padding.
HELD = ["held LSTM", "held GRU"]
#: Against torch: how far apart results may be, relative to the largest of them.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10, torch.bfloat16: 3e-2}
LENGTHS = [3, 12, 1, 12, 7]


def new_layer(kind: str, inputs: int = 3, hidden: int = 4, **options: Any) -> nn.RNNBase:
    torch.manual_seed(0)
    options = {"dtype": torch.float64, **options}
    if kind in ("tanh", "relu"):
        return nn.RNN(inputs, hidden, nonlinearity=kind, **options)
    return getattr(nn, kind.removeprefix("held "))(inputs, hidden, **options)


def new_packed(lengths: list[int] = LENGTHS, inputs: int = 3, *, is_sorted: bool = False, **options: Any):
    torch.manual_seed(1)
    options = {"dtype": torch.float64, **options}
    lengths = sorted(lengths, reverse=True) if is_sorted else lengths
    packed = pack_sequence([torch.randn(n, inputs, **options) for n in lengths], enforce_sorted=is_sorted)
    return packed._replace(data=packed.data.requires_grad_())


def new_state(layer: nn.RNNBase, sequences: int = len(LENGTHS)) -> Any:
    torch.manual_seed(2)
    shape = (layer.num_layers * (1 + layer.bidirectional), sequences, layer.hidden_size)
    hidden, cell = (torch.randn(shape, dtype=layer.weight_ih_l0.dtype, requires_grad=True) for _ in range(2))
    return (hidden, cell) if layer.mode == "LSTM" else hidden


def flat(result: tuple[PackedSequence, Any]) -> list[Tensor]:
    output, state = result
    return [output.data, *(state if isinstance(state, tuple) else [state])]


def leaves(layer: nn.RNNBase, packed: PackedSequence, state: Any = None) -> list[Tensor]:
    states = [] if state is None else list(state) if isinstance(state, tuple) else [state]
    return [tensor for tensor in (packed.data, *states, *layer.parameters()) if tensor.requires_grad]


def loss_of(results: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    parts = [(torch.randn(r.shape, generator=generator, dtype=r.dtype) * r).sum() / r.numel() ** 0.5 for r in results]
    return sum(parts)  # type: ignore[return-value]


def gradients(results: list[Tensor], inputs: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_of(results), inputs, **options)


def assert_close(found: Any, expected: Any) -> None:
    """Compare tensors, NaN and infinity included."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert ours.requires_grad == theirs.requires_grad
        scale = max(1.0, float(theirs.detach().nan_to_num(0, 0, 0).abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[theirs.dtype] * scale, equal_nan=True)


def ours(kind: str, layer: nn.RNNBase, packed: PackedSequence, hx: Any = None) -> tuple[PackedSequence, Any]:
    """Return what our operators return: those of a CPU, or for a kind of ``HELD`` those of a GPU."""
    with mock.patch.multiple(
        "hf_packfix.rnn.stack", uses_cudnn=lambda _: kind in HELD, is_held_faster=lambda *_: True
    ):
        result = rnn.run(layer, packed, hx)
    assert result is not None, "left to torch"
    return result


def outcomes(case: Callable[[Any], Any], kind: str, **options: Any) -> list[Any]:
    """Return what a case does with our layer, which must run our operators, and with torch's: tensors or the error."""
    found = []
    for faster in (True, False):
        layer = new_layer(kind, **options)
        if faster:
            layer.forward = functools.partial(ours, kind, layer)  # type: ignore[method-assign]
        torch.manual_seed(4)
        try:
            found.append(case(layer))
        except (RuntimeError, NotImplementedError) as error:
            found.append(str(error)[:60])
    return found


def assert_as_torch(case: Callable[[Any], Any], kind: str, **options: Any) -> None:
    found, expected = outcomes(case, kind, **options)
    if isinstance(expected, str):
        assert found == expected
    else:
        assert not isinstance(found, str), found
        assert_close(found, expected)


def assert_equal_to_torch(
    kind: str, layer: nn.RNNBase, packed: PackedSequence, state: Any = None, which: slice = slice(None)
) -> None:
    """Compare results, the gradients of those in ``which``, and what was drawn."""
    results = []
    for function in (functools.partial(ours, kind), lambda layer, *args: layer(*args)):
        torch.manual_seed(5)
        results.append((function(layer, packed, state), torch.get_rng_state()))
    (found, drawn), (theirs, expected) = results
    assert torch.equal(drawn, expected)
    assert [type(part) for part in found] == [type(part) for part in theirs]
    assert all(found[0][index] is theirs[0][index] for index in range(1, 4))
    assert_close(flat(found), flat(theirs))
    if inputs := leaves(layer, packed, state):
        assert_close(gradients(flat(found)[which], inputs), gradients(flat(theirs)[which], inputs))
