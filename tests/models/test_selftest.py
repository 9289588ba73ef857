"""The self-test of the recurrent models: what the doctor and the drift check report."""

from __future__ import annotations

import dataclasses
import json
import runpy

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_packfix.models import selftest, upstream


def test_every_check_passes_and_draws_nothing():
    before = torch.get_rng_state()
    assert selftest.selftest() == dict.fromkeys(selftest.CHECKS, "")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_goes_wrong_is_named_by_cell(monkeypatch):
    def fails(cell):
        if cell != "lstm":
            raise ValueError(f"no {cell}\nhere")

    monkeypatch.setattr(selftest, "CHECKS", {"fails": fails, "passes": lambda cell: None})
    assert selftest.selftest() == {"fails": "rnn: ValueError: no rnn here; gru: ValueError: no gru here", "passes": ""}


def test_the_program_prints_what_it_found(monkeypatch, capsys):
    # A program of its own has checks of its own: only what it prints is looked at.
    with pytest.warns(RuntimeWarning, match="found in sys.modules"), pytest.raises(SystemExit) as ended:
        runpy.run_module("hf_packfix.models.selftest", run_name="__main__")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == dict.fromkeys(selftest.CHECKS, "")
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (("loss", "logits", "past_key_values", "hidden_states"), "past_key_values"),
        (("loss", "logits", "cache", "more"), "cache"),
        (("loss", "cache", "past_key_values"), "cache"),
        (("loss", "logits", "memory", "attentions"), "memory"),
        (("loss", "logits"), "cache"),
    ],
)
def test_the_cache_is_found_among_the_fields_of_an_output(fields, name):
    assert upstream.cache_name(fields) == name
    assert upstream.CACHE_NAME in (field.name for field in dataclasses.fields(CausalLMOutputWithPast))
