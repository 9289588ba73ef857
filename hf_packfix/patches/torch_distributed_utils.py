"""``torch.distributed.utils``: the casts of FSDP's mixed precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_packfix.engine import probe
from hf_packfix.engine.declare import around
from hf_packfix.engine.lazily import packing, torch
from hf_packfix.engine.targets import Function

if TYPE_CHECKING:
    from torch.nn.utils.rnn import PackedSequence


@around(
    "torch.distributed.utils:_apply_to_tensors",
    parameters=("fn", "container"),
    problem="applies a function to the data of a PackedSequence and drops the result, so that FSDP casts nothing",
    fix="keeps the result as data",
    upstream_supports=lambda original: original(lambda data: data.float(), probe.packed()).data.is_floating_point(),
    since="2.1",
)
def _apply_to_tensors(original: Function, fn: Any, container: Any) -> Any:
    """Keep the result as ``data``, unless it is no tensor: some functions only add a hook."""

    def apply(packed: PackedSequence) -> PackedSequence:
        data = fn(packed.data)
        return packing.with_data(packed, data) if isinstance(data, torch.Tensor) else packed

    return packing.merge_packed(apply, container, lambda rest: original(fn, rest))
