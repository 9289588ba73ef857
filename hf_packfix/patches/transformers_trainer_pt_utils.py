"""``transformers.trainer_pt_utils``: label smoothing, and what the evaluation loop does to a batch."""

from __future__ import annotations

from typing import Any

from hf_packfix.patches.patch import Function, Patch, patch

__all__ = ["PATCHES"]


def _handles_smoothing(original: Function) -> bool:
    from types import SimpleNamespace

    import torch
    from torch.nn.utils.rnn import pack_sequence

    labels = pack_sequence([torch.tensor([1]), torch.tensor([0, 1])], enforce_sorted=False)
    logits = labels._replace(data=torch.eye(3)[:, :2])
    smoother = SimpleNamespace(epsilon=0.1, ignore_index=-100)
    loss = original(smoother, {"logits": logits}, labels)
    return bool(loss == original(smoother, {"logits": logits.data}, labels.data))


@patch(
    "transformers.trainer_pt_utils:LabelSmoother.__call__",
    reason="label smoothing treats packed logits and labels as tensors; smooths over the real tokens",
    parameters=("self", "model_output", "labels"),
    handled=_handles_smoothing,
)
def smooth_labels(original: Function, patch: Patch) -> Function:
    """Smooth over the rows of ``data``, or over rectangles where the loss needs to know the steps."""
    from hf_packfix.packed import PackedSequence, same_packing

    def __call__(  # noqa: N807
        self: Any, model_output: Any, labels: Any, shift_labels: bool = False, **kwargs: Any
    ) -> Any:
        if patch.active:
            logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
            if isinstance(logits, PackedSequence) or isinstance(labels, PackedSequence):
                if (
                    not shift_labels
                    and isinstance(logits, PackedSequence)
                    and isinstance(labels, PackedSequence)
                    and same_packing(logits, labels)
                ):
                    logits, labels = logits.data, labels.data
                else:
                    logits, labels = _rectangles(logits, labels, self.ignore_index)
                model_output = {"logits": logits}
        return original(self, model_output, labels, shift_labels, **kwargs)

    return __call__


def _rectangles(logits: Any, labels: Any, ignore_index: int) -> tuple[Any, Any]:
    """Return logits ``[B, T, C]`` and labels ``[B, T]``, one of them packed, over the same steps.

    Raises:
        ValueError: both are packed and a sequence has more logits than labels, or fewer.
    """
    import torch

    from hf_packfix.packed import PackedSequence, lengths, pad

    if isinstance(logits, PackedSequence) and isinstance(labels, PackedSequence):
        of_logits, of_labels = lengths(logits), lengths(labels)
        if not torch.equal(of_logits, of_labels):
            raise ValueError(
                f"label smoothing needs one label a step of the logits: the packed logits have the lengths "
                f"{of_logits.tolist()}, the packed labels {of_labels.tolist()}"
            )
    if isinstance(labels, PackedSequence):
        # A model may pad its logits to more steps than the longest sequence of labels has.
        steps = None if isinstance(logits, PackedSequence) else logits.shape[1]
        labels = pad(labels, ignore_index, total_length=steps)
    if isinstance(logits, PackedSequence):
        # What stands behind the end of a sequence does not matter: its label is `ignore_index`.
        logits = pad(logits, 0.0, total_length=labels.shape[1])
    return logits, labels


PATCHES = (smooth_labels,)
