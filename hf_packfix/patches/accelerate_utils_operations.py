"""``accelerate.utils.operations``: what is done to a batch between processes, and before it is gathered."""

from __future__ import annotations

from typing import Any

from hf_packfix.patches import probe
from hf_packfix.patches.patch import Function, Patch, patch

__all__ = ["PATCHES"]


@patch(
    "accelerate.utils.operations:pad_across_processes",
    reason="pads the fields of a pack one by one; gives its rectangle, as wide as the widest of all processes",
    parameters=("tensor", "dim", "pad_index", "pad_first"),
    handled=lambda original: original(probe.packed(), dim=1).shape == (2, 2),
)
def pad_across_processes(original: Function, patch: Patch) -> Function:
    """Turn every PackedSequence into ``[B, T, *]``, padded with ``pad_index``, before the original pads.

    The evaluation loop calls this on labels, logits and inputs at the end of every step, whoever wrote the
    step: it is where packs become rectangles.
    """
    from hf_packfix import nested
    from hf_packfix.packed import PackedSequence, pad

    def pad_across_processes(tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        if not (patch.active and nested.contains(tensor)):
            return original(tensor, dim=dim, pad_index=pad_index, pad_first=pad_first)

        def rectangle(packed: PackedSequence) -> Any:
            padded = pad(packed, pad_index)
            # The steps differ between processes, whatever dimension the caller cares about.
            return padded if dim == 1 else original(padded, dim=1, pad_index=pad_index, pad_first=pad_first)

        rectangles = nested.replace(rectangle, tensor)
        return original(rectangles, dim=dim, pad_index=pad_index, pad_first=pad_first)

    return pad_across_processes


PATCHES = (pad_across_processes,)
