"""torch's recurrent layers, which train faster over packed sequences on a CPU; nothing else differs.

They have the parameters, state dicts, arguments and results of their base classes, to which they leave whatever is
not covered (``hf_packfix/rnn/coverage.py``).
"""

# torch types `forward` by overloads that an override would have to repeat.
# mypy: disable-error-code="override"

from __future__ import annotations

from typing import Any

from torch import nn

from hf_packfix.rnn.stack import run

__all__ = ["GRU", "LSTM", "RNN"]


class _OnPacked(nn.RNNBase):
    """What the three layers add to torch's."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run the layer; see that of torch."""
        result = run(self, input, hx)
        return super().forward(input, hx) if result is None else result


class LSTM(_OnPacked, nn.LSTM):
    """``nn.LSTM``, faster over packed sequences.

    Example:
        >>> import torch
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> x = pack_sequence([torch.randn(2, 3), torch.randn(5, 3)], enforce_sorted=False)
        >>> output, (hidden, cell) = LSTM(3, 8)(x)
        >>> output.data.shape, hidden.shape
        (torch.Size([7, 8]), torch.Size([1, 2, 8]))
    """


class GRU(_OnPacked, nn.GRU):
    """``nn.GRU``, faster over packed sequences.

    Example:
        >>> import torch
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> x = pack_sequence([torch.randn(2, 3), torch.randn(5, 3)], enforce_sorted=False)
        >>> output, hidden = GRU(3, 8)(x)
        >>> output.data.shape, hidden.shape
        (torch.Size([7, 8]), torch.Size([1, 2, 8]))
    """


class RNN(_OnPacked, nn.RNN):
    """``nn.RNN``, faster over packed sequences.

    Example:
        >>> import torch
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> x = pack_sequence([torch.randn(2, 3), torch.randn(5, 3)], enforce_sorted=False)
        >>> output, hidden = RNN(3, 8)(x)
        >>> output.data.shape, hidden.shape
        (torch.Size([7, 8]), torch.Size([1, 2, 8]))
    """
