"""``BatchFeature`` and ``BatchEncoding``: the batches of feature extractors and tokenizers, and their collators."""

from __future__ import annotations

import copy
from typing import Any

from hf_packfix.patches import probe
from hf_packfix.patches.declare import around
from hf_packfix.patches.lazily import packed, trees
from hf_packfix.patches.patch import Function

__all__ = ["to"]


def _feature_moves(original: Function) -> bool:
    from transformers.feature_extraction_utils import BatchFeature

    return probe.is_on_meta(original(BatchFeature({"x": probe.packed()}), "meta")["x"])


def _encoding_moves(original: Function) -> bool:
    from transformers.tokenization_utils_base import BatchEncoding

    return probe.is_on_meta(original(BatchEncoding({"x": probe.packed()}), "meta")["x"])


@around(
    "transformers.feature_extraction_utils:BatchFeature.to",
    parameters=("self",),
    problem="rebuilds tuples from a generator, which a PackedSequence refuses, or leaves it on the old device",
    fix="moves data and index tensors",
    upstream_supports=_feature_moves,
)
@around(
    "transformers.tokenization_utils_base:BatchEncoding.to",
    parameters=("self", "device"),
    problem="in 4.46 silently drops every value that is no tensor; later leaves a PackedSequence on the old device",
    fix="moves data and index tensors",
    upstream_supports=_encoding_moves,
    until="4.54",
    issue="https://github.com/huggingface/transformers/pull/38985",
)
def to(original: Function, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Move and cast ``data`` as the original does a tensor; rebuild other named tuples from their moved fields."""
    held = {key: value for key, value in self.data.items() if trees.contains_namedtuple(value)}
    if not held:
        return original(self, *args, **kwargs)

    def move(value: Any) -> Any:
        if isinstance(value, packed.PackedSequence):
            return packed.with_data(value, move(value.data))
        if isinstance(value, (list, tuple)):
            return trees.rebuild(value, [move(item) for item in value])
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
