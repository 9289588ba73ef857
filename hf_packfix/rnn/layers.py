"""torch's own ``forward`` of its recurrent layers, with operators of ours inside; nothing else differs.

A copy of torch's ``forward`` looks up ``_VF``, through which it calls its operators, in globals of its own. So the
checks and their errors, the permutation of states, and when and how often a weight is read are torch's.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from functools import cache, partial, update_wrapper
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from hf_packfix.rnn.cells import CELLS
from hf_packfix.rnn.coverage import is_compiling, is_eager
from hf_packfix.rnn.stack import run_stack

__all__ = ["GRU", "LSTM", "RNN", "call", "faster", "run"]

Forward = Callable[..., Any]


class _LeftToTorchError(Exception):
    """Raised in place of a call of torch's function."""


def _leave(*arguments: Any) -> Any:
    raise _LeftToTorchError


class _Operators:
    """What stands for ``torch._VF`` in a copy of torch's ``forward``."""

    def __init__(self, is_given: bool, only_ours: bool) -> None:
        for mode in CELLS:
            name = mode.lower()
            theirs = _leave if only_ours else getattr(torch._VF, name)
            setattr(self, name, partial(self._call, mode, is_given, theirs))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch._VF, name)

    @staticmethod
    def _call(mode: str, is_given: bool, theirs: Forward, *arguments: Any) -> Any:
        # The other overload, for padded tensors, has the weights at another place.
        result = run_stack(mode, is_given, *arguments) if len(arguments) == 9 else None
        return theirs(*arguments) if result is None else result


@cache
def _with_operators(forward: Any, is_given: bool, only_ours: bool = False) -> Any:
    """Return a copy of torch's ``forward`` that calls our operators; itself if it is not as it is known here."""
    code, names = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    if code is None or "_VF" not in code.co_names or names.get("_VF") is not torch._VF:
        return forward
    found = {**names, "_VF": _Operators(is_given, only_ours)}
    return types.FunctionType(code, found, forward.__name__, forward.__defaults__, forward.__closure__)


def _may_be_ours(data: Any) -> bool:
    # The rest is looked at later, but no compiler is to read the copy.
    return (torch.is_grad_enabled() or data.is_cuda) and not is_compiling()


def faster(original: Forward, patch: Any = None) -> Forward:
    """Return a ``forward`` that calls our operators over a PackedSequence.

    Its globals are those of the original, which it names in ``__wrapped__``: ``torch.jit.script`` compiles the source
    of the original, but looks up its names in the globals of the wrapper.

    Args:
        original: torch's ``forward``; with another one, it is all that is called.
        patch: the original is called while its ``active`` is False.
    """
    packed_type, may_be_ours = PackedSequence, _may_be_ours
    from_zeros, from_given = (_with_operators(original, is_given) for is_given in (False, True))

    def forward(self: Any, input: Any, hx: Any = None) -> Any:
        if isinstance(input, packed_type) and (patch is None or patch.active) and may_be_ours(input[0]):
            return from_zeros(self, input) if hx is None else from_given(self, input, hx)
        return original(self, input, hx)

    code, found = forward.__code__, getattr(original, "__globals__", forward.__globals__)
    copy = types.FunctionType(code, found, "forward", forward.__defaults__, forward.__closure__)
    return update_wrapper(copy, original)


