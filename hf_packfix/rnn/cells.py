"""What is a cell's own: one step forward, one step backward, and what a step multiplies gradients by.

Shapes: N rows, m rows in a chunk, b in a step, H hidden units, G gates. In the order of operations each cell follows
torch's where infinite values and NaN would show another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["CELLS"]

#: What saturates every gate exactly, in place of infinity, which a matrix product makes NaN.
_SATURATED = 1e4


class _Cell:
    """A cell with one state; here what its methods do.

    Attributes:
        function: torch's own, over all layers and steps.
        gates: G. The tensor of the gates, ``[N, G * H]`` in torch's order, comes as the input's product and bias.
        columns: of a row in the buffer of the backward, which holds the gradients of the input's product in the last
            G * H columns, of the hidden product in the first.
    """

    function: Any
    states = 1
    gates: int
    columns: int

    def buffers(self, gates: Tensor, output: Tensor) -> list[Tensor]:
        """Return what the forward fills for the backward, besides gates and output."""
        return []

    def history(self, output: Tensor, *buffers: Tensor) -> list[Tensor]:
        """Return the states ``[N, H]`` after every row."""
        return [output]

    def forward_views(self, gates: Tensor, output: Tensor, *buffers: Tensor) -> list[Tensor]:
        """Return the tensors ``[m, *]`` of which ``forward`` gets the rows of a step."""
        raise NotImplementedError

    def forward(self, weight: Tensor, bias: Any, states: Any, *views: Tensor) -> Sequence[Tensor]:
        """Run a step from the states ``[b, H]`` and return the new ones."""
        raise NotImplementedError

    def backward_views(self, factors: Tensor, befores: list[Tensor], *saved: Tensor) -> list[Tensor]:
        """Write what gradients are multiplied by; return the tensors of which ``backward`` gets the rows of a step."""
        raise NotImplementedError

    def at(self, states: list[Tensor], size: int) -> Sequence[Tensor]:
        """Return what ``backward`` works in, for steps of this size; the gradient of the hidden state first."""
        return [states[0][:size]]

    def backward(self, weight: Tensor, at: Any, *views: Tensor) -> None:
        """Turn the gradients of states into those of the step before, and factors into gradients of the products."""
        raise NotImplementedError

    def product(self, gates: Tensor, before: Tensor, weight: Tensor, output: Tensor, *buffers: Tensor) -> Tensor:
        """Return the input's product again, from what was saved."""
        raise NotImplementedError


class _LSTM(_Cell):
    """Gates: input, forget, cell, output."""

    function, states, gates, columns = torch.lstm, 2, 4, 4

    def buffers(self, gates: Tensor, output: Tensor) -> list[Tensor]:
        return [torch.empty_like(output), torch.empty_like(output)]  # the cell states and their tanh

    def history(self, output: Tensor, *buffers: Tensor) -> list[Tensor]:
        return [output, buffers[0]]

    def forward_views(self, gates: Tensor, output: Tensor, *buffers: Tensor) -> list[Tensor]:
        width = output.shape[1]
        return [gates, gates[:, : 2 * width], *gates.split(width, 1), *buffers, output]

    def forward(self, weight: Tensor, bias: Any, states: Any, *views: Tensor) -> Sequence[Tensor]:
        hidden, cell = states
        gates, sigmoids, in_gate, forget_gate, tanh, out_gate, new_cell, squashed, new = views
        gates.addmm_(hidden, weight)
        sigmoids.sigmoid_()
        tanh.tanh_()
        out_gate.sigmoid_()
        torch.mul(forget_gate, cell, out=new_cell)
        new_cell.addcmul_(in_gate, tanh)
        torch.tanh(new_cell, out=squashed)
        torch.mul(out_gate, squashed, out=new)
        return new, new_cell

    def backward_views(self, factors: Tensor, befores: list[Tensor], *saved: Tensor) -> list[Tensor]:
        gates, output, _, squashed = saved
        width = output.shape[1]
        in_gate, forget_gate, tanh, out_gate = gates.split(width, 1)
        in_factor, forget_factor, tanh_factor, out_factor = factors.split(width, 1)
        for sigmoids, into in ((gates[:, : 2 * width], factors[:, : 2 * width]), (out_gate, out_factor)):
            torch.addcmul(sigmoids, sigmoids, sigmoids, value=-1, out=into)
        in_factor.mul_(tanh)
        forget_factor.mul_(befores[1])
        out_factor.mul_(squashed)
        square = tanh * tanh
        torch.addcmul(in_gate, in_gate, square, value=-1, out=tanh_factor)
        torch.mul(squashed, squashed, out=square)
        through_tanh = torch.addcmul(out_gate, out_gate, square, value=-1, out=square)
        return [factors, factors.view(-1, 4, width)[:, :3], out_factor, through_tanh, forget_gate]

    def at(self, states: list[Tensor], size: int) -> Sequence[Tensor]:
        hidden, cell = states[0][:size], states[1][:size]
        return hidden, cell, cell.unsqueeze(1)

    def backward(self, weight: Tensor, at: Any, *views: Tensor) -> None:
        (hidden, cell, cell_of_gates), (gates, cell_gates, out_gate, through_tanh, forget_gate) = at, views
        cell.addcmul_(hidden, through_tanh)
        cell_gates.mul_(cell_of_gates)
        out_gate.mul_(hidden)
        cell.mul_(forget_gate)
        torch.mm(gates, weight, out=hidden)

    def product(self, gates: Tensor, before: Tensor, weight: Tensor, output: Tensor, *buffers: Tensor) -> Tensor:
        totals, tanh = torch.logit(gates), slice(2 * output.shape[1], 3 * output.shape[1])
        torch.atanh(gates[:, tanh], out=totals[:, tanh])
        return totals.clamp_(-_SATURATED, _SATURATED) - before @ weight


