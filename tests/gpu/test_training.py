"""Training on a GPU: losses, gradient norms and weights are those of the padded run."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_packfix.models import RecurrentConfig, RecurrentForTokenClassification
from tests.gpu.device import ON_GPU, compare_training
from tests.support.oracle import (
    CLASSES,
    VOCABULARY,
    Classifier,
    PlainTagger,
    Tagger,
    by_length,
    padded_batch,
    rows,
    sorted_packed_batch,
)
from tests.support.reports import Stream

pytestmark = pytest.mark.gpu

#: What Triton, with which inductor makes kernels, looks for.
CAN_COMPILE = bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")) and (
    Path(sysconfig.get_path("include"), "Python.h").exists()
)


@pytest.mark.parametrize("model", [Tagger, PlainTagger])
def test_one_label_a_step(tmp_path: Path, model: Any) -> None:
    compare_training(tmp_path, model, rows())


def test_one_label_a_row(tmp_path: Path) -> None:
    compare_training(tmp_path, Classifier, rows(labels="row"))


def test_sorted_rows_without_index_tensors(tmp_path: Path) -> None:
    compare_training(tmp_path, Tagger, rows(), packed=by_length(sorted_packed_batch), padded=by_length(padded_batch))


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1},
        {"max_grad_norm": 0.05},
        {"include_num_input_tokens_seen": "non_padding"},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2, "dataloader_persistent_workers": True},
        {"accelerator_config": {"non_blocking": True}},
        {"dataloader_pin_memory": False},
        {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_training_arguments(tmp_path: Path, changes: dict[str, Any]) -> None:
    compare_training(tmp_path, Tagger, rows(), **changes)


#: bf16 has 8 bits and fp16 has 11: one step of the former at a loss near 1.4 is 0.008.
@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 2e-2), ("fp16", 5e-3)])
@pytest.mark.parametrize("model", [Tagger, Classifier])
def test_autocast(tmp_path: Path, model: Any, dtype: str, tolerance: float) -> None:
    if dtype == "fp16" and not ON_GPU:
        pytest.skip("accelerate refuses fp16 on a CPU")
    data = rows(labels="row" if model is Classifier else "tokens")
    compare_training(tmp_path, model, data, tolerance=tolerance, **{dtype: True})


@pytest.mark.skipif(ON_GPU and not CAN_COMPILE, reason="inductor needs a C compiler and Python's headers")
def test_torch_compile(tmp_path: Path) -> None:
    torch._dynamo.reset()
    changes: dict[str, Any] = {"num_train_epochs": 1}
    if ON_GPU:
        changes["tf32"] = False  # which the Trainer turns on otherwise when it compiles
    compiled = {"torch_compile": True, "torch_compile_backend": "inductor" if ON_GPU else "eager"}
    compare_training(tmp_path, Tagger, rows(9), only_packed=compiled, **changes)


@pytest.mark.parametrize("dispatch", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_streaming(tmp_path: Path, dispatch: bool, workers: int) -> None:
    changes = {"max_steps": 8, "dataloader_num_workers": workers, "accelerator_config": {"dispatch_batches": dispatch}}
    compare_training(tmp_path, Tagger, Stream(rows()), **changes)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_recurrent_model(tmp_path: Path, cell: str) -> None:
    def new() -> RecurrentForTokenClassification:
        torch.manual_seed(0)
        config = RecurrentConfig(
            cell, vocab_size=VOCABULARY, hidden_size=8, num_labels=CLASSES, pad_token_id=0, num_hidden_layers=2
        )
        return RecurrentForTokenClassification(config)

    compare_training(tmp_path, new, rows())
