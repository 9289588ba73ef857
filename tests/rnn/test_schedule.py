"""Which row follows which."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from hf_packfix.rnn.schedule import Schedule


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 20))
def test_rows_before_after_and_last_are_those_of_each_sequence(lengths, rows):
    packed = pack_sequence([torch.tensor([[i, t] for t in range(n)]) for i, n in enumerate(sorted(lengths)[::-1])])
    schedule = Schedule(packed.batch_sizes, packed.batch_sizes.tolist())
    steps = packed.data.tolist()
    ends = dict(steps)  # the last step of every rank
    starts = torch.tensor([[rank, -1] for rank in range(len(lengths))])
    assert [steps[row] for row in schedule.final_rows(True)] == [[rank, 0] for rank in range(len(lengths))]
    assert [steps[row] for row in schedule.final_rows(False)] == [[rank, ends[rank]] for rank in range(len(lengths))]
    chunks = list(schedule.chunks(rows, backwards=False))
    for reverse in (False, True):
        expected = [[rank, -1 if step == (ends[rank] if reverse else 0) else step + (1 if reverse else -1)]
                    for rank, step in steps]  # fmt: skip
        assert schedule.states_before(packed.data, starts, reverse).tolist() == expected
        for chunk in chunks:
            found = schedule.states_before(packed.data, starts, reverse, chunk).tolist()
            assert found == expected[chunk.start : chunk.stop]
    assert list(schedule.chunks(rows, backwards=True)) == chunks[::-1]
    assert [size for chunk in chunks for size in chunk.sizes] == schedule.sizes
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    for chunk in chunks:
        assert sum(chunk.sizes) == chunk.stop - chunk.start < rows + len(lengths)
