"""``accelerate.accelerator``: gathering what metrics are computed on."""

from __future__ import annotations

from typing import Any

from hf_packfix.patches.declare import around
from hf_packfix.patches.lazily import trees
from hf_packfix.patches.patch import Function

__all__ = ["gather_for_metrics"]


@around(
    "accelerate.accelerator:Accelerator.gather_for_metrics",
    parameters=("self", "input_data"),
    problem="silently cuts rows of data off the last batch, or pickles PackedSequences",
    fix="gathers padded tensors and cuts whole sequences",
)
def gather_for_metrics(original: Function, self: Any, input_data: Any, *args: Any, **kwargs: Any) -> Any:
    """Gather ``[B, T, *]``, padded with -100, and cut the last batch by sequence."""
    if trees.contains(input_data):
        # Imported here, as everywhere, for the function that the module has now: it is patched, too.
        from accelerate.utils import operations

        input_data = trees.map_packed(
            lambda packed: operations.pad_across_processes(packed, dim=1, pad_index=-100), input_data
        )
    return original(self, input_data, *args, **kwargs)
