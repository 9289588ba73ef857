"""Packed sequences and their comparison, and a Trainer that only moves batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers import Trainer

META, CPU = torch.device("meta"), torch.device("cpu")


class Pair(NamedTuple):
    first: Any
    second: Any


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


def assert_same_fields(found: Any, expected: PackedSequence) -> None:
    """Compare two packed sequences field by field, dtypes included."""
    assert isinstance(found, PackedSequence)
    for name, left, right in zip(PackedSequence._fields, found, expected, strict=True):
        assert (left is None) == (right is None), name
        assert right is None or (left.dtype == right.dtype and torch.equal(left, right)), name


def assert_same_packed(found: Any, sequences: list[torch.Tensor]) -> None:
    """Compare with torch's own packing of the sequences."""
    assert_same_fields(found, pack_sequence(sequences, enforce_sorted=False))
