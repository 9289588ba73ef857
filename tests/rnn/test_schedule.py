"""Which row follows which."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from hf_packfix.rnn.schedule import Schedule


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7))
def test_rows_before_and_last_and_reversed_are_those_of_each_sequence(lengths):
    packed = pack_sequence([torch.tensor([[i, t] for t in range(n)]) for i, n in enumerate(sorted(lengths)[::-1])])
    schedule = Schedule(packed.batch_sizes, packed.batch_sizes.tolist())
    steps = packed.data.tolist()
    ends = dict(steps)  # the last step of every rank
    starts = torch.tensor([[rank, -1] for rank in range(len(lengths))])
    assert [steps[row] for row in schedule.last_rows] == [[rank, ends[rank]] for rank in range(len(lengths))]
    assert [steps[row] for row in schedule.reversed_rows] == [[rank, ends[rank] - step] for rank, step in steps]
    assert schedule.states_before(packed.data, starts).tolist() == [[rank, step - 1] for rank, step in steps]
