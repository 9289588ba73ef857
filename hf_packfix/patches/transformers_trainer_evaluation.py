"""``transformers.trainer``: evaluation that finds no labels, or torn packs, and would say nothing of it.

What the evaluation loop does to a packed batch is done by functions of ``transformers.trainer_pt_utils`` and
``accelerate.utils.operations``, and patched there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from hf_packfix.notices import warn_once
from hf_packfix.patches.patch import Function, Patch, patch

__all__ = ["PATCHES"]

# `predict` on rows without labels is nothing to warn of, and only the loop knows which of the two it is.
_evaluating: ContextVar[bool] = ContextVar("hf_packfix_evaluating", default=False)


@patch(
    "transformers.trainer:Trainer.evaluation_loop",
    reason="says whether it evaluates or predicts, for the warning about labels under another name",
    parameters=("self", "dataloader", "description"),
)
def evaluation_loop(original: Function, patch: Patch) -> Function:
    """Note what the loop runs for."""

    def evaluation_loop(self: Any, dataloader: Any, description: Any, *args: Any, **kwargs: Any) -> Any:
        token = _evaluating.set(patch.active and description == "Evaluation")
        try:
            return original(self, dataloader, description, *args, **kwargs)
        finally:
            _evaluating.reset(token)

    return evaluation_loop


@patch(
    "transformers.trainer:Trainer.prediction_step",
    reason="evaluates without a word on torn packs, or when no label name covers the target; raises, or warns",
    parameters=("self", "model", "inputs"),
)
def prediction_step(original: Function, patch: Patch) -> Function:
    """Warn where ``compute_metrics`` waits for labels that no label name covers.

    Raises:
        ValueError: the fields of a PackedSequence contradict each other.
    """
    from hf_packfix.nested import check_batch

    def prediction_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if patch.active and check_batch(inputs) and self.compute_metrics is not None and _evaluating.get():
            _warn_of_uncovered_labels(self, inputs)
        return original(self, model, inputs, *args, **kwargs)

    return prediction_step


def _warn_of_uncovered_labels(trainer: Any, inputs: Mapping[str, Any]) -> None:
    names = trainer.label_names
    if names and all(inputs.get(name) is not None for name in names):
        return
    from hf_packfix import nested

    known = {*names, getattr(trainer.model, "main_input_name", "input_ids"), "attention_mask"}
    packed = [key for key, value in inputs.items() if key not in known and nested.contains(value)]
    if packed:
        warn_once(
            f"compute_metrics is not called, and the loss may be missing: no label was found in the batch. "
            f"label_names is {list(names)}, the batch has the keys {list(inputs)}, and no label name covers "
            f"{packed}. If one of the keys is the target, pass it: TrainingArguments(label_names=[{packed[-1]!r}])"
        )


PATCHES = (evaluation_loop, prediction_step)
