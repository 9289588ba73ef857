"""One layer and direction of an LSTM over a packed sequence, with a backward through time of its own.

Shapes: B sequences, N rows, m rows in a chunk, b in a step, D inputs, H hidden units. The gates stand in the order
output, input, forget, cell (torch: input, forget, cell, output). So those with a sigmoid are one slice, and so are
those whose gradient is a multiple of the cell's.

torch's own layer runs about twenty operations a step in the backward, with a weight gradient a step. Here, everything
that does not depend on the step after is a factor, computed for a whole chunk at once; a step multiplies by it, and
the weight gradients are one matrix product a chunk.

oneDNN, which torch uses for padded float32 batches, could run the steps between two changes of ``batch_sizes`` as one
block. It compiles a primitive for every new shape: with a new packing in every batch, as in training, that took 1.25
to 1.7 of the time of this file, and in inference 1.4 to 1.75 of torch's packed time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_packfix.rnn.recompute import must_be_recorded, recorded_gradients
from hf_packfix.rnn.schedule import Schedule
from hf_packfix.rnn.steps import (
    WeightGradients,
    buffer_rows,
    chunk_rows,
    final_rows,
    put_finals,
    resized,
    rolled,
    started,
    states_before,
    step_views,
)

__all__ = ["LSTMFunction", "infer"]


class LSTMFunction(torch.autograd.Function):
    """``apply(data, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, schedule, reverse)``.

    Inputs: ``[N, D]``, ``[B, H]`` twice, ``[4H, D]``, ``[4H, H]``, ``[4H]`` twice or None. Returns the outputs
    ``[N, H]`` and the final states ``[B, H]``, all in sorted order.
    """

    @staticmethod
    def forward(ctx: Any, data: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *inputs, schedule, reverse = arguments
        ctx.schedule, ctx.reverse = schedule, reverse
        ctx.set_materialize_grads(False)
        output, finals, kept = _forward(data, inputs, schedule, reverse, keep=True)
        ctx.save_for_backward(data, *inputs, output, *kept)
        return output, *finals

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, output, gates, cells, squashed = ctx.saved_tensors
        schedule, reverse, needed = ctx.schedule, ctx.reverse, ctx.needs_input_grad
        if must_be_recorded(gradients):
            found = recorded_gradients("LSTM", schedule, reverse, inputs, needed[:7], gradients)
        else:
            found = _backward(schedule, reverse, inputs, needed, gradients, output, gates, cells, squashed)
        return *found, None, None


def infer(data: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return what ``LSTMFunction.apply`` does, and keep nothing for a backward."""
    *inputs, schedule, reverse = arguments
    output, finals, _ = _forward(data, inputs, schedule, reverse, keep=False)
    return output, *finals


