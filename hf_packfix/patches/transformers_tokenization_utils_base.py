"""``transformers.tokenization_utils_base``: ``BatchEncoding``, the batch of tokenizers and their collators."""

from __future__ import annotations

from typing import Any

from hf_packfix.engine import probe
from hf_packfix.engine.declare import around
from hf_packfix.engine.lazily import packing
from hf_packfix.engine.targets import Function


def _moves(original: Function) -> bool:
    from transformers.tokenization_utils_base import BatchEncoding

    return probe.is_on_meta(original(BatchEncoding({"x": probe.packed()}), "meta")["x"])


@around(
    "transformers.tokenization_utils_base:BatchEncoding.to",
    when=lambda self, *_, **__: packing.contains(self, packing.is_namedtuple),
    parameters=("self", "device"),
    problem="in 4.46 silently drops every value that is no tensor; later leaves a PackedSequence on the old device",
    fix="moves data and index tensors",
    uses=("BatchEncoding.data",),
    upstream_supports=_moves,
    silent="always",
    until="4.54",
    issue="https://github.com/huggingface/transformers/pull/38985",
)
def to(original: Function, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Move ``data`` as the original does a tensor; keep what it drops, and rebuild other named tuples."""
    self.data = packing.map_data(lambda flat: original(flat, *args, **kwargs), self, self.data)
    return self
