"""``torch.nn.modules.rnn``: the recurrent layers over a PackedSequence on a CPU. Off unless asked for."""

from __future__ import annotations

import inspect
import types
from typing import Any

from hf_packfix.patches.patch import Function, Patch, patch

__all__ = ["PATCHES"]


def _declare(layer: str) -> Patch:
    @patch(
        f"torch.nn.modules.rnn:{layer}.forward",
        reason="trains step by step over packed data on a CPU, with a weight gradient a step; a backward of our own",
        parameters=("self", "input", "hx"),
    )
    def forward(original: Function, patch: Patch) -> Function:
        """Train in 0.2 to 0.5 of the time on packed data that is on a CPU; everything else goes to the original."""
        from torch.nn.utils.rnn import PackedSequence

        from hf_packfix.rnn import run

        def forward(self: Any, input: Any, hx: Any = None) -> Any:
            if patch.active and isinstance(input, PackedSequence):
                result = run(self, input, hx)
                if result is not None:
                    return result
            return original(self, input, hx)

        return _with_globals(forward, inspect.unwrap(original))

    return forward


def _with_globals(function: Any, original: Function) -> Function:
    """Return the function with the globals of the original.

    ``torch.jit.script`` compiles the source of what ``__wrapped__`` leads to, but looks its names up in the globals of
    the wrapper. The wrapper itself needs none.
    """
    found = getattr(original, "__globals__", function.__globals__)
    return types.FunctionType(function.__code__, found, function.__name__, function.__defaults__, function.__closure__)


PATCHES = tuple(map(_declare, ("LSTM", "GRU", "RNN")))
