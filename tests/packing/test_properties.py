"""Any batch at all: the structure, the values and the devices that come back, against plain models of them.

``HF_PACKFIX_EXAMPLES`` is the number of examples in all; without it, a few hundred that are the same every time.
"""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence, unpack_sequence
from transformers import BatchEncoding, BatchFeature
from transformers.trainer_pt_utils import (
    find_batch_size,
    nested_concat,
    nested_detach,
    nested_numpify,
    nested_truncate,
)

from hf_packfix.packing import jagged, packed, trees
from tests.support.oracle import stock
from tests.support.packed_sequences import CPU, META, Pair, assert_same_fields, bare_trainer
from tests.support.reports import assert_same_tree
from tests.support.strategies import all_lengths, attack

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


class WithDefault(NamedTuple):
    first: Any
    second: Any = None


class Reversed(namedtuple("Reversed", ["first", "second"])):
    """Its own ``__new__``, like PackedSequence, takes its fields another way round."""

    __slots__ = ()

    def __new__(cls, *, second, first):
        return super().__new__(cls, first, second)


# --- what a batch may hold ------------------------------------------------------------------------------


def numbers(draw: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    values = torch.randint(0, 100, shape, generator=generator).to(dtype)
    return torch.stack([values, values], -1)[..., 0] if draw(st.booleans()) else values  # not contiguous, or so


shapes = st.lists(st.integers(0, 3), max_size=2).map(tuple)
trailing_shapes = st.lists(st.integers(1, 3), max_size=2).map(tuple)  # torch packs nothing empty


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    tensor = numbers(draw, draw(shapes), dtype)
    return tensor.requires_grad_(draw(st.booleans())) if dtype.is_floating_point else tensor


@st.composite
def sequences(draw: Any, like: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """One to six sequences ``[T, *]``, of the dtype and trailing shape of ``like`` where that is given."""
    dtype = like[0].dtype if like else draw(st.sampled_from(DTYPES))
    trailing = tuple(like[0].shape[1:]) if like else draw(trailing_shapes)
    return [numbers(draw, (length, *trailing), dtype) for length in draw(all_lengths)]


@st.composite
def packed_sequences(draw: Any) -> PackedSequence:
    pieces = draw(sequences())
    in_order = draw(st.booleans())
    if in_order:
        pieces.sort(key=len, reverse=True)
    packed = pack_sequence(pieces, enforce_sorted=in_order)
    data = numbers(draw, tuple(packed.data.shape), packed.data.dtype)
    return packed._replace(data=data.requires_grad_(data.dtype.is_floating_point and draw(st.booleans())))


MAPPINGS = [dict, OrderedDict, UserDict, BatchEncoding, BatchFeature]
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3))


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    items = st.lists(inner, max_size=3)
    mappings = st.dictionaries(st.text("abc", max_size=2), inner, max_size=3)
    return st.one_of(
        items,
        items.map(tuple),
        st.builds(Pair, inner, inner),
        st.builds(Reversed, first=inner, second=inner),
        inner.map(WithDefault),
        st.builds(lambda kind, held: kind(held), st.sampled_from(MAPPINGS), mappings),
    )


batches = st.recursive(st.one_of(packed_sequences(), tensors(), scalars), containers, max_leaves=8)


def assert_moved(found: Any, given: Any, device: torch.device, dtype: torch.dtype | None) -> None:
    """Check that ``found`` is ``given``, with every tensor but ``batch_sizes`` on ``device``, floats cast."""
    assert type(found) is type(given)
    if isinstance(given, PackedSequence):
        assert_moved(found.data, given.data, device, dtype)
        assert found.batch_sizes is given.batch_sizes
        for name in ("sorted_indices", "unsorted_indices"):
            assert_moved(getattr(found, name), getattr(given, name), device, None)
        if device == CPU and found.data is given.data:
            assert found is given
    elif isinstance(given, torch.Tensor):
        target = dtype if dtype is not None and (given.is_floating_point() or given.is_complex()) else given.dtype
        assert (found.device, found.dtype, found.shape) == (device, target, given.shape)
        assert found.requires_grad == given.requires_grad
        if device == CPU:
            assert torch.equal(found, given.to(target))
    elif isinstance(given, Mapping):
        assert list(found) == list(given)
        for key in given:
            assert_moved(found[key], given[key], device, dtype)
    elif isinstance(given, (list, tuple)):
        assert len(found) == len(given)
        for one, other in zip(found, given, strict=True):
            assert_moved(one, other, device, dtype)
    else:
        assert found == given


# --- the properties -------------------------------------------------------------------------------------


@attack
@given(batches, st.sampled_from([CPU, META]), st.sampled_from([None, torch.float64]))
def test_a_batch_moves_whole(tree, device, dtype):
    if dtype is not None and nested_complex(tree):
        dtype = None  # DeepSpeed's cast, which is stock's own, makes no sense of complex numbers
    assert_moved(bare_trainer(device, dtype=dtype)._prepare_input(tree), tree, device, dtype)


def nested_complex(tree: Any) -> bool:
    if isinstance(tree, torch.Tensor):
        return tree.is_complex()
    values = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    return any(map(nested_complex, values))


@attack
@given(batches)
def test_replacing_touches_packed_sequences_alone(tree):
    assert trees.contains(tree) == ("PackedSequence(" in repr(plain(tree)))
    same = trees.map_packed(lambda sequences: sequences, tree)
    assert same is tree
    counted = trees.map_packed(packed.num_tokens, tree)
    assert trees.contains(counted) is False
    assert_moved(plain(counted), trees.map_packed(packed.num_tokens, plain(tree)), CPU, None)


