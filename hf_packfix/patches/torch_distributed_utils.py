"""``torch.distributed.utils``: the casts of FSDP's mixed precision."""

from __future__ import annotations

from typing import Any

from hf_packfix.patches import probe
from hf_packfix.patches.patch import Function, Patch, patch

__all__ = ["PATCHES"]


@patch(
    "torch.distributed.utils:_apply_to_tensors",
    reason="calls the function on the data of a pack and drops the result: FSDP's mixed precision casts nothing",
    parameters=("fn", "container"),
    handled=lambda original: original(lambda data: data.float(), probe.packed()).data.is_floating_point(),
)
def apply_to_tensors(original: Function, patch: Patch) -> Function:
    """Put the result back as ``data``; a function that gives no tensor, such as a hook, changes nothing."""
    import torch

    from hf_packfix import nested
    from hf_packfix.packed import PackedSequence, with_data

    def _apply_to_tensors(fn: Any, container: Any) -> Any:
        if not (patch.active and nested.contains(container)):
            return original(fn, container)

        def apply(packed: PackedSequence, _: Any) -> PackedSequence:
            data = fn(packed.data)
            return with_data(packed, data) if isinstance(data, torch.Tensor) else packed

        return nested.graft(apply, container, original(fn, nested.replace(lambda packed: (), container)))

    return _apply_to_tensors


PATCHES = (apply_to_tensors,)
