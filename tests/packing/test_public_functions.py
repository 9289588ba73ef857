"""The public functions on PackedSequences: what they refuse, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from hf_packfix.packing import jagged, packed

PACK = pack_sequence([torch.arange(2.0), torch.arange(4.0)], enforce_sorted=False)

FUNCTIONS = {
    "batch_size": packed.batch_size,
    "num_tokens": packed.num_tokens,
    "lengths": packed.lengths,
    "pad": packed.pad,
    "pad_left": packed.pad_left,
    "take": lambda value: jagged.take(value, [0]),
    "concatenate": lambda value: jagged.concatenate([value]),
    "concatenate several": lambda value: jagged.concatenate([PACK, value]),
    "same_packing": lambda value: packed.same_packing(PACK, value),
    "to_flat": jagged.to_jagged,
}

#: What people pass instead, and what the error says of it.
INSTEAD: dict[str, tuple[Any, str]] = {
    "a padded tensor": (torch.zeros(2, 4), r"found Tensor: pack a padded tensor .*pack_padded_sequence\("),
    "a tensor of four rows": (torch.zeros(4, 2), "found Tensor: "),
    "a list": ([torch.zeros(2), torch.zeros(4)], r"found list: pack a list of tensors .*pack_sequence\("),
    "a tuple of four": ((torch.zeros(3),) * 4, r"found tuple: pack a list of tensors .*pack_sequence\("),
    "an empty tuple": ((), "found tuple: "),
    "what a layer returns": ((PACK, torch.zeros(1, 2, 3)), "found tuple: it is the first item of this tuple"),
    "a batch": ({"input_ids": PACK}, "found dict: pass one of the values"),
    "nothing": (None, "found NoneType: "),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(("value", "message"), INSTEAD.values(), ids=INSTEAD)
def test_what_is_not_packed_is_named_with_what_to_do(function, value, message):
    with pytest.raises(TypeError, match=f"expected a PackedSequence, {message}"):
        function(value)


def test_a_single_packed_sequence_is_not_a_list_to_concatenate():
    with pytest.raises(TypeError, match="expected a list of PackedSequences, found a single one: put it into a list"):
        jagged.concatenate(PACK)
