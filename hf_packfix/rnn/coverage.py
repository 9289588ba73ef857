"""What the layers of this folder cover; everything else is torch's own.

Covered are ``nn.LSTM`` without projections, ``nn.GRU`` and ``nn.RNN`` over a PackedSequence in eager mode: of float32
or float64 on a CPU, on a GPU of what cuDNN takes. Not covered: ``torch.compile``, ``torch.jit``, functorch transforms,
forward-mode differentiation, dispatch and function modes, tensor subclasses, autocast on a CPU, and whatever torch
refuses: its own function then raises its own error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hf_packfix.rnn.cells import CELLS

__all__ = ["LEANS_ON", "autocast_is_enabled", "is_compiling", "is_eager", "is_plain", "sizes_of", "takes_weights"]

#: What of torch is read here, most of it private: the only way to see what a tensor is below its type (whether vmap or
#: a functorch transform wraps it, an inference tensor, its layout, device and lazy negation) in a microsecond, and
#: what is active. Without any of them, nothing is covered.
LEANS_ON = (
    "torch._C:_dispatch_keys",
    "torch._C._functorch:peek_interpreter_stack",
    "torch._C:_len_torch_dispatch_stack",
    "torch._C:_len_torch_function_stack",
    "torch.compiler:is_compiling",
    "torch.jit:is_tracing",
    "torch.autograd.forward_ad:_current_level",
)
_TYPES = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.float64)


_found: list[Any] = [
    getattr(sys.modules.get(module), name, None) for module, name in (path.split(":") for path in LEANS_ON)
]
_is_known = None not in _found
_keys, _functorch, _dispatch_modes, _function_modes, _is_compiling, _is_tracing, _ = _found
_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", None)


def _ordinary_keys(device: str) -> list[Any]:
    ordinary = torch.empty(0, device=device)
    with torch.inference_mode():
        return [_keys(ordinary), _keys(torch.empty(0, device=device))]


_ORDINARY = {"cpu": _ordinary_keys("cpu")} if _is_known else {}


def is_plain(tensor: Any) -> bool:
    """Return whether this is an ordinary dense tensor or parameter, that no transform wraps."""
    if type(tensor) not in _TYPES:
        return False
    keys = _keys(tensor)
    if keys in _ORDINARY["cpu"]:
        return True
    if tensor.is_cuda and "cuda" not in _ORDINARY:
        _ORDINARY["cuda"] = _ordinary_keys("cuda")
    return tensor.is_cuda and keys in _ORDINARY["cuda"]


def autocast_is_enabled() -> bool:
    """Return whether operations are cast, on any device."""
    if _any_autocast is not None:
        return bool(_any_autocast())
    return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


def is_compiling() -> bool:
    """Return whether ``torch.compile`` reads this; also if that cannot be known."""
    return not _is_known or bool(_is_compiling())


def is_eager() -> bool:
    """Return whether operations do now what they say, and nothing records, traces or transforms them but autograd."""
    return (
        _is_known
        and not _is_compiling()
        and not _is_tracing()
        and _functorch() is None
        and not _dispatch_modes()
        and not _function_modes()
        and forward_ad._current_level < 0
    )


def sizes_of(data: Any, batch_sizes: Any) -> list[int] | None:
    """Return the batch sizes of a packed sequence; None if this folder does not cover it.

    Args:
        data: ``[N, D]``.
        batch_sizes: int64 ``[T]``, on the CPU.
    """
    if (
        not is_plain(data)
        or data.dim() != 2
        or not (data.is_cuda or data.dtype in _DTYPES)
        or not is_plain(batch_sizes)
        or batch_sizes.device.type != "cpu"
        or batch_sizes.dtype != torch.int64
        or batch_sizes.dim() != 1
    ):
        return None
    sizes: list[int] = batch_sizes.tolist()
    if not sizes or sizes[-1] < 1 or sum(sizes) != data.shape[0] or sizes != sorted(sizes, reverse=True):
        return None
    return sizes


def takes_weights(
    mode: str, data: Tensor, states: Sequence[Any], cells: Sequence[Sequence[Any]], directions: int, sequences: int
) -> bool:
    """Return whether weights and states are plain and fit, of the type of the data unless autocast casts them.

    Args:
        mode: ``nn.RNNBase.mode``.
        data: ``[N, D]``.
        states: the initial ones, ``[L, B, H]``; two for an LSTM.
        cells: the two weights, and the two biases if there are any, of every layer and direction.
        directions: 1 or 2.
        sequences: B.
    """
    cell, weight = CELLS[mode], cells[0][1]
    if not is_plain(weight) or weight.dim() != 2 or len(states) != cell.states:
        return False
    width = weight.shape[1]
    height = cell.gates * width
    expected: list[tuple[Any, tuple[int, ...]]] = [(state, (len(cells), sequences, width)) for state in states]
    for number, weights in enumerate(cells):
        inputs = data.shape[1] if number < directions else directions * width
        expected += zip(weights, [(height, inputs), (height, width), (height,), (height,)], strict=False)
    dtype, device = data.dtype, data.device
    is_cast = data.is_cuda and torch.is_autocast_enabled()
    for tensor, shape in expected:
        if not is_plain(tensor) or tensor.shape != shape or tensor.device != device:
            return False
        if tensor.dtype != dtype and not (is_cast and tensor.is_floating_point()):
            return False
    return True
