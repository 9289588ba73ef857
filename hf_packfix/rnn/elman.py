"""One layer and direction of a plain (Elman) RNN over a packed sequence, with a backward through time of its own.

Shapes: B sequences, N rows, m rows in a chunk, b in a step, D inputs, H hidden units.
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
    started,
    states_before,
    steps_of,
)

__all__ = ["ElmanFunction"]


class ElmanFunction(torch.autograd.Function):
    """``apply(data, h_0, weight_ih, weight_hh, bias_ih, bias_hh, schedule, reverse, mode)``.

    Inputs: ``[N, D]``, ``[B, H]``, ``[H, D]``, ``[H, H]``, ``[H]`` twice or None; ``mode`` is "RNN_TANH" or
    "RNN_RELU". Returns the outputs ``[N, H]`` and the final state ``[B, H]``, both in sorted order.
    """

    @staticmethod
    def forward(ctx: Any, data: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """Run the layer."""
        *inputs, schedule, reverse, mode = arguments
        ctx.schedule, ctx.reverse, ctx.mode = schedule, reverse, mode
        ctx.set_materialize_grads(False)
        output, final = _forward(data, inputs, schedule, reverse, mode)
        ctx.save_for_backward(data, *inputs, output)
        return output, final

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of all inputs."""
        *inputs, output = ctx.saved_tensors
        schedule, reverse, mode, needed = ctx.schedule, ctx.reverse, ctx.mode, ctx.needs_input_grad
        if must_be_recorded(gradients):
            found = recorded_gradients(mode, schedule, reverse, inputs, needed[:6], gradients)
        else:
            found = _backward(schedule, reverse, mode, inputs, needed, gradients, output)
        return *found, None, None, None


def _forward(
    data: Tensor, inputs: Sequence[Any], schedule: Schedule, reverse: bool, mode: str
) -> tuple[Tensor, Tensor]:
    """Return the outputs and the final state."""
    hidden_0, weight_ih, weight_hh, bias_ih, bias_hh = inputs
    width = weight_hh.shape[1]
    activate = torch.tanh_ if mode == "RNN_TANH" else torch.relu_
    input_weight, hidden_weight = weight_ih.t(), weight_hh.t()
    bias = None if bias_ih is None else bias_ih + bias_hh
    output = data.new_empty(schedule.rows, width)
    size, hidden = 0, hidden_0
    for chunk in schedule.chunks(chunk_rows(data, width), backwards=reverse):
        rows = slice(chunk.start, chunk.stop)
        project(data[rows], input_weight, bias, output[rows])
        for step, new_hidden in steps_of(chunk, [output[rows]], backwards=reverse):
            if step != size:
                hidden = resized(hidden, hidden_0, size, step)
                size = step
            activate(new_hidden.addmm_(hidden, hidden_weight))
            hidden = new_hidden
    return output, output.index_select(0, final_rows(schedule, reverse))


def _backward(
    schedule: Schedule,
    reverse: bool,
    mode: str,
    inputs: Sequence[Any],
    needed: Sequence[bool],
    gradients: Sequence[Tensor | None],
    output: Tensor,
) -> list[Tensor | None]:
    """Return the gradients of data, state, weights and biases; None if not needed."""
    data, hidden_0, weight_ih, weight_hh, *_ = inputs
    of_output, of_hidden = gradients
    width = weight_hh.shape[1]
    most = chunk_rows(data, width)
    buffered = buffer_rows(schedule, most)
    factors, before_buffer = data.new_empty(buffered, width), data.new_empty(buffered, width)
    of_data = torch.empty_like(data) if needed[0] else None
    weights = WeightGradients(needed[2:6])
    # The gradient of the state between two steps, of all ranks; a step works on the first b of them.
    all_hidden = started(of_hidden, hidden_0)
    size, hidden = 0, all_hidden
    for chunk in schedule.chunks(most, backwards=not reverse):
        rows = slice(chunk.start, chunk.stop)
        piece = factors[: chunk.stop - chunk.start]
        if mode == "RNN_TANH":
            torch.mul(output[rows], output[rows], out=piece)
            piece.neg_().add_(1)
        else:
            torch.gt(output[rows], 0, out=piece)
        views = (piece, piece if of_output is None else of_output[rows])
        for step, factor, of_step in steps_of(chunk, views, backwards=not reverse):
            if step != size:
                size, hidden = step, all_hidden[:step]
            if of_output is not None:
                hidden.add_(of_step)
            factor.mul_(hidden)
            torch.mm(factor, weight_hh, out=hidden)
        before = states_before(output, hidden_0, schedule, reverse, chunk, before_buffer)
        weights.add(piece, piece, piece, data[rows], before)
        if of_data is not None:
            torch.mm(piece, weight_ih, out=of_data[rows])
    ih, hh, bias = weights
    return [
        of_data,
        all_hidden if needed[1] else None,
        ih,
        hh,
        bias if needed[4] else None,
        bias.clone() if needed[5] and bias is not None else None,
    ]
