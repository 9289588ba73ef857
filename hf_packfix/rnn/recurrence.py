"""One layer and direction over a packed sequence, from the input's product on, with a backward through time.

torch runs and records what comes before: the product of the data with ``weight_ih``, the transposition of
``weight_hh``, the parts of the initial state. So torch saves data and weights as in its own layers, and only if a
gradient needs them: they may be replaced through ``.data``, and what was changed in place raises where it does there.

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
from hf_packfix.rnn.schedule import Chunk

__all__ = ["Recurrence"]

#: Bytes of the widest buffer of a chunk, so that it stays in a cache; from 512 KiB to 16 MiB, times differ by noise.
_CHUNK_BYTES = 1 << 21
#: With fewer rows a matrix product for the weight gradients is no longer at full speed.
_FEWEST_ROWS = 256


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
    """``apply(cell, schedule, reverse, gates, weight, bias, *states)``.

    Args:
        cell: one of ``cells.CELLS``.
        schedule: the packing.
        reverse: whether to run from the last step to the first.
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
        cell, schedule, reverse, gates, weight, bias, *states = arguments
        ctx.constants = cell, schedule, reverse
        ctx.set_materialize_grads(False)
        output = gates if cell.gates == 1 else gates.new_empty(schedule.rows, weight.shape[0])
        kept = cell.buffers(gates, output)
        run, size, starts = cell.forward, 0, states
        hidden_weight = weight.contiguous()  # for a few rows a product with it takes 0.7 to 0.9 of the time
        whole = Chunk(0, schedule.rows, schedule.sizes)
        for found, *views in whole.steps(cell.forward_views(gates, output, *kept), backwards=reverse):
            if found != size:
                states = [_resized(*pair, size, found) for pair in zip(states, starts, strict=True)]
                size = found
            states = run(hidden_weight, bias, states, *views)
        final = schedule.final_rows(reverse)
        finals = [after.index_select(0, final) for after in cell.history(output, *kept)]
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
            return None, None, None, *_recorded(ctx, gradients)
        return None, None, None, *_computed(ctx, *gradients)


def _computed(ctx: Any, of_output: Tensor | None, *of_finals: Tensor | None) -> list[Tensor | None]:
    """Return the gradients of gates, weight, bias and states; None if not needed."""
    (cell, schedule, reverse), needed = ctx.constants, ctx.needs_input_grad[3:]
    gates, weight, _, *others = ctx.saved_tensors
    starts, kept = others[: cell.states], others[cell.states :]
    width, wide = weight.shape
    # A GRU has the new gate first in the hidden product.
    hidden_weight = weight.t() if cell.columns == cell.gates else _rolled(weight.t(), width)
    buffer = gates.new_empty(schedule.rows, cell.columns * width)
    # The gradients of the states between two steps, of all ranks; a step works on the first b of them.
    states = [_started(*pair) for pair in zip(of_finals, starts, strict=True)]
    of_weight: Tensor | None = None
    run, size, at = cell.backward, 0, cell.at(states, 0)
    most = max(_FEWEST_ROWS, _CHUNK_BYTES // (buffer.shape[1] * buffer.element_size()))
    for chunk in schedule.chunks(most, backwards=not reverse):
        rows = slice(chunk.start, chunk.stop)
        history = zip(cell.history(*kept), starts, strict=True)
        befores = [schedule.states_before(*pair, reverse, chunk) for pair in history]
        factors, saved = buffer[rows], [tensor[rows] for tensor in (gates, *kept)]
        views = [factors if of_output is None else of_output[rows], *cell.backward_views(factors, befores, *saved)]
        for found, of_step, *parts in chunk.steps(views, backwards=not reverse):
            if found != size:
                size, at = found, cell.at(states, found)
            if of_output is not None:
                at[0].add_(of_step)
            run(hidden_weight, at, *parts)
        if needed[1]:
            product = factors[:, :wide].t()
            of_weight = product @ befores[0] if of_weight is None else of_weight.addmm_(product, befores[0])
    of_bias = buffer[:, :wide].sum(0) if needed[2] else None
    if cell.columns != cell.gates:
        of_weight, of_bias = (None if value is None else _rolled(value, -width) for value in (of_weight, of_bias))
    of_gates = buffer[:, buffer.shape[1] - wide :] if needed[0] else None
    of_states = [state if need else None for state, need in zip(states, needed[3:], strict=True)]
    return [of_gates, None if of_weight is None else of_weight.t(), of_bias, *of_states]


def _recorded(ctx: Any, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return the same gradients, recorded by autograd so that they have gradients in turn.

    torch's own layer runs again over the input's product, with an identity for ``weight_ih``.
    """
    (cell, schedule, reverse), needed = ctx.constants, ctx.needs_input_grad[3:]
    inputs, kept = ctx.saved_tensors[: 3 + cell.states], ctx.saved_tensors[3 + cell.states :]
    gates, weight, _, hidden, *_ = inputs
    is_wanted = torch.is_grad_enabled()
    with torch.no_grad():
        before = schedule.states_before(kept[0], hidden, reverse)
        product = cell.product(gates, before, weight, *kept) - gates
        identity = torch.eye(gates.shape[1], dtype=gates.dtype, device="cpu")
    with torch.enable_grad():
        # Views: one input may depend on another one, and what flows through that is not ours to add.
        own: list[Any] = [None if value is None else value.view_as(value) for value in inputs]
        gates, weight, bias, *states = own
        weights = [identity, weight.t(), *([] if bias is None else [torch.zeros_like(bias), bias])]
        # The reverse direction is the second one of a layer that has both.
        hx = [state.expand(1 + reverse, -1, -1) for state in states]
        output, *finals = cell.function(
            gates + product,
            schedule.batch_sizes,
            hx if cell.states == 2 else hx[0],
            weights * (1 + reverse),
            *(bias is not None, 1, 0.0, False, reverse),
        )
        outputs = [output[:, -weight.shape[0] :], *(final[-1] for final in finals)]
        given = [pair for pair in zip(outputs, gradients, strict=True) if pair[1] is not None]
        wanted = [value for value, need in zip(own, needed, strict=True) if need]
        if not given or not wanted:
            return [None] * len(inputs)
        results, of_results = zip(*given, strict=True)
        found = iter(torch.autograd.grad(results, wanted, of_results, create_graph=is_wanted, allow_unused=True))
    return [next(found) if need else None for need in needed]


def _resized(state: Tensor, start: Tensor, found: int, size: int) -> Tensor:
    """Return the state ``[size, H]`` that a step begins from, from the one ``[found, H]`` that the step before left.

    Ranks from ``found`` on begin here, from ``start`` ``[B, H]``; those from ``size`` on have ended.
    """
    if found >= size:
        return state[:size]
    return torch.cat((state, start[found:size])) if found else start[:size]


def _started(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Return the gradient of the final states, to be added to; zeros if there is none."""
    return torch.zeros_like(like) if gradient is None else gradient.clone(memory_format=torch.contiguous_format)


def _rolled(tensor: Tensor, rows: int) -> Tensor:
    """Return ``[K]`` or ``[K, *]`` with its last rows first; with its first ones last if ``rows`` is negative."""
    return torch.cat((tensor[-rows:], tensor[:-rows]))
