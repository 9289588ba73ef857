"""All layers and directions of torch's ``lstm``, ``gru``, ``rnn_tanh`` and ``rnn_relu`` over a packed sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_packfix.rnn.cells import CELLS
from hf_packfix.rnn.cost import has_enough_steps, is_one_block
from hf_packfix.rnn.coverage import autocast_is_enabled, is_eager, sizes_of, takes_weights
from hf_packfix.rnn.held import is_held_faster, run_held, uses_cudnn
from hf_packfix.rnn.recurrence import Recurrence
from hf_packfix.rnn.schedule import Schedule

__all__ = ["run_stack"]


def run_stack(
    mode: str,
    is_given: bool,
    data: Tensor,
    batch_sizes: Tensor,
    hx: Any,
    weights: Any,
    has_biases: Any,
    num_layers: Any,
    dropout: Any,
    training: Any,
    bidirectional: Any,
) -> tuple[Tensor, ...] | None:
    """Return what torch's function of a mode returns, with gradients; None if it must run itself, or is faster.

    Args:
        mode: ``nn.RNNBase.mode``.
        is_given: whether the user gave the initial state. If not, it is zero.
        data: ``[N, D]``.
        batch_sizes: int64 ``[T]``.
        hx: the initial state ``[L, B, H]``, two of them for an LSTM; in sorted order.
        weights: of all layers and directions, ``_flat_weights`` of ``nn.RNNBase``.
        has_biases: whether each has two.
        num_layers: without the directions.
        dropout: between layers.
        training: whether there is any.
        bidirectional: whether every second cell is of the reverse direction.
    """
    if not isinstance(weights, list) or not isinstance(data, Tensor):  # not what torch's layers pass
        return None
    on_gpu = uses_cudnn(data)
    if not (on_gpu or data.is_cpu):
        return None
    # First what is quick to see: of a few steps, torch's own call takes a tenth of a millisecond.
    states = list(hx) if mode == "LSTM" else [hx]
    number, directions = 4 if has_biases else 2, 2 if bidirectional else 1
    if not on_gpu:
        if is_one_block(mode, data, batch_sizes, hx):
            return None
        needed = [getattr(weight, "requires_grad", False) for weight in weights]
        others = data.requires_grad or any(state.requires_grad for state in states)
        if (
            not (others or True in needed)
            or autocast_is_enabled()
            or not has_enough_steps(mode, batch_sizes, any(needed[1::number]))
        ):
            return None
    if len(weights) != num_layers * directions * number or not is_eager():
        return None
    sizes = sizes_of(data, batch_sizes)
    cells = [weights[index : index + number] for index in range(0, len(weights), number)]
    if sizes is None or not takes_weights(mode, data, states, cells, directions, sizes[0]):
        return None
    options = {"dropout": dropout, "training": training, "bidirectional": bidirectional}
    if not on_gpu:
        output, finals = _run_on_cpu(mode, data, Schedule(batch_sizes, sizes), states, cells, **options)
    else:
        dtype = torch.float16 if torch.is_autocast_enabled() else data.dtype
        width = cells[0][1].shape[1]
        if (mode == "LSTM" and bidirectional and is_given) or not is_held_faster(
            mode, dtype, width, sizes, directions, data.device
        ):
            return None
        padded = cells if has_biases else [[*pair, None, None] for pair in cells]
        output, finals = run_held(mode, data, sizes, states if is_given else [], padded, **options)
    return output, *finals


def _run_on_cpu(
    mode: str,
    data: Tensor,
    schedule: Schedule,
    states: list[Tensor],
    cells: Sequence[Sequence[Tensor]],
    *,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the last layer's outputs ``[N, O]`` and the final states ``[L, B, H]``."""
    directions = 1 + bidirectional
    starts = [state.unbind(0) for state in states]  # as torch does: its errors name it
    finals: list[list[Tensor]] = [[] for _ in states]
    for start in range(0, len(cells), directions):
        # As torch draws it: for all rows of data at once.
        if start and dropout and training:
            data = torch.dropout(data, dropout, True)
        outputs = []
        for index in range(start, start + directions):
            order = schedule.reversed_rows if index > start else None
            output, *final = _run_cell(mode, data, schedule, [state[index] for state in starts], cells[index], order)
            outputs.append(output)
            for all_finals, one in zip(finals, final, strict=True):
                all_finals.append(one)
        data = torch.cat(outputs, 1) if bidirectional else outputs[0]
    # A copy of what the backward needs: the output that is returned may change.
    return data if bidirectional else data.clone(), [torch.stack(final) for final in finals]


def _run_cell(
    mode: str,
    data: Tensor,
    schedule: Schedule,
    states: list[Tensor],
    weights: Sequence[Tensor],
    order: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the outputs ``[N, H]`` and the final states ``[B, H]`` of one layer and direction.

    ``order`` is ``Schedule.reversed_rows`` for the reverse direction, and None for the other.
    """
    weight_ih, weight_hh, *biases = weights
    bias_ih, bias_hh = biases or (None, None)
    if bias_hh is None:
        bias = bias_ih
    elif mode == "GRU":
        bias, bias_hh = bias_ih, bias_hh.clone()
    else:
        # Their sum, such that each has a gradient of its own: that of `+` would be one tensor for both.
        bias, bias_hh = bias_ih - -bias_hh, None  # type: ignore[operator]
    gates = linear(data, weight_ih, bias)
    if order is not None:
        gates = _Reversed.apply(gates, order)  # type: ignore[no-untyped-call]
    # torch saves a state only if something that it is multiplied with needs a gradient. Ours need it in any case.
    if not weight_hh.requires_grad:
        others = (gates, bias_hh, states[0])
        states[0] = states[0].clone()
        if mode == "LSTM" and not any(other is not None and other.requires_grad for other in others):
            states[1] = states[1].clone()
    output, *finals = Recurrence.apply(  # type: ignore[no-untyped-call]
        CELLS[mode], schedule, gates, weight_hh.t(), bias_hh, *states
    )
    return output if order is None else _Reversed.apply(output, order), *finals  # type: ignore[no-untyped-call]


class _Reversed(torch.autograd.Function):
    """``apply(rows, order)``: ``rows`` ``[N, *]`` in an order that is its own inverse, ``Schedule.reversed_rows``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.order = order
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.order), None
