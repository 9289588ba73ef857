"""The self-test of the recurrent models: what the doctor and the drift check report."""

from __future__ import annotations

import json
import runpy

import pytest
import torch

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
    assert found == {"upstream names": "", **dict.fromkeys(selftest.CHECKS, "")}
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        (
            upstream.UpstreamName("transformers:NoSuchThing", "", "called"),
            upstream.deviations,
            "has no transformers:",
        ),
        (
            upstream.UpstreamName("transformers.trainer", "no_such_word", "read"),
            upstream.deviations,
            "'no_such",
        ),
        (upstream.UpstreamName("no_such_module:x", "", "called"), upstream.deviations, "has no no_such_module:x"),
        (upstream.UpstreamName("transformers:Trainer", "", "called", since="99"), upstream.premature, "since 99"),
        (upstream.UpstreamName("transformers:Trainer", "", "called", until="4.0"), upstream.premature, "until 4.0"),
    ],
)
def test_a_name_that_is_not_as_listed(monkeypatch, name, function, message):
    monkeypatch.setattr(upstream, "CONTRACT", (name,))
    (found,) = function()
    assert message in found


def test_a_version_that_is_none_is_not_judged(monkeypatch):
    monkeypatch.setattr(upstream.transformers, "__version__", "main")
    assert upstream.deviations() == upstream.premature() == []


def test_outputs_without_one_field_for_the_state(monkeypatch):
    monkeypatch.setattr(upstream, "CausalLMOutputWithPast", upstream.SequenceClassifierOutput)
    with pytest.raises(ImportError, match=r"expects one field .* found \[\]; this release is newer than hf_packfix"):
        upstream._cache_name()
