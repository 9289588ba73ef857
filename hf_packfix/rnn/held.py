"""LSTM and GRU layers over a packed sequence, run as padded ones whose state is held still over padding; for GPUs.

On a GPU torch gives a packed sequence to cuDNN's standard algorithm, which launches kernels at every step. Only a
padded one may get a persistent kernel, which keeps the recurrent weights in registers. So the rows of ``data`` are
scattered into a padded tensor ``[T, B, D]``, and the input of every layer gets one more column: 0 at real steps, 1 at
padding. The weights of this column are constants that shut or open a gate, in every floating-point type exactly:

- LSTM: -1e4 for the input gate, which becomes 0, and 1e4 for the forget gate, which becomes 1: the cell state stays.
- GRU: 1e4 for the update gate, which becomes 1: the state stays.

There the gradients of the gates are 0, so it does not matter what else the input holds at padding: zeros, or the
outputs of the layer below. The final states are those after the last real step, except the hidden state of an LSTM,
whose output gate stays open: it is gathered from the outputs. A reverse direction starts with the padding, and holds
its initial state there.

cuDNN is called through ``torch.lstm`` and ``torch.gru``: autograd, autocast and their errors are torch's. Both run on
a CPU as well, where the tests compare them with torch's packed layers.

Shapes: L layers, B sequences, T steps in the longest one, N rows of ``data``, D inputs, H hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: What the column adds to each gate, in torch's order. float16 ends at 65504.
_COLUMNS = {"LSTM": (-1e4, 1e4, 0.0, 0.0), "GRU": (0.0, 1e4, 0.0)}


def uses_cudnn(data: Tensor) -> bool:
    """Return whether torch gives recurrent layers over this tensor to cuDNN, and they are not captured in a graph."""
    return (
        data.is_cuda
        and torch.version.hip is None
        and torch.backends.cudnn.is_acceptable(data)
        and not torch.cuda.is_current_stream_capturing()
    )


def is_held_faster(
    mode: str, dtype: torch.dtype, width: int, sizes: Sequence[int], directions: int, device: torch.device
) -> bool:
    """Return whether this takes less time than torch's own layers over a PackedSequence, and not much more memory.

    Measured with a prototype (H200, torch 2.11, forward and backward): 0.2 to 0.4 of torch's packed time for 32
    sequences or more and widths up to 128, 0.8 for 2 sequences or a width of 192. Beyond that, torch selects the
    standard algorithm for padded data as well (``get_algo`` in torch's ``cudnn/RNN.cpp``), which took 1.4 to 2.2. In
    half precision, an LSTM over one direction has another persistent kernel, which took 0.4 to 0.55.

    Args:
        mode: ``nn.RNNBase.mode``.
        dtype: of the computation: under autocast float16, whatever dtype autocast has.
        width: H.
        sizes: ``batch_sizes``.
        directions: 1 or 2.
        device: of ``data``.
    """
    steps, sequences = len(sizes), sizes[0]
    # A call costs as much as some 40 steps of the standard algorithm; and padding costs memory.
    if mode not in _COLUMNS or steps * directions < 48 or steps * sequences > 16 * sum(sizes):
        return False
    if dtype not in (torch.float32, torch.float16):
        return False
    if width <= 128:
        return sequences <= 256
    if mode == "GRU":
        return False
    if dtype == torch.float32:
        return width <= 192 and sequences <= 64
    fits = width % 128 == 0 and width <= 1024 and sequences % 8 == 0 and sequences <= 128 and directions == 1
    # As in `use_persist_device_heuristics` (`cudnn/RNN.cpp`), without Volta, on which it depends on the shape.
    gpu = torch.cuda.get_device_properties(device) if fits else None
    return gpu is not None and gpu.major >= 8 and gpu.minor != 6 and gpu.multi_processor_count >= 98


def run_held(
    mode: str,
    data: Tensor,
    sizes: list[int],
    states: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor | None]],
    *,
    bidirectional: bool,
    dropout: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """Return the last layer's outputs ``[N, O]`` and the final states ``[L, B, H]``; all in sorted order.

    Args:
        mode: "LSTM" or "GRU".
        data: ``[N, D]``.
        sizes: ``batch_sizes``, T of them.
        states: the initial states, each ``[L, B, H]``; empty for zeros. A bidirectional LSTM takes only zeros: the
            padding before its reverse direction would not hold another hidden state.
        weights: of every layer and direction the two weights, and the two biases or None twice.
        bidirectional: whether every second one of ``weights`` is of a reverse direction.
        dropout: between the layers. torch's packed layer draws it inside cuDNN, so the draws differ.
        training: whether dropout is on; cuDNN allows a backward only then.
    """
    directions, width = 1 + bidirectional, weights[0][1].shape[1]  # type: ignore[union-attr]
    stream = torch.cuda.current_stream(data.device).cuda_stream if data.is_cuda else None
    # What a tensor that is kept must have in common with the next call.
    where = (data.device, stream, torch.is_inference_mode_enabled())
    rows, ends, padding = _places(sizes, directions, data, where)
    steps, sequences = padding.shape[:2]
    # torch takes the persistent kernel of wide layers for multiples of 128.
    multiple = 128 if width > 128 and width % 128 == 0 else 8
    function: Any = torch.lstm if mode == "LSTM" else torch.gru
    finals: list[list[Tensor]] = [[], []] if mode == "LSTM" else [[]]
    inputs = data.new_zeros(steps * sequences, data.shape[1]).index_copy_(0, rows, data).view(steps, sequences, -1)
    for number in range(0, len(weights), directions):
        columns = multiple - inputs.shape[2] % multiple
        padding = padding.to(inputs.dtype)
        if states:
            start = [state[number : number + directions] for state in states]
        else:
            start = [_zeros((directions, sequences, width), inputs.dtype, where)] * len(finals)
        output, *final = function(
            torch.cat([inputs, padding.expand(-1, -1, columns)], 2),
            start if mode == "LSTM" else start[0],
            _with_column(mode, columns, weights[number : number + directions], where),
            *(True, 1, 0.0, training, bidirectional, False),
        )
        if mode == "LSTM":
            final[0] = output.reshape(-1, width).index_select(0, ends).view(directions, sequences, width)
        for all_finals, one in zip(finals, final, strict=True):
            all_finals.append(one)
        is_last = number + directions == len(weights)
        inputs = torch.dropout(output, dropout, True) if dropout and training and not is_last else output
    return inputs.flatten(0, 1).index_select(0, rows), [one[0] if len(one) == 1 else torch.cat(one) for one in finals]


_kept: tuple[Any, Any] = (None, None)


def _places(sizes: list[int], directions: int, like: Tensor, where: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the rows of a packing are in a padded tensor; what the last call returned is kept for other layers.

    Returns:
        The place in ``[T * B]`` of every row of ``data``; the place in ``[T * B * directions]`` of the last state of
        every direction and sequence; and 1 at padding, 0 elsewhere, ``[T, B, 1]`` in a floating-point dtype.
    """
    global _kept
    key = (sizes, directions, where)
    kept, places = _kept
    if kept == key:
        return places  # type: ignore[no-any-return]
    steps, sequences = len(sizes), sizes[0]
    real = np.arange(sequences) < np.array(sizes)[:, None]
    rows = real.reshape(-1).nonzero()[0]
    ends = (real.sum(0) - 1) * sequences + np.arange(sequences)
    if directions == 2:
        ends = np.concatenate([2 * ends, 2 * np.arange(sequences) + 1])
    # One buffer, so that one copy moves it, from pinned memory, which nothing waits for. `Tensor.numpy` would not do:
    # torch before 2.3 cannot share memory with numpy 2.
    indices = torch.frombuffer(np.concatenate([rows, ends]), dtype=torch.uint8)
    split, size = len(indices), real.size * like.element_size()
    buffer = torch.empty(split + size, dtype=torch.uint8, device="cpu", pin_memory=like.is_cuda)
    buffer[:split].copy_(indices)
    buffer[split:].view(like.dtype).copy_(torch.frombuffer(~real, dtype=torch.bool))
    buffer = buffer.to(like.device, non_blocking=True)
    indices, padding = buffer[:split].view(torch.int64), buffer[split:].view(like.dtype)
    places = indices[: len(rows)], indices[len(rows) :], padding.view(steps, sequences, 1)
    _kept = key, places
    return places


@lru_cache(maxsize=32)
def _zeros(shape: tuple[int, ...], dtype: torch.dtype, where: tuple[Any, ...]) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=where[0])