def plain(tree: Any) -> Any:
    """Return the tree with dicts for all mappings, lists for all lists and tuples, and the leaves as they are."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)) and not isinstance(tree, PackedSequence):
        return [plain(item) for item in tree]
    return tree


@attack
@given(st.data())
def test_a_packed_sequence_is_a_list_of_sequences(data):
    pieces = data.draw(sequences())
    others = data.draw(sequences(like=pieces))
    in_order = data.draw(st.booleans())
    if in_order:
        pieces.sort(key=len, reverse=True)
    batch = pack_sequence(pieces, enforce_sorted=in_order)
    assert packed.batch_size(batch) == len(pieces)
    assert packed.num_tokens(batch) == sum(map(len, pieces))
    assert packed.lengths(batch).tolist() == list(map(len, pieces))
    assert packed.same_packing(batch, pack_sequence(pieces, enforce_sorted=False))

    filling = data.draw(st.sampled_from([0, 1]))
    longer = data.draw(st.integers(0, 3))
    expected = pad_sequence(pieces, batch_first=True, padding_value=filling)
    width = expected.shape[1] + longer
    padded = packed.pad(batch, filling, total_length=width)
    assert padded.shape == (len(pieces), width, *pieces[0].shape[1:])
    assert torch.equal(padded[:, : width - longer], expected)
    assert bool((padded[:, width - longer :] == filling).all())

    flat, lengths = jagged.to_jagged(batch)
    assert torch.equal(flat, torch.cat(pieces))
    assert_same_fields(jagged.from_jagged(flat, lengths, keep_order=in_order), batch)

    places = data.draw(st.lists(st.sampled_from(range(len(pieces))), min_size=1))
    taken = jagged.take(batch, places)
    assert_sequences(taken, [pieces[place] for place in places])
    which = data.draw(st.slices(len(pieces)).filter(lambda s: s.step is None or s.step > 0))
    assert_sequences(jagged.take(batch, which), pieces[which])

    both = jagged.concatenate([batch, pack_sequence(others, enforce_sorted=False)])
    assert_sequences(both, pieces + others)
    assert_same_fields(jagged.take(both, slice(len(pieces))), pack_sequence(pieces, enforce_sorted=False))


def assert_sequences(sequences: PackedSequence, expected: list[torch.Tensor]) -> None:
    assert packed.batch_size(sequences) == len(expected)
    if expected:
        assert all(map(torch.equal, unpack_sequence(sequences), expected))


@attack
@given(st.data())
def test_what_evaluation_does_to_a_packed_sequence_equals_what_it_does_to_the_padded_tensor(data):
    wrap = data.draw(st.sampled_from([lambda x: x, lambda x: Pair(x, (x,)), lambda x: Reversed(first=x, second=[x])]))
    first = data.draw(sequences())
    second = data.draw(sequences(like=first))
    pair = [wrap(pack_sequence(pieces, enforce_sorted=False)) for pieces in (first, second)]
    dtype = packed.dtype_with(first[0].dtype, -100)  # bool and bytes hold no -100
    padded_tensors = [
        wrap(pad_sequence([piece.to(dtype) for piece in pieces], True, -100)) for pieces in (first, second)
    ]
    limit = data.draw(st.integers(1, 7))
    assert find_batch_size(pair[0]) == find_batch_size(padded_tensors[0]) == len(first)
    found = nested_numpify(nested_concat(nested_detach(pair[0]), nested_detach(pair[1]), padding_index=-100))
    truncated = nested_numpify(nested_truncate(pair[0], limit))
    assert isinstance(pair[0], PackedSequence) or type(found) is type(truncated) is type(pair[0])
    with stock():
        padded_tensors = list(map(as_tuple, padded_tensors))
        expected = nested_numpify(nested_concat(*map(nested_detach, padded_tensors), padding_index=-100))
        short = nested_numpify(nested_truncate(padded_tensors[0], limit))
    assert_same_tree(as_tuple(found), expected)
    # What is cut off may have been the longest: stock keeps the columns that only it needed.
    width = max(map(len, first[:limit]))
    assert_same_tree(as_tuple(truncated), keep_columns(short, width))


def as_tuple(tree: Any) -> Any:
    return tuple(map(as_tuple, tree)) if isinstance(tree, tuple) else tree


def keep_columns(tree: Any, width: int) -> Any:
    return (
        type(tree)(keep_columns(item, width) for item in tree) if isinstance(tree, (list, tuple)) else tree[:, :width]
    )


@attack
@given(
    packed_sequences(),
    st.sampled_from([CPU, META]),
    st.sampled_from([WithDefault, lambda x: Reversed(first=x, second=1)]),
)
def test_batch_types_move_named_tuples(packed, device, wrap):
    held = {"x": packed, "pair": wrap(packed), "note": "text"}
    moved = BatchFeature(dict(held)).to(device)
    assert_moved(dict(moved), held, device, None)


# --- named tuples, by example ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [Pair(torch.ones(2), "text"), Reversed(first=torch.ones(2), second=[torch.ones(1)])])
def test_a_named_tuple_is_treated_as_a_tuple_of_its_fields(value):
    for function in (bare_trainer(META)._prepare_input, nested_detach):
        found = function(value)
        assert type(found) is type(value)
        with stock():
            expected = function(tuple(value))
            with pytest.raises(TypeError):
                function(value)
        assert repr(tuple(found)) == repr(expected)


def test_named_tuples_of_two_kinds_are_not_concatenated():
    with pytest.raises(AssertionError, match="same type"):
        nested_concat(Pair(torch.ones(1), torch.ones(1)), (torch.ones(1), torch.ones(1)))
