"""What every other patch adds to a step, or to an evaluation batch, without a PackedSequence."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate.utils.operations import get_data_structure
from hf_packfix.patches.transformers_trainer_evaluation import _evaluating
from transformers import BatchFeature
from transformers.trainer_pt_utils import EvalLoopContainer

import hf_packfix
from hf_packfix.patches import PATCHES
from tests.benchmarks.measure import Row, Table, difference, interleave, per_call

__all__ = ["run"]


def ordinary_arguments() -> dict[str, tuple[Any, ...]]:
    """Return what each patched function is given by an ordinary batch, by the path of the function."""
    names = ("input_ids", "attention_mask", "token_type_ids", "labels")
    batch = {name: torch.zeros(8, 16, dtype=torch.int64) for name in names}
    logits, labels = torch.zeros(8, 16, 4), batch["labels"]
    container = EvalLoopContainer()
    trainer = SimpleNamespace(
        model=SimpleNamespace(main_input_name="input_ids"),
        args=SimpleNamespace(predict_with_generate=True),
        compute_metrics=len,
        label_smoother=None,
        compute_loss_func=None,
        label_names=["labels"],
    )
    return {
        "Trainer.floating_point_ops": (trainer, batch),
        "Trainer._track_num_input_tokens": (trainer, batch),
        "Trainer._get_num_items_in_batch": (trainer, [batch], torch.device("cpu")),
        "Trainer.compute_loss": (trainer, None, batch),
        "Trainer.evaluation_loop": (trainer, [batch], "Evaluation"),
        "Trainer.prediction_step": (trainer, None, batch, False),
        "Seq2SeqTrainer.prediction_step": (trainer, None, batch, False),
        "LabelSmoother.__call__": (None, {"logits": logits}, labels),
        "nested_detach": (logits,),
        "nested_concat": (logits, logits),
        "nested_numpify": (logits,),
        "nested_truncate": (logits, 4),
        "find_batch_size": (logits,),
        "EvalPrediction.__init__": (None, np.zeros((8, 16, 4)), np.zeros((8, 16))),
        "EvalLoopContainer.add": (container, logits),
        "EvalLoopContainer.to_cpu_and_numpy": (container,),
        "EvalLoopContainer.get_arrays": (container,),
        "BatchFeature.to": (BatchFeature(batch), "cpu"),
        "pad_across_processes": (batch,),
        "gather": (batch,),
        "Accelerator.gather_for_metrics": (None, batch),
        "slice_tensors": (batch, slice(4)),
        "concatenate": ([batch, batch],),
        "get_data_structure": (batch,),
        "initialize_tensors": (get_data_structure(batch),),
        "broadcast": (batch,),
        "get_shape": (batch,),
        "_apply_to_tensors": (torch.Tensor.half, batch),
    }


def nothing(*args: Any, **kwargs: Any) -> Any:
    """Stand in for the original, whose own time would drown what a wrapper adds to it."""
    return args[0]


def run(quick: bool) -> Table:
    """Time every wrapper around a function that does nothing, less that function."""
    number, repeats = (500, 20) if quick else (1000, 100)
    hf_packfix.enable()
    _evaluating.set(True)  # as `prediction_step` finds it in `evaluate`
    given = ordinary_arguments()
    rows: list[Row] = []
    notes: list[str] = []
    for patch in PATCHES:
        if patch.path == "Trainer._prepare_input":
            continue
        import_module(patch.module)
        if patch.path not in given or not patch.active:
            notes.append(f"not measured: {patch.status(True)}")
            continue
        names = {f"x{place}": value for place, value in enumerate(given[patch.path])}
        samples = interleave(
            {
                label: per_call(f"call({', '.join(names)})", number, call=function, **names)
                for label, function in (("with", patch.make(nothing, patch)), ("without", nothing))
            },
            repeats,
        )
        rows.append(difference(samples, "with", "without", bar=2.0, label=patch.path))
    return Table("Cold patches: what each adds to a call without a PackedSequence", rows, notes)
