"""A call without a PackedSequence reaches the original, with the very objects that it was given.

On its way it reads nothing of upstream: what a release renames cannot break a program that packs nothing.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.utils

from hf_packfix.engine.declare import is_active
from hf_packfix.engine.patch import Patch
from hf_packfix.patches import PATCHES
from tests.support.packed_sequences import some_packed

RESULT = object()


class Untouchable:
    """Stands for any object of upstream, none of whose attributes may be read."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the wrapper reads {name}")


def assert_passed_on(patch: Patch, batch: Any) -> None:
    """Call the wrapper with ``batch`` as every argument but ``self``."""
    # One looks into what the original returns: batches and their items.
    expected = {"Trainer.get_batch_samples": ([RESULT], None)}.get(patch.path, RESULT)
    original = mock.Mock(return_value=expected)
    arguments = [Untouchable() if name in ("self", "model") else batch for name in patch.parameters]
    result = patch.make(original, patch)(*arguments)
    original.assert_called_once()
    received = [*original.call_args.args, *original.call_args.kwargs.values()][: len(arguments)]
    counts_inline = not is_active("transformers.trainer:Trainer._get_num_items_in_batch")
    if patch.path == "Trainer.get_batch_samples" and patch.active and counts_inline:
        # It wraps the iterator, and returns the batches that came from it: this original reads none.
        assert result == ([], None)
        return
    assert all(got is given for got, given in zip(received, arguments, strict=True)), patch.target
    assert result == expected


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.path)
@pytest.mark.parametrize("kind", ["packed", "plain"])
def test_an_inactive_wrapper_passes_everything_on(monkeypatch, patch, kind):
    monkeypatch.setattr(patch, "active", False)
    batch = {"logits": some_packed() if kind == "packed" else torch.ones(2, 3), "labels": None}
    assert_passed_on(patch, batch)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.path)
def test_a_batch_without_packed_sequences_is_passed_on_untouched(monkeypatch, patch):
    monkeypatch.setattr(patch, "active", True)
    # Padded batches of our own models need more.
    monkeypatch.delitem(sys.modules, "hf_packfix.models", raising=False)
    batch = {"logits": torch.ones(2, 3), "labels": torch.ones(2), "more": [None, (torch.ones(1), "text")]}
    assert_passed_on(patch, batch)
    assert_passed_on(patch, [batch])
