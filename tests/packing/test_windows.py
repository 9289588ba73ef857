"""Windows of steps: a recurrent layer that goes from window to window computes what it does in one go."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from hf_packfix import windows

LENGTHS = [[3, 7, 1, 7, 4], [1], [5, 5, 5], [9, 1, 2]]


def batch(lengths: list[int], *, enforce_sorted: bool) -> PackedSequence:
    generator = torch.Generator().manual_seed(0)
    lengths = sorted(lengths, reverse=True) if enforce_sorted else lengths
    return pack_sequence([torch.randn(n, 3, generator=generator) for n in lengths], enforce_sorted=enforce_sorted)


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_the_windows_hold_every_step_once(lengths, steps, enforce_sorted):
    x = batch(lengths, enforce_sorted=enforce_sorted)
    found: list[list[torch.Tensor]] = [[] for _ in lengths]
    for window in windows(x, steps):
        assert window.packed.data.data_ptr() == x.data[sum(len(t) for p in found for t in p) :].data_ptr()  # no copy
        for row, piece in zip(window.rows.tolist(), unpack_sequence(window.packed), strict=True):
            found[row].append(piece)
    assert all(torch.equal(torch.cat(pieces), whole) for pieces, whole in zip(found, unpack_sequence(x), strict=True))


@pytest.mark.parametrize("cell", [torch.nn.LSTM, torch.nn.GRU])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_a_carried_state_continues_the_same_sequences(cell, lengths, enforce_sorted):
    x = batch(lengths, enforce_sorted=enforce_sorted)
    torch.manual_seed(0)
    layer, state = cell(3, 4, num_layers=2), None
    outputs: list[list[torch.Tensor]] = [[] for _ in lengths]
    for window in windows(x, 2):
        begin = window.carry(state)
        assert begin is None or not any(part.requires_grad for part in (begin if cell is torch.nn.LSTM else [begin]))
        output, state = layer(window.packed, begin)
        for row, piece in zip(window.rows.tolist(), unpack_sequence(output), strict=True):
            outputs[row].append(piece)
    expected, final = layer(x)
    torch.testing.assert_close(list(map(torch.cat, outputs)), unpack_sequence(expected))
    # The last window has the longest sequences alone.
    if cell is torch.nn.GRU:
        torch.testing.assert_close(state, final[:, window.rows])


def test_a_window_needs_a_step():
    with pytest.raises(ValueError, match="at least one step, found steps=0"):
        windows(batch([2, 1], enforce_sorted=False), 0)
    with pytest.raises(TypeError, match="expected a PackedSequence, found Tensor"):
        windows(torch.ones(2, 3), 1)
