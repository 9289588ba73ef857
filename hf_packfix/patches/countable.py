"""What the training loop up to transformers 5.2 can count tokens in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_packfix.packing.packed import PackedSequence, num_tokens

__all__ = ["CountablePackedSequence"]


class CountablePackedSequence(PackedSequence):
    """A PackedSequence that can be counted as the training loop up to transformers 5.2 counts a main input or a mask.

    The loop calls ``input.numel()``, ``mask.sum()`` or, under "non_padding" with a tokenizer,
    ``(input != pad_token_id).sum()``, in the middle of ``Trainer._inner_training_loop``. Each is the number of
    real tokens N.
    """

    def numel(self) -> int:
        """Return N."""
        return num_tokens(self)

    def sum(self) -> Tensor:
        """Return N as an int64 scalar."""
        return torch.tensor(num_tokens(self), device="cpu")

    def __ne__(self, other: object) -> Any:
        # A PackedSequence holds no padding, so no step of it is the padding token.
        if not isinstance(other, int):
            return super().__ne__(other)
        return torch.ones(num_tokens(self), dtype=torch.bool, device="cpu")

    def plain(self) -> PackedSequence:
        """Return the same fields as an ordinary PackedSequence."""
        return PackedSequence._make(self)
