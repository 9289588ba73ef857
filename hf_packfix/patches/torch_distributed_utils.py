"""``torch.distributed.utils``: the casts of FSDP's mixed precision."""

from __future__ import annotations

from typing import Any

from hf_packfix.patches import probe
from hf_packfix.patches.declare import around
from hf_packfix.patches.lazily import packed, torch, trees
from hf_packfix.patches.patch import Function

__all__ = ["_apply_to_tensors"]


@around(
    "torch.distributed.utils:_apply_to_tensors",
    parameters=("fn", "container"),
    problem="applies a function to the data of a PackedSequence and drops the result, so that FSDP casts nothing",
    fix="keeps the result as data",
    upstream_supports=lambda original: original(lambda data: data.float(), probe.packed()).data.is_floating_point(),
)
def _apply_to_tensors(original: Function, fn: Any, container: Any) -> Any:
    """Keep the result as ``data``, unless it is no tensor: some functions only add a hook."""
    if not trees.contains(container):
        return original(fn, container)

    def apply(leaf: packed.PackedSequence, _: Any) -> packed.PackedSequence:
        data = fn(leaf.data)
        return packed.with_data(leaf, data) if isinstance(data, torch.Tensor) else leaf

    rest = original(fn, trees.map_packed(lambda leaf: (), container))
    return trees.merge_packed(apply, container, rest)
