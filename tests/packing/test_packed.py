"""``packed.py`` against a plain list of sequences, and against torch's own functions."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from hf_packfix.packing import jagged, packed, trees
from tests.support.packed_sequences import Pair, assert_same_fields


def sequences(lengths: list[int], dtype: torch.dtype, trailing: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 9, (n, *trailing), generator=generator).to(dtype) for n in lengths]


def test_sorted_packed_sequences_keep_their_missing_indices_while_they_stay_sorted():
    pieces = sequences([4, 3, 1], torch.int64, ())
    packed = pack_sequence(pieces)
    assert_same_fields(jagged.take(packed, slice(1, 3)), pack_sequence(pieces[1:]))
    assert_same_fields(jagged.concatenate([packed, jagged.take(packed, [2])]), pack_sequence([*pieces, pieces[2]]))
    unsorted = jagged.concatenate([packed, packed])
    assert unsorted.sorted_indices is not None
    assert all(map(torch.equal, unpack_sequence(unsorted), pieces + pieces))


def test_pad_passes_gradients():
    data = torch.ones(6, requires_grad=True)
    sequences = pack_sequence([torch.ones(2), torch.ones(4)], enforce_sorted=False)._replace(data=data)
    packed.pad(sequences, -100.0)[0].sum().backward()
    assert data.grad.sum() == 2  # the two steps of the first sequence, and no padding


def test_the_same_packing_is_the_same_lengths_in_the_same_order():
    pieces = sequences([2, 3, 3], torch.int64, ())
    batch = pack_sequence(pieces, enforce_sorted=False)
    assert packed.same_packing(batch, batch._replace(data=batch.data * 2))
    assert packed.same_packing(batch, pack_sequence(pieces[:2], enforce_sorted=False)) is False
    swapped = PackedSequence(batch.data, batch.batch_sizes, batch.sorted_indices.flip(0))
    assert not packed.same_packing(batch, swapped)
    in_order = pack_sequence([pieces[1], pieces[0]])
    explicit = PackedSequence(in_order.data, in_order.batch_sizes, torch.tensor([0, 1]))
    assert packed.same_packing(in_order, explicit)
    of_one_length = pack_sequence(pieces[1:])
    turned = of_one_length._replace(sorted_indices=torch.tensor([1, 0]), unsorted_indices=torch.tensor([1, 0]))
    for first, second in ((of_one_length, turned), (turned, of_one_length)):
        assert not packed.same_packing(first, second)


@pytest.mark.parametrize(
    ("batch_sizes", "message"),
    [
        ([2, 2], "sum to 4"),
        ([1, 2], "must not increase"),
        ([3, 1, 2], "must not increase"),
        ([3, 0], "fall below 1"),
        ([2, 1, 0], "fall below 1"),
    ],
)
def test_contradicting_fields_are_named(batch_sizes, message):
    inconsistent = PackedSequence(
        torch.ones(3 if sum(batch_sizes) == 4 else sum(batch_sizes)), torch.tensor(batch_sizes)
    )
    for use in (packed.pad, jagged.to_jagged):
        with pytest.raises(ValueError, match=message):
            use(inconsistent)


def test_wrong_arguments_are_named():
    batch = pack_sequence(sequences([2, 3], torch.int64, ()), enforce_sorted=False)
    with pytest.raises(ValueError, match="total_length is 2"):
        packed.pad(batch, total_length=2)
    with pytest.raises(ValueError, match="sum to the 3 rows"):
        jagged.from_jagged(torch.ones(3), torch.tensor([2, 2]))
    with pytest.raises(ValueError, match="at least 1"):
        jagged.from_jagged(torch.ones(3), torch.tensor([3, 0]))
    with pytest.raises(ValueError, match="nothing to concatenate"):
        jagged.concatenate([])


def test_a_tree_without_a_packed_sequence_is_kept():
    batch = pack_sequence(sequences([2, 3], torch.int64, ()), enforce_sorted=False)
    untouched = {"a": [1, "x"]}
    tree = {"keep": untouched, "packed": (batch, None)}
    found = trees.map_packed(packed.batch_size, tree)
    assert found == {"keep": untouched, "packed": (2, None)}
    assert found["keep"] is untouched
    assert trees.map_packed(packed.batch_size, untouched) is untouched
    assert trees.contains(tree)
    assert not trees.contains(untouched)


class OneDevice(TorchDispatchMode):
    """Refuses what a GPU refuses and ``meta`` does not: a kernel with tensors of two devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices = {
            leaf.device for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor) and leaf.dim()
        }
        assert len(devices) <= 1, f"{func} on {devices}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "use",
    [
        packed.pad,
        packed.pad_left,
        lambda sequences: jagged.to_jagged(sequences)[0],
        lambda sequences: jagged.take(sequences, slice(1, 3)).data,
        lambda sequences: jagged.take(sequences, [2, 0]).sorted_indices,
        lambda sequences: jagged.concatenate([sequences, sequences]).data,
        lambda sequences: jagged.concatenate([sequences, sequences]).unsorted_indices,
        lambda sequences: jagged.from_jagged(sequences.data, torch.tensor([1, 3, 4])).sorted_indices,
        lambda sequences: jagged.from_jagged(sequences.data[:0], torch.tensor([], dtype=torch.int64)).sorted_indices,
        lambda sequences: packed.with_data(sequences, sequences.data).data,
    ],
)
def test_everything_happens_on_the_device_of_the_data(use):
    batch = pack_sequence(sequences([4, 3, 1], torch.float32, (2,)))
    with OneDevice():
        found = use(batch._replace(data=batch.data.to("meta")))
    expected = use(batch)
    assert (found.device.type, found.shape, found.dtype) == ("meta", expected.shape, expected.dtype)


