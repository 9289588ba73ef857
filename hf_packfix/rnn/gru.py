"""One layer and direction of a GRU over a packed sequence, with a backward through time of its own.

Shapes: B sequences, N rows, m rows in a chunk, b in a step, D inputs, H hidden units. Four columns of width H belong
to a row: the hidden part of the new gate, the reset gate, the update gate, the new gate. So the hidden product fills
the first three, and the input's product the last three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_packfix.rnn.recompute import must_be_recorded, recorded_gradients, without_autocast
from hf_packfix.rnn.schedule import Schedule
from hf_packfix.rnn.steps import (
    WeightGradients,
    buffer_rows,
    chunk_rows,
    final_rows,
    project,
    resized,
    rolled,
    started,
    states_before,
    steps_of,
)

__all__ = ["GRUFunction"]


class GRUFunction(torch.autograd.Function):
    """``apply(data, h_0, weight_ih, weight_hh, bias_ih, bias_hh, schedule, reverse, mode)``.

    Inputs: ``[N, D]``, ``[B, H]``, ``[3H, D]``, ``[3H, H]``, ``[3H]`` twice or None. Returns the outputs ``[N, H]``
    and the final state ``[B, H]``, both in sorted order.
    """

    @staticmethod
    def forward(ctx: Any, data: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """Run the layer."""
        *inputs, schedule, reverse, _ = arguments
        ctx.schedule, ctx.reverse = schedule, reverse
        ctx.set_materialize_grads(False)
        output, final, gates = _forward(data, inputs, schedule, reverse)
        ctx.save_for_backward(data, *inputs, output, gates)
        return output, final

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of all inputs."""
        *inputs, output, gates = ctx.saved_tensors
        schedule, reverse, needed = ctx.schedule, ctx.reverse, ctx.needs_input_grad
        if must_be_recorded(gradients):
            found = recorded_gradients("GRU", schedule, reverse, inputs, needed[:6], gradients)
        else:
            found = _backward(schedule, reverse, inputs, needed, gradients, output, gates)
        return *found, None, None, None


def _forward(data: Tensor, inputs: Sequence[Any], schedule: Schedule, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs, the final state, and for the backward the four columns ``[N, 4H]``."""
    hidden_0, weight_ih, weight_hh, bias_ih, bias_hh = inputs
    width = weight_hh.shape[1]
    input_weight, hidden_weight = weight_ih.t(), rolled(weight_hh, width).t()
    gates = data.new_empty(schedule.rows, 4 * width)
    output = data.new_empty(schedule.rows, width)
    bias: Tensor | None = None
    if bias_ih is None:
        gates[:, :width].zero_()
    else:
        bias = bias_ih.clone()
        bias[: 2 * width] += bias_hh[: 2 * width]
        gates[:, :width].copy_(bias_hh[2 * width :])
    size, hidden = 0, hidden_0
    for chunk in schedule.chunks(chunk_rows(data, 4 * width), backwards=reverse):
        rows = slice(chunk.start, chunk.stop)
        piece = gates[rows]
        project(data[rows], input_weight, bias, piece[:, width:])
        views = (piece[:, : 3 * width], piece[:, width : 3 * width], *piece.split(width, 1), output[rows])
        for step, hidden_product, sigmoids, hidden_new, reset, update, new, new_hidden in steps_of(
            chunk, views, backwards=reverse
        ):
            if step != size:
                hidden = resized(hidden, hidden_0, size, step)
                size = step
            hidden_product.addmm_(hidden, hidden_weight)
            sigmoids.sigmoid_()
            new.addcmul_(reset, hidden_new).tanh_()
            torch.lerp(new, hidden, update, out=new_hidden)
            hidden = new_hidden
    return output, output.index_select(0, final_rows(schedule, reverse)), gates


def _backward(
    schedule: Schedule,
    reverse: bool,
    inputs: Sequence[Any],
    needed: Sequence[bool],
    gradients: Sequence[Tensor | None],
    output: Tensor,
    gates: Tensor,
) -> list[Tensor | None]:
    """Return the gradients of data, state, weights and biases; None if not needed."""
    data, hidden_0, weight_ih, weight_hh, *_ = inputs
    of_output, of_hidden = gradients
    width = weight_hh.shape[1]
    hidden_weight = rolled(weight_hh, width)
    most = chunk_rows(data, 4 * width)
    buffered = buffer_rows(schedule, most)
    factors, before_buffer = data.new_empty(buffered, 4 * width), data.new_empty(buffered, width)
    of_data = torch.empty_like(data) if needed[0] else None
    weights = WeightGradients(needed[2:6])
    # The gradient of the state between two steps, of all ranks; a step works on the first b of them.
    all_hidden = started(of_hidden, hidden_0)
    size, hidden, hidden_of_gates = 0, all_hidden, all_hidden
    for chunk in schedule.chunks(most, backwards=not reverse):
        rows, count = slice(chunk.start, chunk.stop), chunk.stop - chunk.start
        before = states_before(output, hidden_0, schedule, reverse, chunk, before_buffer)
        piece = factors[:count]
        _factors(gates[rows], before, piece)
        update = gates[rows, 2 * width : 3 * width]
        views = (
            piece.view(count, 4, width),
            piece[:, : 3 * width],
            update,
            update if of_output is None else of_output[rows],
        )
        for step, all_gates, hidden_product, kept, of_step in steps_of(chunk, views, backwards=not reverse):
            if step != size:
                size, hidden = step, all_hidden[:step]
                hidden_of_gates = hidden.unsqueeze(1)
            if of_output is not None:
                hidden.add_(of_step)
            all_gates.mul_(hidden_of_gates)
            hidden.mul_(kept).addmm_(hidden_product, hidden_weight)
        weights.add(piece[:, width:], piece[:, : 3 * width], piece, data[rows], before)
        if of_data is not None:
            torch.mm(piece[:, width:], weight_ih, out=of_data[rows])
    ih, hh, bias = weights
    return [
        of_data,
        all_hidden if needed[1] else None,
        ih,
        None if hh is None else rolled(hh, 2 * width),
        bias[width:] if needed[4] and bias is not None else None,
        rolled(bias[: 3 * width], 2 * width) if needed[5] and bias is not None else None,
    ]


def _factors(gates: Tensor, before: Tensor, factors: Tensor) -> None:
    """Write what a step multiplies the gradient of its state by, for the four columns: ``[m, 4H]``."""
    width = before.shape[1]
    hidden_new, reset, update, new = gates.split(width, 1)
    hidden_factor, reset_factor, update_factor, new_factor = factors.split(width, 1)
    sigmoids = gates[:, width : 3 * width]
    # (1 - new²) (1 - update)
    torch.mul(new, new, out=new_factor)
    new_factor.neg_().add_(1)
    new_factor.addcmul_(new_factor, update, value=-1)
    # The new gate's, times reset, is that of its hidden part.
    torch.mul(new_factor, reset, out=hidden_factor)
    torch.addcmul(sigmoids, sigmoids, sigmoids, value=-1, out=factors[:, width : 3 * width])
    reset_factor.mul_(hidden_new).mul_(new_factor)
    update_factor.mul_(before - new)
