"""The cost model is asked, and knows steps, blocks and what needs a gradient."""

from __future__ import annotations

import pytest
import torch

from hf_packfix import rnn
from hf_packfix.rnn import cost
from tests.support.recurrent import KINDS, new_layer, new_packed


@pytest.mark.parametrize(("mode", "fewest"), cost._FEWEST_STEPS.items())
def test_a_few_steps_are_left_to_torch(mode, fewest):
    for steps, trains_hidden in zip(fewest, (True, False), strict=True):
        assert cost.has_enough_steps(mode, torch.ones(steps), trains_hidden)
        assert not cost.has_enough_steps(mode, torch.ones(steps - 1), trains_hidden)


def test_an_lstm_over_one_length_is_left_to_onednn():
    def is_one_block(mode: str, batch_sizes: list[int], dtype: torch.dtype = torch.float32) -> bool:
        data, state = torch.ones(sum(batch_sizes), 2, dtype=dtype), torch.ones(1, batch_sizes[0], 4)
        return cost.is_one_block(mode, data, torch.tensor(batch_sizes), (state, state))

    assert is_one_block("LSTM", [3] * 50)
    assert not is_one_block("LSTM", [3] * 50 + [2])
    assert not is_one_block("LSTM", [3] * 50, torch.float64)
    assert not is_one_block("GRU", [3] * 50)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_model_is_asked(kind, monkeypatch):
    layer = new_layer(kind)
    monkeypatch.setattr("hf_packfix.rnn.stack.is_one_block", lambda *_: True)
    assert rnn.run(layer, new_packed()) is None
    monkeypatch.undo()
    assert rnn.run(layer, new_packed([5, 4])) is None
    assert rnn.run(layer, new_packed([20, 4])) is not None
