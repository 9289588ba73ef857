"""What the probes find: a function that does what is right passes its probe, one that does half of it does not.

``tests/patches/test_drift.py`` runs the probes on what upstream has; here they run on the plugin's own functions, and
on what a half-made fix upstream would give. A probe that always fails would leave a patch on that is no longer needed,
and one that passes too early would leave it off.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import hf_packfix
from hf_packfix.engine import probe
from hf_packfix.engine.patch import Patch
from hf_packfix.engine.targets import resolve
from hf_packfix.patches import PATCHES, transformers_trainer
from tests.support.packed_sequences import META
from tests.tools import drift

# What `get_batch_samples` has for a probe asks about the methods around it.
PROBED = [
    patch
    for patch in PATCHES
    if patch.upstream_supports is not None
    and drift.state_here(patch) == "applied"
    and patch.path != "Trainer.get_batch_samples"
]


def wrapper_of(patch: Patch) -> Any:
    import_module(patch.module)
    hf_packfix.enable()
    assert patch.active
    return resolve(patch.module, patch.path)[1]


def on_meta(**fields: Any) -> PackedSequence:
    """Return a PackedSequence of which all that must move has moved, some fields replaced."""
    packed = probe.packed()
    moved = {name: getattr(packed, name).to(META) for name in ("data", "sorted_indices", "unsorted_indices")}
    return packed._replace(**{**moved, **fields})


@pytest.mark.parametrize("patch", PROBED, ids=lambda patch: patch.path)
def test_the_wrapper_passes_the_probe_unless_it_is_inactive(monkeypatch, patch: Patch):
    wrapper = wrapper_of(patch)
    assert patch.upstream_supports(wrapper) is True
    monkeypatch.setattr(patch, "active", False)
    assert not patch.supported_by(wrapper)


def test_the_probe_is_two_sequences_out_of_order():
    expected = pack_sequence([torch.tensor([1]), torch.tensor([2, 3])], enforce_sorted=False)
    assert all(map(torch.equal, probe.packed(), expected))
    assert expected.sorted_indices.tolist() == [1, 0]


def test_moved_means_every_field_that_must_and_no_other():
    assert probe.is_on_meta(on_meta())
    for field in ("data", "sorted_indices", "unsorted_indices"):
        assert not probe.is_on_meta(on_meta(**{field: getattr(probe.packed(), field)})), field
        assert not probe.is_on_meta(on_meta(**{field: None})) or field == "data", field
    assert not probe.is_on_meta(on_meta(batch_sizes=probe.packed().batch_sizes.to(META)))
    assert not probe.is_on_meta(tuple(on_meta()))


@pytest.mark.parametrize("factor", [6, 2, 7])
def test_operations_count_the_tokens_three_times_the_parameters_twice(factor):
    def counting(trainer: Any, inputs: Any) -> Any:
        if isinstance(inputs["x"], PackedSequence):
            inputs = {"x": inputs["x"].data}
        return trainer.model.floating_point_ops(inputs) * factor / 6

    assert transformers_trainer._counts_operations(counting) == (factor == 6)


@pytest.mark.parametrize(("counted", "expected"), [(3, True), (4, False), (0, False)])
def test_a_count_passes_if_it_is_that_of_the_real_tokens(counted, expected):
    def tokens(trainer: Any, inputs: Any) -> None:
        assert trainer.args.include_num_input_tokens_seen == "all"
        trainer.state.num_input_tokens_seen += trainer.accelerator.gather(torch.tensor(counted)).item()

    def items(trainer: Any, batch_samples: Any, device: Any) -> Any:
        (batch,) = batch_samples
        assert isinstance(batch["labels"], PackedSequence)
        return torch.tensor(counted, device=device)

    assert transformers_trainer._counts_tokens(tokens) is expected
    assert transformers_trainer._counts_items(items) is expected


PACK = probe.packed()


def scaled(factor: float) -> Any:
    """Return a smoother that knows packed sequences, and gives so many times the loss for them."""

    def smooth(self: Any, outputs: Any, labels: Any) -> Any:
        packed = isinstance(labels, PackedSequence)
        logits, labels = (outputs["logits"].data, labels.data) if packed else (outputs["logits"], labels)
        assert (self.epsilon, self.ignore_index) == (0.1, -100)
        return torch.nn.functional.cross_entropy(logits, labels) * (factor if packed else 1)

    return smooth


def returning(value: Any) -> Any:
    return lambda *_: value


def of_lengths(*lengths: int) -> PackedSequence:
    return pack_sequence([torch.arange(length) for length in lengths], enforce_sorted=False)


HALF_MADE = {
    "LabelSmoother.__call__": [scaled(1), scaled(0.5), scaled(2)],
    "nested_detach": list(map(returning, [PACK, tuple(PACK), PACK.data])),
    "nested_concat": [returning(torch.zeros(shape)) for shape in [(4, 2), (3, 2), (5, 2), (4, 1), (4, 3), (4, 2, 1)]],
    "nested_numpify": [returning(torch.zeros(shape)) for shape in [(2, 2), (1, 2), (3, 2), (2, 1), (2, 3), (2, 2, 1)]],
    "nested_truncate": list(map(returning, [PACK, tuple(PACK)])),
    "find_batch_size": list(map(returning, [2, 1, 3])),
    "slice_tensors": [returning(of_lengths(*each)) for each in [(2,), (1,), (3,), (1, 2), (2, 1)]],
    "concatenate": [returning(of_lengths(*each)) for each in [(1, 2, 1, 2), (1, 2), (1, 1, 2, 2), (1, 2, 1, 3)]],
    "get_data_structure": list(map(returning, [PACK._replace(data="described"), PACK])),
    "get_shape": list(map(returning, [[2, 2], PACK])),
}


@pytest.mark.parametrize("patch", [p for p in PROBED if p.path in HALF_MADE], ids=lambda patch: patch.target)
def test_a_fix_that_is_half_made_does_not_pass(patch):
    right, *wrong = HALF_MADE[patch.path]
    assert patch.upstream_supports(right) is True
    for function in wrong:
        assert not patch.upstream_supports(function)


@pytest.mark.parametrize("missing", [None, "_get_num_items_in_batch", "_track_num_input_tokens"])
def test_counting_is_elsewhere_where_both_helpers_exist(monkeypatch, missing):
    helpers = {"_get_num_items_in_batch": None, "_track_num_input_tokens": None}
    helpers.pop(missing, None)
    module = SimpleNamespace(Trainer=type("Trainer", (), helpers))
    monkeypatch.setitem(transformers_trainer.sys.modules, "transformers.trainer", module)
    assert transformers_trainer._counts_elsewhere(print) == (missing is None)
