"""accelerate's operations on packed sequences, alone and nested."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed.utils
from accelerate.utils import DistributedType, operations
from torch.nn.utils.rnn import pack_sequence

from hf_packfix.packing import jagged
from hf_packfix.packing import packed as packing
from tests.support.oracle import stock
from tests.support.patched import patch_of


def two_packed():
    first = [torch.arange(4), torch.arange(1) + 10, torch.arange(2) + 20]
    second = [torch.arange(3) + 30, torch.arange(5) + 40]
    return first, second, pack_sequence(first, enforce_sorted=False), pack_sequence(second, enforce_sorted=False)


def sequences(packed):
    """Return the sequences as lists; unlike torch's own function, raises where the fields contradict each other."""
    return [sequence.tolist() for sequence in jagged.to_jagged(packed)[0].split(packing.lengths(packed).tolist())]


@pytest.mark.needs_patch(
    "accelerate.utils.operations:find_batch_size",
    "accelerate.utils.operations:slice_tensors",
    "accelerate.utils.operations:concatenate",
    "accelerate.utils.operations:get_data_structure",
    "accelerate.utils.operations:gather",
    "accelerate.utils.operations:get_shape",
)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"x": [x, {"y": (x,)}]}], ids=["alone", "nested"])
def test_every_operation_treats_a_packed_sequence_as_its_sequences(wrap):
    first, second, packed, other = two_packed()

    def leaves(tree):
        return [tree["x"][0], tree["x"][1]["y"][0]] if isinstance(tree, dict) else [tree]

    assert operations.find_batch_size(wrap(packed)) == 3
    for part in leaves(operations.slice_tensors(wrap(packed), slice(1, 3))):
        assert sequences(part) == [[10], [20, 21]]
    for whole in leaves(operations.concatenate([wrap(packed), wrap(other)])):
        assert sequences(whole) == [sequence.tolist() for sequence in first + second]
    structure = operations.get_data_structure(wrap(packed))
    for empty in leaves(operations.initialize_tensors(structure)):
        assert empty.data.shape == packed.data.shape
        assert empty.data.dtype == packed.data.dtype
        assert list(map(torch.equal, empty[1:], packed[1:])) == [True] * 3
    assert leaves(operations.get_shape(wrap(packed)))[0] == [3, 4]
    for same in leaves(operations.broadcast(wrap(packed))):
        assert torch.equal(packing.pad(same), packing.pad(packed))
    for padded in leaves(operations.gather(wrap(packed))):
        assert padded.tolist() == [[0, 1, 2, 3], [10, -100, -100, -100], [20, 21, -100, -100]]
    for padded in leaves(operations.pad_across_processes(wrap(packed), dim=1, pad_index=7)):
        assert padded.tolist() == [[0, 1, 2, 3], [10, 7, 7, 7], [20, 21, 7, 7]]


@pytest.mark.parametrize("trailing", [(), (5,), (5, 6)])
def test_the_shape_of_a_packed_sequence_is_that_of_its_padded_tensor(trailing):
    packed = pack_sequence([torch.zeros(length, *trailing) for length in (2, 4, 1)], enforce_sorted=False)
    with stock():
        expected = operations.get_shape([packing.pad(packed)])
    assert operations.get_shape([packed]) == expected == [[3, 4, *trailing]]


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("pad_first", [False, True])
def test_what_is_padded_across_processes(monkeypatch, dim, pad_first):
    # What a process alone leaves as it is: by how the original is called, first for the steps, then as asked.
    patch = patch_of("accelerate.utils.operations:pad_across_processes")
    monkeypatch.setattr(patch, "active", True)
    calls = []

    def original(tree, **options):
        calls.append((tree, options))
        return tree

    packed = two_packed()[2]
    found = patch.make(original, patch)([packed], dim=dim, pad_index=-100, pad_first=pad_first)
    expected = packing.pad(packed, -100)
    assert torch.equal(found[0], expected)
    options = {"pad_index": -100, "pad_first": pad_first}
    *steps, (tree, whole) = calls
    assert isinstance(tree, list)
    assert whole == {"dim": dim, **options}
    assert [each for _, each in steps] == ([] if dim == 1 else [{"dim": 1, **options}])


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda p: operations.slice_tensors([p], 1), "cut by a slice of its sequences, found int"),
        (lambda p: operations.concatenate([p, p], dim=1), "along the batch .dim 0. alone, found dim 1"),
        (lambda p: operations.concatenate([p, p], dim=-1), "along the batch .dim 0. alone, found dim -1"),
        (lambda p: operations.concatenate([p, p.data]), "with its like, found Tensor"),
        (lambda p: operations.concatenate([p.data, p]), "with its like, found Tensor"),
    ],
)
def test_what_has_no_meaning_says_so(use, message):
    with pytest.raises(TypeError, match=message):
        use(two_packed()[2])


@pytest.mark.needs_patch("accelerate.utils.operations:broadcast")
def test_a_sorted_packed_sequence_is_sent_as_data_and_batch_sizes():
    sent = []
    state = mock.Mock(distributed_type=DistributedType.MULTI_CPU, debug=False)
    packed = pack_sequence([torch.arange(4), torch.arange(3), torch.arange(3)])
    with (
        mock.patch.object(operations, "PartialState", return_value=state),
        mock.patch("torch.distributed.broadcast", lambda tensor, src: sent.append(tensor.clone())),
    ):
        same = operations.broadcast({"x": packed})["x"]
    assert [len(tensor) for tensor in sent] == [len(packed.data), len(packed.batch_sizes)]  # no missing index tensors
    assert torch.equal(same.data, packed.data)
