"""The warnings of ours that a method of a Trainer gives."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import Trainer

import hf_packfix


def messages(trainer: Trainer, method: str, data: Any) -> list[str]:
    """Call a method twice, and return what it warned of."""
    hf_packfix._warnings._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            getattr(trainer, method)(data)
    return [str(w.message) for w in caught if w.category is hf_packfix.HFPackfixWarning]
