"""``Trainer._prepare_inputs``, which every batch of everybody goes through: stock, the mixin, ours."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers import Trainer, TrainingArguments

import hf_packfix
from tests.benchmarks.measure import Samples, Table, interleave, per_call, ratio

FLOOR = "a wrapper that does nothing"


def trainer_classes() -> dict[str, type[Trainer]]:
    """Return Trainer classes that differ in nothing but their ``_prepare_input``."""
    hf_packfix.enable()
    wrapper = vars(Trainer)["_prepare_input"]
    stock = wrapper.__wrapped__

    class Stock(Trainer):
        _prepare_input = stock

    class Ours(Trainer):
        _prepare_input = wrapper

    class PassingOn(Trainer):
        """The floor: no wrapper in Python can cost less than this one, which does nothing."""

        def _prepare_input(self, data: Any) -> Any:
            return stock(self, data)

    class Mixin(Stock):
        """What people add to each of their Trainers; it leaves the index tensors where they are."""

        def _prepare_input(self, data: Any) -> Any:
            if isinstance(data, PackedSequence):
                return PackedSequence(
                    super()._prepare_input(data.data), data.batch_sizes, data.sorted_indices, data.unsorted_indices
                )
            return super()._prepare_input(data)

    return {"stock": Stock, "mixin": Mixin, "ours": Ours, FLOOR: PassingOn}


def trainers() -> dict[str, Trainer]:
    """Return one Trainer of each class, for the CPU."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(directory, report_to=[], use_cpu=True)
        return {name: cls(torch.nn.Linear(1, 1), arguments) for name, cls in trainer_classes().items()}


def samples(names: tuple[str, ...], method: str, batch: Any, number: int, repeats: int, device: Any = None) -> Samples:
    """Return samples of preparing a batch with these Trainers, for another device than the CPU if it is given."""
    statements = {}
    for name, trainer in trainers().items():
        if device is not None:
            # Where the arguments have their device from.
            trainer.args.__dict__["_setup_devices"] = device
        if name in names:
            statements[name] = per_call("prepare(batch)", number, prepare=getattr(trainer, method), batch=batch)
    return interleave(statements, repeats)


def run(quick: bool) -> Table:
    """Measure ordinary and packed batches."""
    number, repeats = (100, 40) if quick else (300, 400)
    flat = {name: torch.zeros(4, 4) for name in ("input_ids", "attention_mask", "token_type_ids", "labels")}
    lists = {f"group {i}": [torch.zeros(2) for _ in range(20)] for i in range(10)}
    trees = {f"group {i}": [(torch.zeros(2), {"x": torch.zeros(2)}) for _ in range(10)] for i in range(10)}
    rows = []
    for label, batch, times in (
        ("4 tensors", flat, number),
        ("200 tensors in 10 lists", lists, number // 50),
        ("200 tensors in 210 dicts, tuples and lists", trees, number // 50),
    ):
        taken = samples(("stock", "mixin", "ours", FLOOR), "_prepare_inputs", batch, times, repeats)
        rows += [
            ratio(taken, "ours", "stock", label=f"{label}: ours", bar=1.05),
            ratio(taken, "mixin", "stock", label=f"{label}: mixin"),
            ratio(taken, FLOOR, "stock", label=f"{label}: {FLOOR}"),
            ratio(taken, "ours", "mixin", label=f"{label}: ours", bar=1.0),
        ]
    packed = pack_sequence([torch.ones(length, 8) for length in (3, 7, 5, 1)], enforce_sorted=False)
    for label, device, bar in (("pack, nothing moves", None, 0.5), ("pack, to meta", torch.device("meta"), None)):
        taken = samples(("mixin", "ours"), "_prepare_input", packed, number, repeats, device)
        rows.append(ratio(taken, "ours", "mixin", label=f"{label}: ours", bar=bar))
    notes = ["the mixin leaves index tensors behind if `data` moves"]
    return Table("Hot path: Trainer._prepare_inputs", rows, notes)
