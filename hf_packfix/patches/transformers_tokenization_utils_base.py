"""``transformers.tokenization_utils_base``: the batch type of tokenizers and their collators."""

from __future__ import annotations

from hf_packfix.patches import batch_to
from hf_packfix.patches.patch import Function, Patch, patch

__all__ = ["PATCHES"]


def _handles_move(original: Function) -> bool:
    from transformers.tokenization_utils_base import BatchEncoding

    return batch_to.handles_packed(original, BatchEncoding)


@patch(
    "transformers.tokenization_utils_base:BatchEncoding.to",
    reason="in 4.46 silently drops every value that is no tensor; later leaves a pack where it is",
    parameters=("self", "device"),
    handled=_handles_move,
    until="4.54",
)
def to(original: Function, patch: Patch) -> Function:
    """Move ``data`` as the original moves a tensor, and keep the pack in the batch."""
    return batch_to.wrap(original, patch)


PATCHES = (to,)
