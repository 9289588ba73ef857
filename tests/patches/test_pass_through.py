"""Where there is nothing to do, every wrapper hands over to the original, with the very objects that it was given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.utils

from hf_packfix.patches import PATCHES, Patch
from hf_packfix.patches.patch import succeeds
from tests.support.packed_sequences import some_packed
from tests.support.probed import PROBED, wrapper_of

RESULT = object()


class Original:
    """Stands for any function upstream, and remembers what it was called with."""

    def __init__(self, result: Any) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.result = result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.result


def owner(batch: Any) -> Any:
    """Return what has every attribute that a wrapper asks its ``self`` for."""
    return SimpleNamespace(
        data=batch,
        tensors=None,
        arrays=None,
        do_nested_concat=True,
        padding_index=-100,
        compute_metrics=print,
        label_names=["labels"],
        ignore_index=-100,
        label_smoother=print,
        compute_loss_func=None,
        model=torch.nn.Linear(1, 1),
        args=SimpleNamespace(predict_with_generate=True, n_gpu=1, include_num_input_tokens_seen="no"),
        _get_num_items_in_batch=None,
    )


def call(patch: Patch, batch: Any) -> tuple[Original, list[Any], Any]:
    """Call the wrapper with ``batch`` as every argument but ``self``."""
    # Two of them look into what the original returns: batches and their items, and what was gathered.
    results = {"Trainer.get_batch_samples": (RESULT, None), "gather": batch}
    original = Original(results.get(patch.path, RESULT))
    arguments = [owner(batch) if name == "self" else batch for name in patch.parameters]
    return original, arguments, patch.wrap(original)(*arguments)


def assert_handed_over(patch: Patch, batch: Any) -> None:
    original, arguments, result = call(patch, batch)
    ((args, kwargs),) = original.calls
    received = [*args, *kwargs.values()][: len(arguments)]
    assert all(got is given for got, given in zip(received, arguments, strict=True)), patch.target
    gives_nothing = patch.active and patch.path.endswith(("__init__", ".add"))
    assert result is None if gives_nothing else result == original.result


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.path)
@pytest.mark.parametrize("kind", ["packed", "plain"])
def test_an_inactive_wrapper(monkeypatch, patch, kind):
    monkeypatch.setattr(patch, "active", False)
    batch = {"logits": some_packed() if kind == "packed" else torch.ones(2, 3), "labels": None}
    assert_handed_over(patch, batch)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.path)
def test_a_batch_without_packed_sequences(monkeypatch, patch):
    monkeypatch.setattr(patch, "active", True)
    batch = {"logits": torch.ones(2, 3), "labels": torch.ones(2), "more": [None, (torch.ones(1), "text")]}
    if patch.path == "Trainer._get_num_items_in_batch":
        original, arguments, result = call(patch, [batch, object()])
        assert result is RESULT
        ((_, samples, *_), _) = original.calls[0]
        assert list(map(id, samples)) == list(map(id, arguments[1]))
    elif patch.path in ("initialize_tensors", "EvalPrediction.__init__"):
        original, arguments, _ = call(patch, [batch])
        assert original.calls[0][0][-1] is arguments[-1]
    else:
        assert_handed_over(patch, batch)


@pytest.mark.parametrize("patch", PROBED, ids=lambda patch: patch.path)
def test_an_inactive_wrapper_fails_the_probe_as_upstream_does(monkeypatch, patch):
    wrapper = wrapper_of(patch)
    monkeypatch.setattr(patch, "active", False)
    assert not succeeds(patch.upstream_supports, wrapper)


def test_a_function_that_returns_nothing_leaves_the_packed_sequence():
    # FSDP also applies functions for what they do to a tensor, such as registering a hook.
    seen, packed = [], some_packed()
    (same,) = torch.distributed.utils._apply_to_tensors(lambda tensor: seen.append(tensor), [packed])
    assert same is packed
    assert seen[0] is packed.data
    assert len(seen) == 1
