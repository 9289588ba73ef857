"""One layer and direction of an LSTM over a packed sequence, with a backward through time of its own.

Shapes: B sequences, N rows, m rows in a chunk, b in a step, D inputs, H hidden units. The gates stand in the order
output, input, forget, cell (torch: input, forget, cell, output). So those with a sigmoid are one slice, and so are
those whose gradient is a multiple of the cell's.

oneDNN, which torch uses for padded float32 batches, could run the steps between two changes of ``batch_sizes`` as one
block. But it compiles a primitive for every new shape: with a new packing in every batch, as in training, that took
1.25 to 1.7 of the time of this file, and in inference 1.4 to 1.75 of torch's packed time.
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

__all__ = ["LSTMFunction"]


class LSTMFunction(torch.autograd.Function):
    """``apply(data, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, schedule, reverse, mode)``.

    Inputs: ``[N, D]``, ``[B, H]`` twice, ``[4H, D]``, ``[4H, H]``, ``[4H]`` twice or None. Returns the outputs
    ``[N, H]`` and the final states ``[B, H]``, all in sorted order.
    """

    @staticmethod
    def forward(ctx: Any, data: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """Run the layer."""
        *inputs, schedule, reverse, _ = arguments
        ctx.schedule, ctx.reverse = schedule, reverse
        ctx.set_materialize_grads(False)
        output, hidden_n, cell_n, *kept = _forward(data, inputs, schedule, reverse)
        ctx.save_for_backward(data, *inputs, output, *kept)
        return output, hidden_n, cell_n

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of all inputs."""
        *inputs, output, gates, cells, squashed = ctx.saved_tensors
        schedule, reverse, needed = ctx.schedule, ctx.reverse, ctx.needs_input_grad
        if must_be_recorded(gradients):
            found = recorded_gradients("LSTM", schedule, reverse, inputs, needed[:7], gradients)
        else:
            found = _backward(schedule, reverse, inputs, needed, gradients, output, gates, cells, squashed)
        return *found, None, None, None


def _forward(data: Tensor, inputs: Sequence[Any], schedule: Schedule, reverse: bool) -> tuple[Tensor, ...]:
    """Return the outputs, the final states, and for the backward the gates ``[N, 4H]``, cells and their tanh."""
    hidden_0, cell_0, weight_ih, weight_hh, bias_ih, bias_hh = inputs
    width = weight_hh.shape[1]
    input_weight, hidden_weight = rolled(weight_ih, width).t(), rolled(weight_hh, width).t()
    bias = None if bias_ih is None else rolled(bias_ih + bias_hh, width)
    gates = data.new_empty(schedule.rows, 4 * width)
    output, cells, squashed = (data.new_empty(schedule.rows, width) for _ in range(3))
    size, hidden, cell = 0, hidden_0, cell_0
    for chunk in schedule.chunks(chunk_rows(data, 4 * width), backwards=reverse):
        rows = slice(chunk.start, chunk.stop)
        piece = gates[rows]
        project(data[rows], input_weight, bias, piece)
        views = (piece, piece[:, : 3 * width], *piece.split(width, 1), cells[rows], squashed[rows], output[rows])
        for (
            step,
            all_gates,
            sigmoids,
            out_gate,
            in_gate,
            forget_gate,
            tanh,
            new_cell,
            tanh_cell,
            new_hidden,
        ) in steps_of(chunk, views, backwards=reverse):
            if step != size:
                hidden = resized(hidden, hidden_0, size, step)
                cell = resized(cell, cell_0, size, step)
                size = step
            all_gates.addmm_(hidden, hidden_weight)
            sigmoids.sigmoid_()
            tanh.tanh_()
            torch.mul(forget_gate, cell, out=new_cell)
            new_cell.addcmul_(in_gate, tanh)
            torch.tanh(new_cell, out=tanh_cell)
            torch.mul(out_gate, tanh_cell, out=new_hidden)
            hidden, cell = new_hidden, new_cell
    final = final_rows(schedule, reverse)
    return output, output.index_select(0, final), cells.index_select(0, final), gates, cells, squashed


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
    most = chunk_rows(data, 4 * width)
    buffered = buffer_rows(schedule, most)
    factors = data.new_empty(buffered, 4 * width)
    of_tanh, hidden_buffer, cell_buffer = (data.new_empty(buffered, width) for _ in range(3))
    of_data = torch.empty_like(data) if needed[0] else None
    weights = WeightGradients(needed[3:7])
    # The gradients of the states between two steps, of all ranks; a step works on the first b of them.
    all_hidden, all_cell = started(of_hidden, hidden_0), started(of_cell, cell_0)
    size, hidden, cell, cell_of_gates = 0, all_hidden, all_cell, all_cell
    for chunk in schedule.chunks(most, backwards=not reverse):
        rows, count = slice(chunk.start, chunk.stop), chunk.stop - chunk.start
        hidden_before = states_before(output, hidden_0, schedule, reverse, chunk, hidden_buffer)
        cell_before = states_before(cells, cell_0, schedule, reverse, chunk, cell_buffer)
        piece, tanh_factor = factors[:count], of_tanh[:count]
        _factors(gates[rows], cell_before, squashed[rows], piece, tanh_factor)
        views = (
            piece,
            piece.view(count, 4, width)[:, 1:],
            piece[:, :width],
            tanh_factor,
            gates[rows, 2 * width : 3 * width],
            tanh_factor if of_output is None else of_output[rows],
        )
        for step, all_gates, of_cell_gates, out_gate, through_tanh, forget_gate, of_step in steps_of(
            chunk, views, backwards=not reverse
        ):
            if step != size:
                size, hidden, cell = step, all_hidden[:step], all_cell[:step]
                cell_of_gates = cell.unsqueeze(1)
            if of_output is not None:
                hidden.add_(of_step)
            cell.addcmul_(hidden, through_tanh)
            of_cell_gates.mul_(cell_of_gates)
            out_gate.mul_(hidden)
            cell.mul_(forget_gate)
            torch.mm(all_gates, hidden_weight, out=hidden)
        weights.add(piece, piece, piece, data[rows], hidden_before)
        if of_data is not None:
            torch.mm(piece, input_weight, out=of_data[rows])
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


def _factors(gates: Tensor, cell_before: Tensor, squashed: Tensor, factors: Tensor, of_tanh: Tensor) -> None:
    """Write what a step multiplies the gradients of its states by.

    ``factors`` ``[m, 4H]``: the hidden state's for the output gate, the cell's for the other gates. ``of_tanh``
    ``[m, H]``: the hidden state's for the cell.
    """
    width = squashed.shape[1]
    out_gate, in_gate, _, tanh = gates.split(width, 1)
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
