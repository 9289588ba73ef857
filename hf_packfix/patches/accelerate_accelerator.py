"""``accelerate.accelerator``: gathering what metrics are computed on."""

from __future__ import annotations

from typing import Any

from hf_packfix.engine.declare import around
from hf_packfix.engine.lazily import packing
from hf_packfix.engine.targets import Function


@around(
    "accelerate.accelerator:Accelerator.gather_for_metrics",
    parameters=("self", "input_data"),
    problem="silently cuts rows of data off the last batch, or pickles PackedSequences",
    fix="gathers padded tensors and cuts whole sequences",
    uses=("accelerate.utils.operations:pad_across_processes",),
)
def gather_for_metrics(original: Function, self: Any, input_data: Any, *args: Any, **kwargs: Any) -> Any:
    """Gather ``[B, T, *]``, padded with -100, and cut the last batch by sequence."""
    # Imported here, as everywhere, for the function that the module has now: it is patched as well.
    from accelerate.utils.operations import pad_across_processes

    padded = packing.map_packed(lambda packed: pad_across_processes(packed, dim=1, pad_index=-100), input_data)
    return original(self, padded, *args, **kwargs)
