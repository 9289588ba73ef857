"""A packed sequence, and a Trainer that only moves batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers import Trainer

META, CPU = torch.device("meta"), torch.device("cpu")


def bare_trainer(device: torch.device = CPU, cls: type[Trainer] = Trainer, dtype: Any = None) -> Trainer:
    """Return a Trainer that has just what moving a batch asks for."""
    trainer = cls.__new__(cls)
    trainer.args = SimpleNamespace(device=device, _n_gpu=1)
    trainer.is_deepspeed_enabled = dtype is not None
    config = SimpleNamespace(dtype=lambda: dtype)
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(hf_ds_config=config)))
    return trainer


def some_packed(dtype: torch.dtype = torch.float32, sort: bool = False) -> PackedSequence:
    pieces = [torch.ones(1, 2), torch.ones(3, 2), torch.ones(2, 2)]
    if sort:
        pieces.sort(key=len, reverse=True)
    return pack_sequence([piece.to(dtype) for piece in pieces], enforce_sorted=sort)


def assert_same_packed(found: Any, sequences: list[torch.Tensor]) -> None:
    """Compare with torch's own packing of the sequences, field by field."""
    expected = pack_sequence(sequences, enforce_sorted=False)
    assert isinstance(found, PackedSequence)
    for mine, torchs in zip(found, expected, strict=True):
        assert mine.dtype == torchs.dtype
        assert torch.equal(mine, torchs)
