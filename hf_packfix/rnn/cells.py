"""What is a cell's own: one step forward, one step backward, and what a step multiplies gradients by.

Shapes: N rows, b in a step, H hidden units, G gates. In the order of operations each cell follows torch's where
infinite values and NaN would show another one.
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

    def buffers(self, gates: Tensor, output: Tensor, bias: Tensor | None) -> list[Tensor]:
        """Return what the forward fills for the backward, besides gates and output."""
        return []

    def history(self, output: Tensor, *buffers: Tensor) -> list[Tensor]:
        """Return the states ``[N, H]`` after every row."""
        return [output]

    def forward_views(self, gates: Tensor, output: Tensor, *buffers: Tensor) -> list[Tensor]:
        """Return the tensors ``[N, *]`` of which ``forward`` gets the rows of a step."""
        raise NotImplementedError

    def forward(self, weight: Tensor, states: Any, *views: Tensor) -> Sequence[Tensor]:
        """Run a step from the states ``[b, H]`` and return the new ones."""
        raise NotImplementedError

    def backward_views(self, factors: Tensor, befores: list[Tensor], *saved: Tensor) -> list[Tensor]:
        """Write what gradients are multiplied by; return the tensors of which ``backward`` gets the rows of a step."""
        raise NotImplementedError

    def at(self, states: list[Tensor], size: int) -> Any:
        """Return what ``backward`` works in besides, for steps of this size."""

    def backward(self, weight: Tensor, at: Any, hidden: Tensor, before: Tensor, *views: Tensor) -> None:
        """Turn factors into gradients of the products, and add to those of the hidden state before.

        ``hidden`` and ``before`` are the gradients of the hidden states after and before the step, ``[b, H]``.
        """
        raise NotImplementedError

    def product(self, gates: Tensor, hidden: Tensor) -> Tensor:
        """Return the input's product again, from the gates and the hidden product."""
        width = gates.shape[1] // self.gates
        sums, tanh = torch.logit(gates), slice(2 * width, 3 * width)
        torch.atanh(gates[:, tanh], out=sums[:, tanh])
        return sums.clamp_(-_SATURATED, _SATURATED) - hidden


class _LSTM(_Cell):
    """Gates: input, forget, cell, output."""

    function, states, gates, columns = torch.lstm, 2, 4, 4

    def buffers(self, gates: Tensor, output: Tensor, bias: Tensor | None) -> list[Tensor]:
        return [torch.empty_like(output), torch.empty_like(output)]  # the cell states and their tanh

    def history(self, output: Tensor, *buffers: Tensor) -> list[Tensor]:
        return [output, buffers[0]]

    def forward_views(self, gates: Tensor, output: Tensor, *buffers: Tensor) -> list[Tensor]:
        width = output.shape[1]
        return [gates, gates[:, : 2 * width], *gates.split(width, 1), *buffers, output]

    def forward(self, weight: Tensor, states: Any, *views: Tensor) -> Sequence[Tensor]:
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

    def at(self, states: list[Tensor], size: int) -> Any:
        cell = states[1][:size]
        return cell, cell.unsqueeze(1)

    def backward(self, weight: Tensor, at: Any, hidden: Tensor, before: Tensor, *views: Tensor) -> None:
        (cell, cell_of_gates), (gates, cell_gates, out_gate, through_tanh, forget_gate) = at, views
        cell.addcmul_(hidden, through_tanh)
        cell_gates.mul_(cell_of_gates)
        out_gate.mul_(hidden)
        cell.mul_(forget_gate)
        before.addmm_(gates, weight)