def test_pad_left_puts_the_padding_first():
    pieces = [torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5, 6])]
    sequences = pack_sequence(pieces, enforce_sorted=False)
    assert packed.pad_left(sequences, 9).tolist() == [[9, 1, 2], [9, 9, 3], [4, 5, 6]]
    assert packed.pad_left(sequences).tolist() == [[0, 1, 2], [0, 0, 3], [4, 5, 6]]
    assert packed.pad(sequences).tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    assert torch.equal(packed.pad(sequences, total_length=3), packed.pad(sequences))


def test_a_packed_sequence_of_nothing_has_zero_of_everything():
    none = torch.tensor([], dtype=torch.int64)
    for keep_order in (False, True):
        empty = jagged.from_jagged(torch.ones(0, 2), none, keep_order=keep_order)
        assert (empty.sorted_indices is None) == keep_order
        assert (packed.batch_size(empty), packed.num_tokens(empty), packed.lengths(empty).tolist()) == (0, 0, [])
        assert packed.pad(empty).shape == (0, 0, 2)
        assert packed.pad(empty, total_length=4).shape == (0, 4, 2)
        assert jagged.to_jagged(empty)[0].shape == (0, 2)


def test_nothing_is_copied_where_nothing_changes():
    batch = pack_sequence(sequences([2, 3], torch.int64, ()), enforce_sorted=False)
    for which in (slice(None), slice(0, 2), slice(0, 99), slice(-2, None)):
        assert jagged.take(batch, which) is batch
    for which in (slice(None, None, 1), [0, 1]):
        assert_same_fields(jagged.take(batch, which), batch)
    assert jagged.concatenate([batch]) is batch
    assert packed.with_data(batch, batch.data) is batch
    other = packed.with_data(batch, batch.data + 1)
    assert other is not batch
    assert all(getattr(other, name) is getattr(batch, name) for name in PackedSequence._fields[1:])
    assert torch.equal(other.data, batch.data + 1)


def test_named_tuples_are_found_wherever_they_stand():
    packed = pack_sequence(sequences([2], torch.int64, ()))
    for leaf in (packed, Pair(1, 2)):
        for tree in (leaf, [leaf], (0, (leaf,)), {"a": 0, "b": leaf}, [{"a": [leaf]}]):
            assert trees.contains(tree, trees.is_namedtuple) is True
            assert trees.contains(tree) is (leaf is packed)
    for tree in (torch.ones(2), [1, (2, 3)], {"a": [None, "x"]}, {}, range(3), object()):
        assert trees.contains(tree, trees.is_namedtuple) is False
        assert trees.contains(tree) is False


# --- padding that the dtype cannot hold -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        (torch.bool, -100, torch.int8),
        (torch.bool, 1, torch.bool),
        (torch.uint8, -100, torch.int16),
        (torch.uint8, 255, torch.uint8),
        (torch.uint8, 256, torch.int16),
        (torch.int8, -100, torch.int8),
        (torch.int8, -129, torch.int16),
        (torch.int64, -100, torch.int64),
        (torch.int64, 0.5, torch.float64),
        (torch.int32, float("nan"), torch.float64),
        (torch.float16, float("-inf"), torch.float16),
        (torch.float16, 1e5, torch.float32),
        (torch.bfloat16, -100, torch.bfloat16),
    ],
)
def test_the_smallest_dtype_that_holds_both(dtype, value, expected):
    assert packed.dtype_with(dtype, value) is expected


@pytest.mark.skipif(not hasattr(torch, "uint16"), reason="this torch has no wide unsigned integers")
def test_the_smallest_dtype_that_holds_wide_unsigned_integers():
    assert packed.dtype_with(torch.uint16, -100) is torch.int32
    assert packed.dtype_with(torch.uint32, -1) is torch.int64
    assert packed.dtype_with(torch.uint64, -1) is torch.float64


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_padding_that_does_not_fit(dtype):
    values = [torch.tensor([1, 0]).to(dtype), torch.tensor([1, 1, 1]).to(dtype)]
    sequences = pack_sequence(values, enforce_sorted=False)
    with pytest.raises(ValueError, match=rf"{dtype} does not hold the padding_value -100: .*data.to\(torch.int"):
        packed.pad(sequences, -100)
    padded = packed.pad(sequences, -100, promote=True)
    assert padded.tolist() == [[1, 0, -100], [1, 1, 1]]
    assert packed.pad(sequences, 1).dtype == dtype