def run(layer: nn.RNNBase, packed: Any, hx: Any = None) -> tuple[PackedSequence, Any] | None:
    """Return what ``layer.forward(packed, hx)`` returns; None if torch's own operators must run, or are faster.

    Args:
        layer: an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``.
        packed: data ``[N, D]``, float32 or float64 on a CPU, or on a GPU. Anything else gives None.
        hx: the initial state ``[L, B, H]``, for an LSTM two of them, in the original order of the sequences; zeros by
            default.

    Returns:
        The outputs, packed like the input, ``[N, O]``, and the final state ``[L, B, H]``, for an LSTM two of them.

    Raises:
        Exception: what torch's ``forward`` raises for arguments that it refuses.

    Example:
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> x = pack_sequence([torch.randn(40, 3), torch.randn(25, 3)], enforce_sorted=False)
        >>> gru = nn.GRU(3, 8)
        >>> output, hidden = run(gru, x) or gru(x)
        >>> output.data.shape, hidden.shape
        (torch.Size([65, 8]), torch.Size([1, 2, 8]))
    """
    if not isinstance(packed, PackedSequence) or not is_eager() or not _may_be_ours(packed.data):
        return None
    original = next((forward for kind, forward in _ORIGINALS.items() if isinstance(layer, kind)), None)
    forward = _with_operators(original, hx is not None, only_ours=True)
    if forward is original:
        return None
    try:
        result: tuple[PackedSequence, Any] = forward(layer, packed, hx)
    except _LeftToTorchError:
        return None
    return result


def call(layer: nn.RNNBase, input: Any, hx: Any = None) -> Any:
    """Return ``layer(input, hx)``, hooks and all, with our operators if the layer is torch's own.

    So a model may hold torch's layers, which checkpoints, copies and tools know, and be faster all the same.
    """
    if not isinstance(input, PackedSequence) or not is_eager():
        return layer(input, hx)
    forward = _OWN.get(type(layer))
    if forward is None or "forward" in vars(layer):
        return layer(input, hx)
    vars(layer)["forward"] = types.MethodType(forward, layer)
    try:
        return layer(input, hx)
    finally:
        vars(layer).pop("forward", None)  # another thread may have been here


#: Below whatever has been put around them by now.
_ORIGINALS: dict[type[nn.RNNBase], Any] = {kind: inspect.unwrap(kind.forward) for kind in (nn.LSTM, nn.GRU, nn.RNN)}
_OWN = {kind: faster(original) for kind, original in _ORIGINALS.items()}


def _new(cls: type[nn.RNNBase], *args: Any, **kwargs: Any) -> Any:
    """Return a layer of torch's own class, and only of a subclass one of ours."""
    kind = cls.__mro__[1]
    if kind not in _ORIGINALS:
        return object.__new__(cls)
    return _bind(kind(*args, **kwargs))


def _bind(layer: Any) -> Any:
    for function in (_OWN[type(layer)], _replicate_for_data_parallel):
        setattr(layer, function.__name__, types.MethodType(function, layer))
    return layer


def _replicate_for_data_parallel(self: nn.RNNBase) -> Any:
    # It copies the attributes of the instance: a replica would run the weights of the original.
    return _bind(type(self)._replicate_for_data_parallel(self))


class LSTM(nn.LSTM):
    """``nn.LSTM``, faster over packed sequences.

    A layer is of torch's own class, which tools know, with a ``forward`` of its own. Copies have it as well. Pickles
    have not: unpickled, a layer is torch's. A subclass has it in its class.

    Example:
        >>> import torch
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> x = pack_sequence([torch.randn(2, 3), torch.randn(5, 3)], enforce_sorted=False)
        >>> output, (hidden, cell) = LSTM(3, 8)(x)
        >>> output.data.shape, hidden.shape
        (torch.Size([7, 8]), torch.Size([1, 2, 8]))
    """

    __new__ = _new
    forward = _OWN[nn.LSTM]


class GRU(nn.GRU):
    """``nn.GRU``, faster over packed sequences; see :class:`LSTM`.

    Example:
        >>> import torch
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> GRU(3, 8)(pack_sequence([torch.randn(5, 3), torch.randn(2, 3)]))[0].data.shape
        torch.Size([7, 8])
    """

    __new__ = _new
    forward = _OWN[nn.GRU]


class RNN(nn.RNN):
    """``nn.RNN``, faster over packed sequences; see :class:`LSTM`.

    Example:
        >>> import torch
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> RNN(3, 8)(pack_sequence([torch.randn(5, 3), torch.randn(2, 3)]))[0].data.shape
        torch.Size([7, 8])
    """

    __new__ = _new
    forward = _OWN[nn.RNN]
