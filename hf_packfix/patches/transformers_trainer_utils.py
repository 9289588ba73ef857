"""``transformers.trainer_utils``: what ``compute_metrics`` is given."""

from __future__ import annotations

from functools import partial
from typing import Any

from hf_packfix.patches.declare import around
from hf_packfix.patches.lazily import packed, trees
from hf_packfix.patches.patch import Function

__all__ = ["eval_prediction_init"]


@around(
    "transformers.trainer_utils:EvalPrediction.__init__",
    parameters=("self", "predictions", "label_ids"),
    problem="under batch_eval_metrics, compute_metrics gets the packed inputs of the collator",
    fix="gives it padded tensors in every mode",
)
def eval_prediction_init(original: Function, self: Any, *args: Any, **kwargs: Any) -> None:
    """Pad what is still packed to ``[B, T, *]``, with -100.

    Most of what arrives here went through ``pad_across_processes`` and is padded. The rest are the inputs under
    ``batch_eval_metrics``, and what a user's own evaluation loop collected.
    """
    padded = partial(trees.map_packed, partial(packed.pad, padding_value=-100, promote=True))
    original(self, *map(padded, args), **{name: padded(value) for name, value in kwargs.items()})
