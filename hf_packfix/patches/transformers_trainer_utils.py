"""``transformers.trainer_utils``: what ``compute_metrics`` is given."""

from __future__ import annotations

from functools import partial
from typing import Any

from hf_packfix.patches.patch import Function, Patch, patch

__all__ = ["PATCHES"]


@patch(
    "transformers.trainer_utils:EvalPrediction.__init__",
    reason="batch_eval_metrics hands over the inputs of the collator; compute_metrics gets rectangles everywhere",
    parameters=("self", "predictions", "label_ids"),
)
def eval_prediction(original: Function, patch: Patch) -> Function:
    """Turn what is still packed into ``[B, T, *]``, padded with -100.

    Most of what arrives here went through ``pad_across_processes`` and is a rectangle. The rest are the
    inputs under ``batch_eval_metrics``, and what a user's own evaluation loop collected.
    """
    from hf_packfix import nested
    from hf_packfix.packed import PackedSequence, pad

    def rectangle(packed: PackedSequence) -> Any:
        return pad(packed, -100, promote=True)

    rectangles = partial(nested.replace, rectangle)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if patch.active:
            args = tuple(map(rectangles, args))
            kwargs = {name: rectangles(value) for name, value in kwargs.items()}
        original(self, *args, **kwargs)

    return __init__


PATCHES = (eval_prediction,)
