"""What the ``to`` of a batch type is taught: to move named tuples, PackedSequences among them."""

from __future__ import annotations

import copy
from typing import Any

from hf_packfix.patches.patch import Function, Patch


def wrap(original: Function, patch: Patch) -> Function:
    """Return a ``to`` that moves and casts ``data`` by the rule that the original has for a tensor.

    Args:
        original: ``to`` of a ``UserDict`` whose values it replaces; returns the batch itself.
        patch: the patch that the wrapper belongs to.
    """
    from hf_packfix import nested
    from hf_packfix.packed import PackedSequence, with_data

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = {k: v for k, v in self.data.items() if nested.contains_namedtuple(v)} if patch.active else {}
        if not held:
            return original(self, *args, **kwargs)

        def move(value: Any) -> Any:
            if isinstance(value, PackedSequence):
                return with_data(value, move(value.data))
            if isinstance(value, (list, tuple)):
                return nested.rebuild(value, [move(item) for item in value])
            alone = copy.copy(self)
            alone.data = {"value": value}
            # `BatchEncoding.to` of 4.46 drops what is no tensor.
            return original(alone, *args, **kwargs).data.get("value", value)

        moved = {key: move(value) for key, value in held.items()}
        whole = self.data
        self.data = {key: value for key, value in whole.items() if key not in held}
        try:
            original(self, *args, **kwargs)
        except BaseException:
            self.data = whole
            raise
        rest = {**self.data, **moved}
        self.data = {key: rest[key] for key in whole if key in rest}
        return self

    return to


def handles_packed(original: Function, batch_type: Any) -> bool:
    """Tell whether ``original`` moves every field of a PackedSequence that must move."""
    from hf_packfix.patches import probe

    return probe.is_on_meta(original(batch_type({"x": probe.packed()}), "meta")["x"])
