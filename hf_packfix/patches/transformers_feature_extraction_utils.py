"""``transformers.feature_extraction_utils``: ``BatchFeature``, the batch of feature extractors and their collators."""

from __future__ import annotations

from typing import Any

from hf_packfix.engine import probe
from hf_packfix.engine.declare import around
from hf_packfix.engine.lazily import packing
from hf_packfix.engine.targets import Function


def _moves(original: Function) -> bool:
    from transformers.feature_extraction_utils import BatchFeature

    return probe.is_on_meta(original(BatchFeature({"x": probe.packed()}), "meta")["x"])


@around(
    "transformers.feature_extraction_utils:BatchFeature.to",
    when=lambda self, *_, **__: packing.contains(self, packing.is_namedtuple),
    parameters=("self",),
    problem="rebuilds tuples from a generator, which a PackedSequence refuses, or leaves it on the old device",
    fix="moves data and index tensors",
    uses=("BatchFeature.data",),
    upstream_supports=_moves,
)
def to(original: Function, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Move and cast ``data`` as the original does a tensor; rebuild other named tuples from their moved fields."""
    self.data = packing.map_data(lambda flat: original(flat, *args, **kwargs), self, self.data)
    return self
