"""``transformers.feature_extraction_utils``: the batch type of feature extractors and their collators."""

from __future__ import annotations

import copy
from typing import Any

from hf_packfix.patches import probe
from hf_packfix.patches.patch import Function, Patch, patch

__all__ = ["PATCHES"]


def _handles_move(original: Function) -> bool:
    from transformers.feature_extraction_utils import BatchFeature

    from hf_packfix.packed import PackedSequence

    moved = original(BatchFeature({"x": probe.packed()}), "meta")["x"]
    return isinstance(moved, PackedSequence) and moved.data.device.type == "meta"


@patch(
    "transformers.feature_extraction_utils:BatchFeature.to",
    reason="rebuilds tuples from a generator, which a PackedSequence refuses, or leaves it where it is",
    parameters=("self",),
    handled=_handles_move,
)
def to(original: Function, patch: Patch) -> Function:
    """Move and cast ``data`` by the rule that the original has for a tensor."""
    from hf_packfix import nested
    from hf_packfix.packed import PackedSequence, with_data

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = {k: v for k, v in self.data.items() if nested.contains(v)} if patch.active else {}
        if not held:
            return original(self, *args, **kwargs)

        def move(value: Any) -> Any:
            if isinstance(value, PackedSequence):
                return with_data(value, move(value.data))
            if isinstance(value, (list, tuple)):
                return nested.rebuild(value, [move(item) for item in value])
            alone = copy.copy(self)
            alone.data = {"value": value}
            return original(alone, *args, **kwargs).data["value"]

        moved = {key: move(value) for key, value in held.items()}
        whole = self.data
        self.data = {key: value for key, value in whole.items() if key not in held}
        try:
            original(self, *args, **kwargs)
        except BaseException:
            self.data = whole
            raise
        rest = self.data
        self.data = {key: moved[key] if key in moved else rest[key] for key in whole}
        return self

    return to


PATCHES = (to,)
