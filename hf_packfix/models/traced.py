"""Recurrent layers over a padded batch with a mask, while a program is recorded that is to run on other batches.

Packing chooses rows by the values of the mask, and how many steps it finds becomes a part of a recorded program.
Here no shape and no branch depends on a value, so that the program is right for any later mask, lengths and number of
rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

State = Tensor | tuple[Tensor, Tensor]


def run_traced(layer: nn.RNNBase, inputs: Tensor, real: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Run a layer with torch's own packing, which ``torch.jit.trace`` and its ONNX exporter know.

    Args:
        layer: with ``batch_first``.
        inputs: ``[B, T, D]``.
        real: bool ``[B, T]``, true at real steps, wherever they stand.
        state: to start from, as the layer takes it; zeros by default.

    Returns:
        the outputs ``[B, T, O]``, zero at padding, and the final state.
    """
    counts = real.to(torch.int64).cumsum(1)
    lengths = counts[:, -1:]
    columns = torch.arange(inputs.shape[1], device=inputs.device)
    # The column of each step once the real ones come first.
    places = torch.where(real, counts - 1, lengths + columns - counts)[..., None]
    first = torch.zeros_like(inputs).scatter(1, places.expand_as(inputs), inputs)
    packed = pack_padded_sequence(first, lengths[:, 0].cpu(), batch_first=True, enforce_sorted=False)
    # Without a state, torch 2.0 records zeros for the example's number of rows.
    packed, state = layer(packed, _zeros(layer, inputs) if state is None else state)
    outputs, _ = pad_packed_sequence(packed, batch_first=True)
    # The ONNX exporter of `torch.jit.trace` fails if nothing uses the outputs of a layer over a packed sequence.
    nothing = 0 * outputs[:, :1, : layer.hidden_size].transpose(0, 1)
    state = (state[0] + nothing, state[1]) if isinstance(state, tuple) else state + nothing
    # Less than T columns, except in ONNX.
    places = places.masked_fill(~real[..., None], 0).expand(-1, -1, outputs.shape[2])
    return outputs.gather(1, places) * real[..., None], state


def run_exported(layer: nn.RNNBase, inputs: Tensor, real: Tensor | None, state: State | None) -> tuple[Tensor, State]:
    """Run a layer as loops over the steps, which ``torch.export`` keeps; arguments as above, no mask if all are real.

    ``torch.export`` fixes T for torch's own layers.
    """
    from torch._higher_order_ops.scan import scan

    directions = 2 if layer.bidirectional else 1
    state = _zeros(layer, inputs) if state is None else state
    states = state if isinstance(state, tuple) else (state,)
    if real is None:
        real = torch.ones_like(inputs[..., 0], dtype=torch.bool)
    steps, by_step, finals = inputs.transpose(0, 1), real.T[..., None], []
    for number in range(layer.num_layers):
        if number and layer.dropout:
            steps = dropout(steps, layer.dropout, layer.training)
        outputs = []
        for direction in range(directions):
            place = number * directions + direction
            w_ih, w_hh, b_ih, b_hh = layer.all_weights[place]

            begun = [state[place].clone() for state in states]
            step = _step_of(layer, w_hh, b_hh)
            final, output = scan(step, begun, (linear(steps, w_ih, b_ih), by_step), reverse=bool(direction))
            finals.append(final)
            outputs.append(output)
        steps = torch.cat(outputs, -1)
    hidden, *cells = map(torch.stack, zip(*finals, strict=True))
    return (steps * by_step).transpose(0, 1), (hidden, cells[0]) if cells else hidden


def _step_of(layer: nn.RNNBase, w_hh: Tensor, b_hh: Tensor) -> Callable[[Any, Any], tuple[list[Tensor], Tensor]]:
    cell = _CELLS[layer.mode]

    def step(carry: list[Tensor], xs: Any) -> tuple[list[Tensor], Tensor]:
        gates, is_real = xs
        pairs = zip(cell(gates, carry, w_hh, b_hh), carry, strict=True)
        after = [torch.where(is_real, new, old) for new, old in pairs]
        return after, after[0].clone()  # what is returned twice must not be one tensor

    return step


def _lstm(gates: Tensor, carry: list[Tensor], w_hh: Tensor, b_hh: Tensor) -> tuple[Tensor, ...]:
    hidden, cell = carry
    i, f, g, o = (gates + linear(hidden, w_hh, b_hh)).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru(gates: Tensor, carry: list[Tensor], w_hh: Tensor, b_hh: Tensor) -> tuple[Tensor, ...]:
    (hidden,) = carry
    r, z, n = gates.chunk(3, -1)
    r_h, z_h, n_h = linear(hidden, w_hh, b_hh).chunk(3, -1)
    new = (n + (r + r_h).sigmoid() * n_h).tanh()
    return (new + (z + z_h).sigmoid() * (hidden - new),)


def _rnn(gates: Tensor, carry: list[Tensor], w_hh: Tensor, b_hh: Tensor) -> tuple[Tensor, ...]:
    return ((gates + linear(carry[0], w_hh, b_hh)).tanh(),)


_CELLS = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _rnn}


def _zeros(layer: nn.RNNBase, inputs: Tensor) -> State:
    """Return the state that a layer starts from by default."""
    zeros = inputs.new_zeros(layer.num_layers * (1 + layer.bidirectional), inputs.shape[0], layer.hidden_size)
    return (zeros, zeros) if layer.mode == "LSTM" else zeros