def _forward(
    data: Tensor, inputs: Sequence[Any], schedule: Schedule, reverse: bool, *, keep: bool
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return the outputs, the final states, and the gates ``[N, 4H]``, cells and their tanh ``[N, H]`` if kept."""
    hidden_0, cell_0, weight_ih, weight_hh, bias_ih, bias_hh = inputs
    width = weight_hh.shape[1]
    sigmoids = 3 * width
    input_weight, hidden_weight = rolled(weight_ih, width).t(), rolled(weight_hh, width).t()
    bias = None if bias_ih is None else rolled(bias_ih + bias_hh, width)
    rows = chunk_rows(data, 4 * width)
    buffered = schedule.rows if keep else buffer_rows(schedule, rows)
    output = data.new_empty(schedule.rows, width)
    kept = gates, cells, squashed = (
        data.new_empty(buffered, 4 * width),
        data.new_empty(buffered, width),
        data.new_empty(buffered, width),
    )
    cell_n = torch.empty_like(cell_0)
    size, hidden, cell = 0, hidden_0[:0], cell_0[:0]
    for chunk in schedule.chunks(rows, backwards=reverse):
        part = slice(chunk.start, chunk.stop) if keep else slice(0, chunk.stop - chunk.start)
        if not keep:
            cell = cell.clone()  # lies in the buffer that is written next
        pieces = (
            gates[part],
            gates[part, :sigmoids],
            gates[part, :width],
            gates[part, width : 2 * width],
            gates[part, 2 * width : sigmoids],
            gates[part, sigmoids:],
            cells[part],
            squashed[part],
            output[chunk.start : chunk.stop],
        )
        if bias is None:
            torch.mm(data[chunk.start : chunk.stop], input_weight, out=pieces[0])
        else:
            torch.addmm(bias, data[chunk.start : chunk.stop], input_weight, out=pieces[0])
        steps = zip(*(step_views(chunk, piece, backwards=reverse) for piece in pieces), strict=True)
        for all_gates, sigmoid, out_gate, in_gate, forget_gate, tanh, new_cell, tanh_cell, new_hidden in steps:
            if len(new_hidden) != size:
                hidden = resized(hidden, hidden_0, len(new_hidden))
                cell = resized(cell, cell_0, len(new_hidden))
                size = len(new_hidden)
            all_gates.addmm_(hidden, hidden_weight)
            sigmoid.sigmoid_()
            tanh.tanh_()
            torch.mul(forget_gate, cell, out=new_cell)
            new_cell.addcmul_(in_gate, tanh)
            torch.tanh(new_cell, out=tanh_cell)
            torch.mul(out_gate, tanh_cell, out=new_hidden)
            hidden, cell = new_hidden, new_cell
        put_finals(cell_n, schedule, reverse, chunk, cells[part])
    hidden_n = output.index_select(0, final_rows(schedule, reverse))
    return output, (hidden_n, cell_n), kept


def _backward(
    schedule: Schedule,
    reverse: bool,
    inputs: Sequence[Any],
    needed: Sequence[bool],
    gradients: Sequence[Tensor | None],
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    squashed: Tensor,
) -> list[Tensor | None]:
    """Return the gradients of data, states, weights and biases; None if not needed."""
    data, hidden_0, cell_0, weight_ih, weight_hh, *_ = inputs
    of_output, of_hidden, of_cell = gradients
    width = weight_hh.shape[1]
    input_weight, hidden_weight = rolled(weight_ih, width), rolled(weight_hh, width)
    rows = chunk_rows(data, 4 * width)
    buffered = buffer_rows(schedule, rows)
    factors = data.new_empty(buffered, 4 * width)
    of_tanh, hidden_buffer, cell_buffer = (data.new_empty(buffered, width) for _ in range(3))
    of_data = torch.empty_like(data) if needed[0] else None
    weights = WeightGradients(needed[3:7])
    # The gradients of the states between two steps, of all ranks; a step works on the first b of them.
    all_hidden, all_cell = started(of_hidden, hidden_0), started(of_cell, cell_0)
    size = 0
    hidden = cell = cell_of_gates = all_hidden
    for chunk in schedule.chunks(rows, backwards=not reverse):
        count = chunk.stop - chunk.start
        hidden_before = states_before(output, hidden_0, schedule, reverse, chunk, hidden_buffer)
        cell_before = states_before(cells, cell_0, schedule, reverse, chunk, cell_buffer)
        piece, tanh_factor = factors[:count], of_tanh[:count]
        forget_gate = _factors(
            gates[chunk.start : chunk.stop], cell_before, squashed[chunk.start : chunk.stop], piece, tanh_factor
        )
        pieces = [piece, piece.view(count, 4, width)[:, 1:], piece[:, :width], tanh_factor, forget_gate]
        if of_output is not None:
            pieces.append(of_output[chunk.start : chunk.stop])
        steps = zip(*(step_views(chunk, value, backwards=not reverse) for value in pieces), strict=True)
        for all_gates, of_cell_gates, out_gate, through_tanh, forget, *of_step in steps:
            if len(all_gates) != size:
                size = len(all_gates)
                hidden, cell = all_hidden[:size], all_cell[:size]
                cell_of_gates = cell.unsqueeze(1)
            if of_step:
                hidden.add_(of_step[0])
            cell.addcmul_(hidden, through_tanh)
            of_cell_gates.mul_(cell_of_gates)
            out_gate.mul_(hidden)
            cell.mul_(forget)
            torch.mm(all_gates, hidden_weight, out=hidden)
        weights.add(piece, piece, piece, data[chunk.start : chunk.stop], hidden_before)
        if of_data is not None:
            torch.mm(piece, input_weight, out=of_data[chunk.start : chunk.stop])
    ih, hh, bias = (None if value is None else rolled(value, 3 * width) for value in weights)
    return [
        of_data,
        all_hidden if needed[1] else None,
        all_cell if needed[2] else None,
        ih,
        hh,
        bias if needed[5] else None,
        bias.clone() if needed[6] and bias is not None else None,
    ]


def _factors(gates: Tensor, cell_before: Tensor, squashed: Tensor, factors: Tensor, of_tanh: Tensor) -> Tensor:
    """Write what the gradients of hidden and cell state are multiplied by; return the forget gate.

    ``factors`` ``[m, 4H]``: of the hidden state, for the output gate; of the cell, for the others. ``of_tanh``
    ``[m, H]``: of the hidden state, for the cell.
    """
    width = squashed.shape[1]
    out_gate, in_gate, forget_gate, tanh = gates.split(width, 1)
    out_factor, in_factor, forget_factor, tanh_factor = factors.split(width, 1)
    sigmoids = gates[:, : 3 * width]
    torch.addcmul(sigmoids, sigmoids, sigmoids, value=-1, out=factors[:, : 3 * width])
    out_factor.mul_(squashed)
    in_factor.mul_(tanh)
    forget_factor.mul_(cell_before)
    torch.mul(tanh, tanh, out=of_tanh)
    torch.addcmul(in_gate, in_gate, of_tanh, value=-1, out=tanh_factor)
    torch.mul(squashed, squashed, out=of_tanh)
    torch.addcmul(out_gate, out_gate, of_tanh, value=-1, out=of_tanh)
    return forget_gate
