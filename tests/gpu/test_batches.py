"""How a packed batch reaches a GPU: which fields move, pinned memory, and moves that do not wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate.data_loader
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from transformers import BatchFeature, Trainer

from tests.gpu.device import DEVICE, ON_GPU, on_device
from tests.support.oracle import Tagger, by_length, new_trainer, packed_batch, padded_batch, rows, sorted_packed_batch
from tests.support.reports import Stream

pytestmark = pytest.mark.gpu


def assert_on_device(packed: Any, *, indices: bool = True) -> None:
    """Assert that all fields are on the device but ``batch_sizes``, which torch wants on the CPU."""
    assert type(packed) is PackedSequence
    assert packed.data.device == DEVICE
    assert packed.batch_sizes.device.type == "cpu"
    for field in (packed.sorted_indices, packed.unsorted_indices):
        assert field is None if not indices else field.device == DEVICE


@pytest.mark.parametrize("wrap", [lambda batch: batch, lambda batch: [({"x": batch},)], BatchFeature])
def test_a_batch_that_is_moved(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    trainer = new_trainer(tmp_path, Tagger, rows(), packed_batch, **on_device())
    moved = trainer._prepare_input(wrap(packed_batch(rows(5))))
    batch = moved[0][0]["x"] if isinstance(moved, list) else moved
    expected = padded_batch(rows(5))
    for key in ("input_ids", "labels"):
        assert_on_device(batch[key])
        padded, _ = pad_packed_sequence(batch[key], batch_first=True, padding_value=-100 if key == "labels" else 0)
        assert torch.equal(padded.cpu(), expected[key])


def test_a_sorted_batch_that_is_moved(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, Tagger, rows(), packed_batch, **on_device())
    assert_on_device(trainer._prepare_inputs(by_length(sorted_packed_batch)(rows(5)))["input_ids"], indices=False)


@pytest.mark.skipif(not ON_GPU, reason="needs two devices")
@pytest.mark.parametrize("left_behind", ["data", "sorted_indices", "unsorted_indices"])
def test_a_field_that_was_left_behind(tmp_path: Path, left_behind: str) -> None:
    trainer = new_trainer(tmp_path, Tagger, rows(), packed_batch, **on_device())
    packed = packed_batch(rows(5))["input_ids"]
    fields = {name: getattr(packed, name).to(DEVICE) for name in ("data", "sorted_indices", "unsorted_indices")}
    del fields[left_behind]
    assert_on_device(trainer._prepare_input(packed._replace(**fields)))


class Recording(Trainer):
    """Keeps the inputs of every training step."""

    def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
        vars(self).setdefault("batches", []).append(inputs)
        return super().training_step(model, inputs, *args)


@pytest.mark.parametrize("data", [rows(), Stream(rows())], ids=["map-style", "dispatched"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_training_step(tmp_path: Path, data: Any, workers: int) -> None:
    changes = {"max_steps": 3, "dataloader_num_workers": min(workers, 1) if isinstance(data, Stream) else workers}
    trainer = new_trainer(tmp_path, Tagger, data, packed_batch, trainer=Recording, **on_device(**changes))
    trainer.train()
    assert len(trainer.batches) == 3
    for batch in trainer.batches:
        assert_on_device(batch["input_ids"])
        assert_on_device(batch["labels"])


@pytest.mark.skipif(not ON_GPU, reason="memory is pinned for a GPU")
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("non_blocking", [True, False])
def test_pinned_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: bool, non_blocking: bool) -> None:
    moves: list[tuple[Any, Any, bool]] = []
    original = accelerate.data_loader.send_to_device

    def send_to_device(tensor: Any, device: Any, non_blocking: bool = False, **options: Any) -> Any:
        moved = original(tensor, device, non_blocking=non_blocking, **options)
        moves.append((tensor, moved, non_blocking))
        return moved

    monkeypatch.setattr(accelerate.data_loader, "send_to_device", send_to_device)
    changes = {"dataloader_pin_memory": pinned, "accelerator_config": {"non_blocking": non_blocking}}
    new_trainer(tmp_path, Tagger, rows(), packed_batch, max_steps=3, **on_device(**changes)).train()
    assert len(moves) >= 3
    for before, after, asked in moves:
        assert asked is non_blocking
        for key in ("input_ids", "labels"):
            fields = (before[key].data, before[key].sorted_indices, before[key].unsorted_indices)
            assert [field.is_pinned() for field in fields] == [pinned] * 3
            assert_on_device(after[key])
            torch.cuda.synchronize()
            assert all(
                torch.equal(field, moved.cpu())
                for field, moved in zip(fields, (after[key].data, *after[key][2:]), strict=True)
            )
