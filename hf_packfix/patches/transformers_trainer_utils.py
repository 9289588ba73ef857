"""``transformers.trainer_utils``: what ``compute_metrics`` is given."""

from __future__ import annotations

from typing import Any

from hf_packfix.engine.declare import around
from hf_packfix.engine.lazily import packing
from hf_packfix.engine.targets import Function


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
    args, kwargs = packing.map_packed(lambda packed: packing.pad(packed, -100, promote=True), (args, kwargs))
    original(self, *args, **kwargs)