class _GRU(_Cell):
    """Gates: reset, update, new. The backward's columns: the new gate's hidden part, then the gates."""

    function, gates, columns = torch.gru, 3, 4

    def buffers(self, gates: Tensor, output: Tensor) -> list[Tensor]:
        return [torch.empty_like(gates)]  # the hidden product with its bias

    def forward_views(self, gates: Tensor, output: Tensor, *buffers: Tensor) -> list[Tensor]:
        (hidden,), width = buffers, output.shape[1]
        both, hidden_both = gates[:, : 2 * width], hidden[:, : 2 * width]
        return [hidden, hidden_both, hidden[:, 2 * width :], both, *gates.split(width, 1), output]

    def forward(self, weight: Tensor, bias: Any, states: Any, *views: Tensor) -> Sequence[Tensor]:
        (before,), (hidden, hidden_both, hidden_new, both, reset, update, new, state) = states, views
        if bias is None:
            torch.mm(before, weight, out=hidden)
        else:
            torch.addmm(bias, before, weight, out=hidden)
        both.add_(hidden_both).sigmoid_()
        new.addcmul_(reset, hidden_new).tanh_()
        torch.sub(before, new, out=state)
        torch.addcmul(new, state, update, out=state)
        return (state,)

    def backward_views(self, factors: Tensor, befores: list[Tensor], *saved: Tensor) -> list[Tensor]:
        gates, output, hidden = saved
        width = output.shape[1]
        reset, update, new = gates.split(width, 1)
        hidden_factor, reset_factor, update_factor, new_factor = factors.split(width, 1)
        sigmoids = gates[:, : 2 * width]
        torch.addcmul(sigmoids, sigmoids, sigmoids, value=-1, out=factors[:, width : 3 * width])
        torch.mul(new, new, out=new_factor)
        new_factor.neg_().add_(1)
        torch.mul(new_factor, reset, out=hidden_factor)
        reset_factor.mul_(hidden[:, 2 * width :]).mul_(new_factor)
        update_factor.mul_(befores[0] - new)
        return [factors[:, : 3 * width], factors.view(-1, 4, width)[:, :2], update_factor, new_factor, update]

    def at(self, states: list[Tensor], size: int) -> Sequence[Tensor]:
        hidden = states[0][:size]
        of_new = torch.empty_like(hidden)
        return hidden, torch.empty_like(hidden), of_new, of_new.unsqueeze(1)

    def backward(self, weight: Tensor, at: Any, *views: Tensor) -> None:
        (hidden, kept, of_new, of_both), (product, both, update_gate, new_gate, update) = at, views
        torch.mul(hidden, update, out=kept)
        torch.sub(hidden, kept, out=of_new)  # not times 1 - update: of an infinite gradient torch makes NaN
        both.mul_(of_both)
        update_gate.mul_(hidden)
        new_gate.mul_(of_new)
        torch.addmm(kept, product, weight, out=hidden)

    def product(self, gates: Tensor, before: Tensor, weight: Tensor, output: Tensor, *buffers: Tensor) -> Tensor:
        totals, hidden, new = torch.logit(gates), buffers[0].clone(), slice(2 * output.shape[1], None)
        torch.atanh(gates[:, new], out=totals[:, new])
        hidden[:, new] *= gates[:, : output.shape[1]]
        return totals.clamp_(-_SATURATED, _SATURATED) - hidden


class _Tanh(_Cell):
    """A plain (Elman) RNN; its gate is its output."""

    function, gates, columns = torch.rnn_tanh, 1, 1
    activate: Any = staticmethod(torch.tanh_)

    def forward_views(self, gates: Tensor, output: Tensor, *buffers: Tensor) -> list[Tensor]:
        return [gates]

    def forward(self, weight: Tensor, bias: Any, states: Any, *views: Tensor) -> Sequence[Tensor]:
        return (self.activate(views[0].addmm_(states[0], weight)),)

    def backward_views(self, factors: Tensor, befores: list[Tensor], *saved: Tensor) -> list[Tensor]:
        return [torch.mul(*saved, out=factors).neg_().add_(1)]

    def backward(self, weight: Tensor, at: Any, *views: Tensor) -> None:
        torch.mm(views[0].mul_(at[0]), weight, out=at[0])

    def product(self, gates: Tensor, before: Tensor, weight: Tensor, output: Tensor, *buffers: Tensor) -> Tensor:
        return torch.atanh(output).clamp_(-_SATURATED, _SATURATED) - before @ weight


class _Relu(_Tanh):
    """The same with ReLU; its gradient is torch's ``threshold_backward``, which passes NaN on and stops infinity."""

    function = torch.rnn_relu
    activate = staticmethod(torch.relu_)

    def backward_views(self, factors: Tensor, befores: list[Tensor], *saved: Tensor) -> list[Tensor]:
        return [saved[0] <= 0, factors]

    def at(self, states: list[Tensor], size: int) -> Sequence[Tensor]:
        return states[0][:size], states[0].new_zeros(())

    def backward(self, weight: Tensor, at: Any, *views: Tensor) -> None:
        (hidden, zero), (stops, factors) = at, views
        torch.mm(torch.where(stops, zero, hidden, out=factors), weight, out=hidden)

    def product(self, gates: Tensor, before: Tensor, weight: Tensor, output: Tensor, *buffers: Tensor) -> Tensor:
        # Well below 0 where the gradient stops: which side of it rounding ends on must not matter.
        return output.masked_fill(output <= 0, -1.0) - before @ weight


#: By ``nn.RNNBase.mode``.
CELLS: dict[str, Any] = {"LSTM": _LSTM(), "GRU": _GRU(), "RNN_TANH": _Tanh(), "RNN_RELU": _Relu()}
