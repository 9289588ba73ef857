"""``accelerate.accelerator``: gathering what metrics are computed on."""

from __future__ import annotations

from typing import Any

from hf_packfix.patches.patch import Function, Patch, patch

__all__ = ["PATCHES"]


@patch(
    "accelerate.accelerator:Accelerator.gather_for_metrics",
    reason="silently cuts rows of data off the last batch, or pickles packs; gathers rectangles, whole sequences",
    parameters=("self", "input_data"),
)
def gather_for_metrics(original: Function, patch: Patch) -> Function:
    """Gather ``[B, T, *]``, padded with -100, and cut the last batch by sequence."""
    from hf_packfix import nested

    def gather_for_metrics(self: Any, input_data: Any, *args: Any, **kwargs: Any) -> Any:
        if patch.active and nested.contains(input_data):
            from accelerate.utils import operations

            input_data = nested.replace(
                lambda packed: operations.pad_across_processes(packed, dim=1, pad_index=-100), input_data
            )
        return original(self, input_data, *args, **kwargs)

    return gather_for_metrics


PATCHES = (gather_for_metrics,)
