"""All layers and directions of an ``nn.RNNBase`` over a packed sequence."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from hf_packfix.rnn import elman, gru, lstm
from hf_packfix.rnn.cost import has_enough_steps, is_one_block
from hf_packfix.rnn.coverage import is_eager, sizes_of, states_of, weights_of
from hf_packfix.rnn.schedule import Schedule

__all__ = ["run"]

_FUNCTIONS: dict[str, Any] = {
    "LSTM": lstm.LSTMFunction.apply,
    "GRU": gru.GRUFunction.apply,
    "RNN_TANH": elman.ElmanFunction.apply,
    "RNN_RELU": elman.ElmanFunction.apply,
}


def run(layer: nn.RNNBase, packed: Any, hx: Any = None) -> tuple[PackedSequence, Any] | None:
    """Return what ``layer.forward(packed, hx)`` returns; None if torch's own forward must, or is faster.

    Args:
        layer: an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``.
        packed: data ``[N, D]``, float32 or float64 on the CPU. Anything else gives None.
        hx: the initial state ``[L, B, H]``, for an LSTM two of them, in the original order of the sequences; zeros by
            default.

    Returns:
        The outputs, packed like the input, ``[N, O]``, and the final state ``[L, B, H]``, for an LSTM two of them.

    Example:
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> x = pack_sequence([torch.randn(40, 3), torch.randn(25, 3)], enforce_sorted=False)
        >>> gru = nn.GRU(3, 8)
        >>> output, hidden = run(gru, x) or gru(x)
        >>> output.data.shape, hidden.shape
        (torch.Size([65, 8]), torch.Size([1, 2, 8]))
    """
    if not isinstance(packed, PackedSequence) or not torch.is_grad_enabled() or not is_eager():
        return None
    # First what is quick to see: of a few steps, torch's own call takes less than a millisecond.
    if not has_enough_steps(layer.mode, packed.batch_sizes):
        return None
    sizes = sizes_of(layer, packed)
    if sizes is None or is_one_block(layer.mode, packed.data.dtype, sizes):
        return None
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    states = states_of(layer, hx, data, sizes[0])
    weights = None if states is None else weights_of(layer, data)
    if states is None or weights is None:
        return None
    # In inference torch's own loop, which has the same operations in C++, is as fast or faster.
    if not any(tensor is not None and tensor.requires_grad for tensor in chain([data], states, *weights)):
        return None
    if sorted_indices is not None:
        states = [state.index_select(1, sorted_indices) for state in states]
    output, finals = _all_layers(layer, data, states, weights, Schedule(batch_sizes, sizes))
    if unsorted_indices is not None:
        finals = [final.index_select(1, unsorted_indices) for final in finals]
    result = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
    return result, tuple(finals) if layer.mode == "LSTM" else finals[0]


def _all_layers(
    layer: nn.RNNBase,
    data: Tensor,
    states: list[Tensor],
    weights: list[list[Tensor | None]],
    schedule: Schedule,
) -> tuple[Tensor, list[Tensor]]:
    """Return the last layer's outputs ``[N, O]`` and the final states ``[L, B, H]``; all in sorted order."""
    count = 2 if layer.mode == "LSTM" else 1
    if states:
        starts = [state.unbind(0) for state in states]
    else:
        zeros = data.new_zeros(schedule.sequences, layer.hidden_size)
        starts = [(zeros,) * len(weights)] * count
    directions = 2 if layer.bidirectional else 1
    function = _FUNCTIONS[layer.mode]
    finals: list[list[Tensor]] = [[] for _ in range(count)]
    for number in range(layer.num_layers):
        outputs = []
        for direction in range(directions):
            index = number * directions + direction
            start = [state[index] for state in starts]
            output, *final = function(data, *start, *weights[index], schedule, direction == 1, layer.mode)
            outputs.append(output)
            for all_finals, one in zip(finals, final, strict=True):
                all_finals.append(one)
        data = outputs[0] if directions == 1 else torch.cat(outputs, 1)
        # As torch draws it: for all rows of data at once.
        if layer.dropout and layer.training and number < layer.num_layers - 1:
            data = torch.dropout(data, layer.dropout, True)
    return data, [torch.stack(final) for final in finals]
