"""One layer and direction over a packed sequence, from the input's product on, with a backward through time.

torch runs and records what comes before: the product of the data with ``weight_ih``, the transposition of
``weight_hh``, the parts of the initial state. So torch saves data and weights as in its own layers, and only if a
gradient needs them: they may be replaced through ``.data``, and what was changed in place raises where it does there.

It runs from the first step to the last. For the reverse direction, the caller reverses the steps of every sequence.

Shapes: B sequences, N rows, b in a step, H hidden units, G gates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_packfix.rnn.coverage import autocast_is_enabled, is_plain

__all__ = ["Recurrence"]


def _without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Run a backward in the precision of its forward, even if it is called under autocast."""

    @functools.wraps(backward)
    def wrapper(*arguments: Any) -> Any:
        if not autocast_is_enabled():
            return backward(*arguments)
        with torch.autocast("cpu", enabled=False):
            return backward(*arguments)

    return wrapper


class Recurrence(torch.autograd.Function):
    """``apply(cell, schedule, gates, weight, bias, *states)``.

    Args:
        cell: one of ``cells.CELLS``.
        schedule: the packing.
        gates: the input's product with its bias, ``[N, G * H]``; overwritten.
        weight: ``weight_hh.t()``, ``[H, G * H]``.
        bias: of a GRU, ``bias_hh``, ``[3H]``, or None. For the other cells it is part of ``gates``.
        states: the initial ones in sorted order, ``[B, H]``; an LSTM has two.

    Returns:
        The outputs ``[N, H]`` and the final states ``[B, H]``, in sorted order. All inputs and the outputs are saved:
        the caller copies what may change.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Run the layer."""
        cell, schedule, gates, weight, bias, *states = arguments
        ctx.constants = cell, schedule
        ctx.set_materialize_grads(False)
        output = gates if cell.gates == 1 else gates.new_empty(schedule.rows, weight.shape[0])
        kept = cell.buffers(gates, output, bias)
        run, found, starts = cell.forward, schedule.sequences, states
        hidden_weight = weight.contiguous()  # for a few rows a product with it takes 0.7 to 0.9 of the time
        for size, *views in schedule.steps(cell.forward_views(gates, output, *kept)):
            if size != found:
                states, found = [state[:size] for state in states], size
            states = run(hidden_weight, states, *views)
        finals = [after.index_select(0, schedule.last_rows) for after in cell.history(output, *kept)]
        if output is gates:
            output = output.detach()
        ctx.save_for_backward(gates, weight, bias, *starts, output, *kept)
        return output, *finals

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of all inputs."""
        # Gradients of gradients, a backward under `vmap`, a dual tensor: torch's own operations, recorded.
        be_recorded = torch.is_grad_enabled() or forward_ad._current_level >= 0
        if be_recorded or not all(gradient is None or is_plain(gradient) for gradient in gradients):
            return None, None, *_recorded(ctx, gradients)
        return None, None, *_computed(ctx, *gradients)


def _computed(ctx: Any, of_output: Tensor | None, *of_finals: Tensor | None) -> list[Tensor | None]:
    """Return the gradients of gates, weight, bias and states; None if not needed."""
    (cell, schedule), needed = ctx.constants, ctx.needs_input_grad[2:]
    gates, weight, _, *others = ctx.saved_tensors
    starts, kept = others[: cell.states], others[cell.states :]
    width, wide = weight.shape
    # A GRU has the new gate first in the hidden product.
    rolled = 0 if cell.columns == cell.gates else width
    hidden_weight = _rolled(weight.t(), rolled)
    befores = [schedule.states_before(*pair) for pair in zip(cell.history(*kept), starts, strict=True)]
    factors = gates.new_empty(schedule.rows, cell.columns * width)
    views = cell.backward_views(factors, befores, gates, *kept)
    # The gradients of the hidden states after every step; each step adds to those of the step before it.
    hidden = _copy(kept[0], of_output)
    if of_finals[0] is not None:
        hidden.index_add_(0, schedule.last_rows, of_finals[0])
    # The gradients of the initial states. While the loop runs, an LSTM's second is that of the current cell state.
    states = [torch.zeros_like(starts[0]), *(_copy(*pair) for pair in zip(starts[1:], of_finals[1:], strict=True))]
    steps = schedule.steps([hidden, *views])
    run, found, at = cell.backward, 0, ()
    for step in reversed(range(len(steps))):
        size, of_step, *parts = steps[step]
        if size != found:
            found, at = size, cell.at(states, size)
        before = steps[step - 1][1] if step else states[0]
        run(hidden_weight, at, of_step, before if len(before) == size else before[:size], *parts)
    product = factors[:, :wide]
    of_gates = factors[:, factors.shape[1] - wide :] if needed[0] else None
    of_weight = _rolled(product.t() @ befores[0], -rolled).t() if needed[1] else None
    of_bias = _rolled(product.sum(0), -rolled) if needed[2] else None
    return [of_gates, of_weight, of_bias, *(s if need else None for s, need in zip(states, needed[3:], strict=True))]


def _recorded(ctx: Any, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return the same gradients, recorded by autograd so that they have gradients in turn.

    torch's own layer runs again over the input's product, with an identity for ``weight_ih``.
    """
    (cell, schedule), needed = ctx.constants, ctx.needs_input_grad[2:]
    inputs, kept = ctx.saved_tensors[: 3 + cell.states], ctx.saved_tensors[3 + cell.states :]
    gates, weight, bias, *states = inputs
    is_wanted = torch.is_grad_enabled()
    with torch.no_grad():
        of_hidden = schedule.states_before(kept[0], states[0]) @ weight
        product = cell.product(gates, of_hidden if bias is None else of_hidden + bias) - gates
        identity = torch.eye(gates.shape[1], dtype=gates.dtype, device="cpu")
    with torch.enable_grad():
        weights = [identity, weight.t(), *([] if bias is None else [torch.zeros_like(bias), bias])]
        hx = [state.unsqueeze(0) for state in states]
        output, *finals = cell.function(
            gates + product,
            schedule.batch_sizes,
            hx if cell.states == 2 else hx[0],
            weights,
            *(bias is not None, 1, 0.0, False, False),
        )
        outputs = [output, *(final[0] for final in finals)]
        given = [pair for pair in zip(outputs, gradients, strict=True) if pair[1] is not None]
        wanted = [value for value, need in zip(inputs, needed, strict=True) if need]
        if not given or not wanted:
            return [None] * len(inputs)
        results, of_results = zip(*given, strict=True)
        found = iter(torch.autograd.grad(results, wanted, of_results, create_graph=is_wanted, allow_unused=True))
    return [next(found) if need else None for need in needed]


def _copy(like: Tensor, gradient: Tensor | None) -> Tensor:
    """Return a gradient to be added to; zeros if there is none."""
    return torch.zeros_like(like) if gradient is None else gradient.clone(memory_format=torch.contiguous_format)


def _rolled(tensor: Tensor, rows: int) -> Tensor:
    """Return ``[K]`` or ``[K, *]`` with its last rows first; with its first ones last if ``rows`` is negative."""
    return torch.cat((tensor[-rows:], tensor[:-rows])) if rows else tensor
