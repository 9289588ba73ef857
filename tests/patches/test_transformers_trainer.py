"""``Trainer._prepare_input``: what moves, what stays, and which object comes back."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from typing import Any

import pytest
import torch
import torch.distributed.utils
from transformers import Trainer

import hf_packfix
from tests.support.oracle import PlainTagger, new_trainer, packed_batch, padded_batch, rows, stock
from tests.support.packed_sequences import CPU, META, Pair, bare_trainer, some_packed


@pytest.mark.parametrize("left_behind", ["sorted_indices", "unsorted_indices", "both"])
def test_indices_follow_data_that_is_there_already(left_behind):
    packed = some_packed()
    there = {"data": packed.data.to(META)}
    if left_behind == "sorted_indices":
        there["unsorted_indices"] = packed.unsorted_indices.to(META)
    if left_behind == "unsorted_indices":
        there["sorted_indices"] = packed.sorted_indices.to(META)
    inconsistent = packed._replace(**there)
    moved = bare_trainer(META)._prepare_input(inconsistent)
    assert moved.data is inconsistent.data
    assert moved.sorted_indices.device == moved.unsorted_indices.device == META
    with_stock_to = inconsistent.to(META)  # torch's own `to` leaves them behind
    assert CPU in (with_stock_to.sorted_indices.device, with_stock_to.unsorted_indices.device)


def test_a_subclass_that_handles_tensors_handles_data_and_the_fields_of_named_tuples():
    class Doubling(Trainer):
        def _prepare_input(self, data):
            if isinstance(data, torch.Tensor) and data.is_floating_point():
                return super()._prepare_input(data * 2)
            return super()._prepare_input(data)

    held = {"x": [some_packed()], "pair": Pair(torch.ones(2), 3)}
    moved = bare_trainer(cls=Doubling)._prepare_input(held)
    assert torch.equal(moved["x"][0].data, 2 * some_packed().data)
    assert (moved["pair"].first.tolist(), moved["pair"].second) == ([2, 2], 3)


@pytest.mark.parametrize("where", ["class, before us", "class, after us", "instance"])
def test_a_wrapper_that_handles_tensors_handles_data(monkeypatch, where):
    trainer = bare_trainer()
    owner = trainer if where == "instance" else Trainer
    with stock() if where == "class, before us" else contextlib.nullcontext():
        inner = Trainer._prepare_input

        def doubling(self, data):
            return inner(self, data * 2 if isinstance(data, torch.Tensor) else data)

        monkeypatch.setattr(
            owner, "_prepare_input", types.MethodType(doubling, owner) if owner is trainer else doubling
        )
    moved = trainer._prepare_input([some_packed()])[0]
    assert torch.equal(moved.data, 2 * some_packed().data)
    hf_packfix.disable()
    monkeypatch.undo()
    hf_packfix.enable()


@dataclasses.dataclass
class Plain:
    x: Any
    mask: torch.Tensor
    note: str = "text"
    later: Any = dataclasses.field(init=False)  # never set


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    mask: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Any
    mask: torch.Tensor


@pytest.mark.parametrize("kind", [Plain, Frozen, Slotted])
@pytest.mark.parametrize("wrap", [lambda batch: batch, lambda batch: {"nested": [batch]}], ids=["alone", "nested"])
def test_a_dataclass_with_a_packed_sequence_moves_as_a_mapping_does(kind, wrap):
    given = kind(x=[some_packed()], mask=torch.ones(2))
    found = bare_trainer(META)._prepare_input(wrap(given))
    moved = found["nested"][0] if isinstance(found, dict) else found
    assert type(moved) is kind
    assert moved is not given
    assert moved.x[0].data.device == moved.x[0].sorted_indices.device == moved.mask.device == META
    assert given.x[0].data.device == given.mask.device == CPU
    assert getattr(moved, "note", "text") == "text"


def test_other_dataclasses_come_out_as_from_stock():
    from transformers.modeling_outputs import BaseModelOutput

    plain = Plain(x=torch.ones(1), mask=torch.ones(2))
    assert bare_trainer(META)._prepare_input(plain) is plain  # without a PackedSequence
    assert bare_trainer(META)._prepare_input(Plain) is Plain  # the class itself
    with stock():
        packed = Plain(x=some_packed(), mask=torch.ones(2))
        assert bare_trainer(META)._prepare_input(packed) is packed
    output = bare_trainer(META)._prepare_input(BaseModelOutput(last_hidden_state=some_packed()))  # a mapping
    assert output["last_hidden_state"].data.device == META


@pytest.mark.parametrize("method", ["train", "evaluate", "predict"])
def test_data_parallel_names_the_two_ways_out(tmp_path, method):
    forwards = []

    class Counting(PlainTagger):
        def forward(self, *args, **kwargs):
            forwards.append(1)
            return super().forward(*args, **kwargs)

    data = rows()
    trainer = new_trainer(tmp_path, Counting, data, packed_batch, remove_unused_columns=False)
    trainer.args._n_gpu = 2  # what the Trainer finds on a machine with two GPUs and no launcher
    assert trainer.args.n_gpu == 2
    with pytest.raises(ValueError, match=r"torchrun --nproc-per-node 2 .*accelerate launch --num_processes 2"):
        getattr(trainer, method)(*([data] if method == "predict" else []))
    assert not forwards
    padded = new_trainer(tmp_path, Counting, data, padded_batch, remove_unused_columns=False)
    padded.args._n_gpu = 2
    padded.evaluate()  # the count alone stops nothing
    assert forwards