class _GRU(_Cell):
    """Gates: reset, update, new. The backward's columns: the new gate's hidden part, then the gates."""

    function, gates, columns = torch.gru, 3, 4

    def buffers(self, gates: Tensor, output: Tensor, bias: Tensor | None) -> list[Tensor]:
        # The hidden product with its bias.
        return [torch.zeros_like(gates) if bias is None else bias.repeat(len(gates), 1)]

    def forward_views(self, gates: Tensor, output: Tensor, *buffers: Tensor) -> list[Tensor]:
        (hidden,), width = buffers, output.shape[1]
        both, hidden_both = gates[:, : 2 * width], hidden[:, : 2 * width]
        return [hidden, hidden_both, hidden[:, 2 * width :], both, *gates.split(width, 1), output]

    def forward(self, weight: Tensor, states: Any, *views: Tensor) -> Sequence[Tensor]:
        (before,), (hidden, hidden_both, hidden_new, both, reset, update, new, state) = states, views
        hidden.addmm_(before, weight)
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

    def at(self, states: list[Tensor], size: int) -> Any:
        of_new = torch.empty_like(states[0][:size])
        return torch.empty_like(of_new), of_new, of_new.unsqueeze(1)

    def backward(self, weight: Tensor, at: Any, hidden: Tensor, before: Tensor, *views: Tensor) -> None:
        (kept, of_new, of_both), (product, both, update_gate, new_gate, update) = at, views
        torch.mul(hidden, update, out=kept)
        torch.sub(hidden, kept, out=of_new)  # not times 1 - update: of an infinite gradient torch makes NaN
        both.mul_(of_both)
        update_gate.mul_(hidden)
        new_gate.mul_(of_new)
        before.add_(kept).addmm_(product, weight)

    def product(self, gates: Tensor, hidden: Tensor) -> Tensor:
        width = gates.shape[1] // 3
        hidden[:, 2 * width :] *= gates[:, :width]
        return super().product(gates, hidden)


class _Tanh(_Cell):
    """A plain (Elman) RNN; its gate is its output."""

    function, gates, columns = torch.rnn_tanh, 1, 1
    activate: Any = staticmethod(torch.tanh_)

    def forward_views(self, gates: Tensor, output: Tensor, *buffers: Tensor) -> list[Tensor]:
        return [gates]

    def forward(self, weight: Tensor, states: Any, *views: Tensor) -> Sequence[Tensor]:
        return (self.activate(views[0].addmm_(states[0], weight)),)

    def backward_views(self, factors: Tensor, befores: list[Tensor], *saved: Tensor) -> list[Tensor]:
        return [torch.mul(*saved, out=factors).neg_().add_(1)]

    def backward(self, weight: Tensor, at: Any, hidden: Tensor, before: Tensor, *views: Tensor) -> None:
        before.addmm_(views[0].mul_(hidden), weight)

    def product(self, gates: Tensor, hidden: Tensor) -> Tensor:
        return torch.atanh(gates).clamp_(-_SATURATED, _SATURATED) - hidden


class _Relu(_Tanh):
    """The same with ReLU; its gradient is torch's ``threshold_backward``, which passes NaN on and stops infinity."""

    function = torch.rnn_relu
    activate = staticmethod(torch.relu_)

    def backward_views(self, factors: Tensor, befores: list[Tensor], *saved: Tensor) -> list[Tensor]:
        return [saved[0] <= 0, factors]

    def at(self, states: list[Tensor], size: int) -> Any:
        return states[0].new_zeros(())

    def backward(self, weight: Tensor, at: Any, hidden: Tensor, before: Tensor, *views: Tensor) -> None:
        stops, factors = views
        before.addmm_(torch.where(stops, at, hidden, out=factors), weight)

    def product(self, gates: Tensor, hidden: Tensor) -> Tensor:
        # Well below 0 where the gradient stops: which side of it rounding ends on must not matter.
        return gates.masked_fill(gates <= 0, -1.0) - hidden


#: By ``nn.RNNBase.mode``.
CELLS: dict[str, Any] = {"LSTM": _LSTM(), "GRU": _GRU(), "RNN_TANH": _Tanh(), "RNN_RELU": _Relu()}