@lru_cache(maxsize=32)
def _column(mode: str, width: int, columns: int, dtype: torch.dtype, where: tuple[Any, ...]) -> Tensor:
    """Return the weights of the added columns, ``[gates * H, columns]``; all but the first are zero."""
    column = torch.zeros(len(_COLUMNS[mode]), width, columns, dtype=dtype, device=where[0])
    for gate, value in zip(column, _COLUMNS[mode], strict=True):
        gate[:, 0] = value
    return column.flatten(0, 1)


def _with_column(
    mode: str, columns: int, weights: Sequence[Sequence[Tensor | None]], where: tuple[Any, ...]
) -> Sequence[Tensor]:
    """Return the weights and biases of all directions of a layer, with the added columns."""
    height, width = weights[0][1].shape  # type: ignore[union-attr]
    dtype = weights[0][1].dtype  # type: ignore[union-attr]
    column, no_bias = _column(mode, width, columns, dtype, where), _zeros((height,), dtype, where)
    tensors = [no_bias if tensor is None else tensor for one in weights for tensor in one]
    if torch.is_autocast_enabled() and dtype != torch.float16:  # which casts and flattens them
        return [tensor if index % 4 else torch.cat([tensor, column], 1) for index, tensor in enumerate(tensors)]
    flat: tuple[Tensor, ...] = _Flat.apply(column, *tensors)  # type: ignore[no-untyped-call]
    return flat


class _Flat(torch.autograd.Function):
    """``apply(column, *weights)``: copies of the weights in one buffer, in cuDNN's order, with the added columns.

    torch warns of weights that are not in one buffer, and copies them. As in its own layers, a backward raises if a
    weight was changed in place after the forward.
    """

    @staticmethod
    def forward(ctx: Any, column: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*weights)
        ctx.columns = column.shape[1]
        wide = [weight if index % 4 else torch.cat([weight, column], 1) for index, weight in enumerate(weights)]
        order = sorted(range(len(wide)), key=lambda index: index % 4 > 1)  # all weights before all biases
        flat = torch.cat([wide[index].reshape(-1) for index in order])
        for index, part in zip(order, flat.split_with_sizes([wide[index].numel() for index in order]), strict=True):
            wide[index] = part.view(wide[index].shape)
        return tuple(wide)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises
        # By the number of columns, not by the shapes of the weights, whose `data` may have been replaced.
        return None, *(
            gradient if index % 4 else gradient.narrow(1, 0, gradient.shape[1] - ctx.columns)
            for index, gradient in enumerate(gradients)
        )
