"""``transformers.models.auto.configuration_auto``: loading a saved recurrent model of ours in another process."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hf_packfix.engine.declare import around
from hf_packfix.engine.targets import Function

_OURS = ("recurrent", "recurrent-encoder-decoder")


@around(
    "transformers.models.auto.configuration_auto:_LazyConfigMapping.__contains__",
    when=lambda self, item: item in _OURS,
    parameters=("self", "item"),
    problem="does not know a saved model of hf_packfix.models before that module is imported",
    fix="imports it when such a model is loaded",
)
def contains(original: Function, self: Any, item: Any) -> bool:
    """Return whether a model type is known, as ours always are."""
    if not original(self, item):
        import_module("hf_packfix.models")  # registers them with the auto classes
    return bool(original(self, item))
