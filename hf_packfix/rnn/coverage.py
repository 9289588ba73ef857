"""What the layers of this folder cover; everything else is torch's own.

Covered are ``nn.LSTM`` without projections, ``nn.GRU`` and ``nn.RNN`` over a PackedSequence of float32 or float64 on
the CPU, in eager mode. Not covered: autocast, ``torch.compile``, ``torch.jit``, functorch transforms, forward-mode
differentiation, dispatch and function modes, tensor subclasses, and whatever torch refuses: its own layer then raises
its own error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

__all__ = ["autocast_is_enabled", "is_eager", "is_plain", "sizes_of", "states_of", "weights_of"]

_KINDS: dict[str, type[nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN_TANH": nn.RNN, "RNN_RELU": nn.RNN}
_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
_METHODS = ("check_forward_args", "check_input", "check_hidden_size", "permute_hidden")
_TYPES = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.float64)

# Private, and the only way to see what a tensor is below its type: whether vmap or a functorch transform wraps it, an
# inference tensor, its layout, device and lazy negation, in a microsecond. Without them, nothing is covered.
_keys = getattr(torch._C, "_dispatch_keys", None)
_functorch = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_function_modes = getattr(torch._C, "_len_torch_function_stack", None)
_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", None)
_is_compiling = getattr(getattr(torch, "compiler", None), "is_compiling", None)
_known = None not in (_keys, _functorch, _dispatch_modes, _function_modes, _is_compiling)


def _ordinary_keys() -> list[Any]:
    if _keys is None:
        return []
    ordinary = torch.empty(0, device="cpu")
    with torch.inference_mode():
        return [_keys(ordinary), _keys(torch.empty(0, device="cpu"))]


_ORDINARY = _ordinary_keys()


def is_plain(tensor: Any) -> bool:
    """Return whether this is an ordinary dense tensor or parameter on the CPU, that no transform wraps."""
    return type(tensor) in _TYPES and _keys is not None and _keys(tensor) in _ORDINARY


def autocast_is_enabled() -> bool:
    """Return whether operations are cast, on any device."""
    if _any_autocast is not None:
        return bool(_any_autocast())
    return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


def is_eager() -> bool:
    """Return whether operations do now what they say, and nothing records, traces or transforms them but autograd."""
    return (
        _known
        and not _is_compiling()  # type: ignore[misc]
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and _functorch() is None  # type: ignore[misc]
        and not _dispatch_modes()  # type: ignore[misc]
        and not _function_modes()  # type: ignore[misc]
        and forward_ad._current_level < 0
        and not autocast_is_enabled()
    )


def sizes_of(layer: nn.RNNBase, packed: PackedSequence) -> list[int] | None:
    """Return the batch sizes of a packed sequence that the layer takes and this folder covers; None otherwise."""
    data, batch_sizes, *indices = packed
    kind = _KINDS.get(layer.mode)
    if (
        kind is None
        or layer.proj_size
        or not is_plain(data)
        or data.dtype not in _DTYPES
        or data.dim() != 2
        or data.shape[1] != layer.input_size
        or not is_plain(batch_sizes)
        or batch_sizes.dtype != torch.int64
        or batch_sizes.dim() != 1
    ):
        return None
    # A subclass that checks or permutes in its own way does so in torch's forward.
    if type(layer) is not kind and any(getattr(type(layer), name) is not getattr(kind, name) for name in _METHODS):
        return None
    sizes: list[int] = batch_sizes.tolist()
    if not sizes or sizes[-1] < 1 or sum(sizes) != data.shape[0] or sizes != sorted(sizes, reverse=True):
        return None
    for index in indices:
        if index is not None and not (
            is_plain(index) and index.dtype == torch.int64 and tuple(index.shape) == (sizes[0],)
        ):
            return None
    return sizes


def states_of(layer: nn.RNNBase, hx: Any, data: Tensor, sequences: int) -> list[Tensor] | None:
    """Return the initial states, ``[L, B, H]`` each, as they were given; empty for None, None if not covered."""
    if hx is None:
        return []
    if layer.mode == "LSTM":
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            return None
        states = list(hx)
    else:
        states = [hx]
    shape = (layer.num_layers * (2 if layer.bidirectional else 1), sequences, layer.hidden_size)
    for state in states:
        if not is_plain(state) or state.dtype != data.dtype or tuple(state.shape) != shape:
            return None
    return states


def weights_of(layer: nn.RNNBase, data: Tensor) -> list[list[Tensor | None]] | None:
    """Return the two weights and the two biases (or None twice) of every layer and direction; None if not covered."""
    directions = 2 if layer.bidirectional else 1
    height, width = _GATES[layer.mode] * layer.hidden_size, layer.hidden_size
    weights: Sequence[Sequence[Tensor]] = layer.all_weights
    if len(weights) != layer.num_layers * directions:
        return None
    result: list[list[Tensor | None]] = []
    for number, tensors in enumerate(weights):
        inputs = layer.input_size if number < directions else directions * width
        shapes = [(height, inputs), (height, width), *([(height,)] * 2 if layer.bias else [])]
        if len(tensors) != len(shapes):
            return None
        for tensor, shape in zip(tensors, shapes, strict=True):
            if not is_plain(tensor) or tensor.dtype != data.dtype or tuple(tensor.shape) != shape:
                return None
        result.append([*tensors, *([] if layer.bias else [None, None])])
    return result
