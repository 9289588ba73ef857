"""``transformers.feature_extraction_utils``: the batch type of feature extractors and their collators."""

from __future__ import annotations

from hf_packfix.patches import batch_to
from hf_packfix.patches.patch import Function, Patch, patch

__all__ = ["PATCHES"]


def _handles_move(original: Function) -> bool:
    from transformers.feature_extraction_utils import BatchFeature

    return batch_to.handles_packed(original, BatchFeature)


@patch(
    "transformers.feature_extraction_utils:BatchFeature.to",
    reason="rebuilds tuples from a generator, which a PackedSequence refuses, or leaves it where it is",
    parameters=("self",),
    handled=_handles_move,
)
def to(original: Function, patch: Patch) -> Function:
    """Move and cast ``data`` by the rule that the original has for a tensor."""
    return batch_to.wrap(original, patch)


PATCHES = (to,)
