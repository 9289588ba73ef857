"""What surrounds a backward: gradients of gradients, for which torch computes one layer again, and autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_packfix.rnn.coverage import autocast_is_enabled, is_plain
from hf_packfix.rnn.schedule import Schedule

__all__ = ["must_be_recorded", "recorded_gradients", "without_autocast"]

_FUNCTIONS: dict[str, Any] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Run a backward in the precision of its forward, even if it is called under autocast."""

    @functools.wraps(backward)
    def wrapper(*arguments: Any) -> Any:
        if not autocast_is_enabled():
            return backward(*arguments)
        with torch.autocast("cpu", enabled=False):
            return backward(*arguments)

    return wrapper


def must_be_recorded(gradients: Sequence[Tensor | None]) -> bool:
    """Return whether a backward is asked for gradients of gradients, or runs under ``vmap``."""
    return torch.is_grad_enabled() or not all(gradient is None or is_plain(gradient) for gradient in gradients)


def recorded_gradients(
    mode: str,
    schedule: Schedule,
    reverse: bool,
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradients of one layer and direction, recorded by autograd so that they have gradients in turn.

    Args:
        mode: ``nn.RNNBase.mode``.
        schedule: the packing.
        reverse: whether this is the reverse direction.
        inputs: ``data`` ``[N, D]``, the initial states ``[B, H]`` (two for an LSTM), the two weights and the two
            biases, which are None for a layer without.
        needed: which of the inputs need a gradient.
        gradients: those of the outputs: ``[N, H]``, and ``[B, H]`` for each final state; None for zero.
    """
    with torch.enable_grad():
        # Views: one input may depend on another one, and what flows through that is not ours to add.
        own = [None if value is None else value.view_as(value) for value in inputs]
        outputs = _run(mode, schedule, reverse, own)
        given = [(output, grad) for output, grad in zip(outputs, gradients, strict=True) if grad is not None]
        wanted = [value for value, need in zip(own, needed, strict=True) if need and value is not None]
        if not given or not wanted:
            return [None] * len(inputs)
        found = iter(
            torch.autograd.grad(
                [output for output, _ in given],
                wanted,
                [grad for _, grad in given],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
    return [next(found) if need and value is not None else None for value, need in zip(own, needed, strict=True)]


def _run(mode: str, schedule: Schedule, reverse: bool, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    states = 2 if mode == "LSTM" else 1
    data, *rest = inputs
    assert data is not None
    start = [state.unsqueeze(0) for state in rest[:states] if state is not None]
    weights = [weight for weight in rest[states:] if weight is not None]
    if reverse:
        data = data.index_select(0, schedule.reversal)
    function = _FUNCTIONS[mode]
    hx = start if mode == "LSTM" else start[0]
    output, *finals = function(data, schedule.batch_sizes, hx, weights, len(weights) == 4, 1, 0.0, False, False)
    if reverse:
        output = output.index_select(0, schedule.reversal)
    return [output, *(final.squeeze(0) for final in finals)]
