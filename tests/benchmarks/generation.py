"""Time per generated token: the state carried along against recomputing everything, at two prompt lengths.

Carried state costs one step a token whatever the prompt's length; recomputing costs a step for every token
before. Each figure is the difference between a long and a short continuation, so that reading the prompt once
does not count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_packfix.models import RecurrentConfig, RecurrentForCausalLM
from tests.benchmarks.measure import Row, Table, clock, interleave, ratio

PROMPTS = (10, 1000)
SHORT, LONG = 2, 22


def build() -> RecurrentForCausalLM:
    """Return a language model of two layers."""
    torch.manual_seed(0)
    config = RecurrentConfig("lstm", vocab_size=1000, hidden_size=256, num_hidden_layers=2, pad_token_id=0)
    return RecurrentForCausalLM(config).eval()


def seconds(model: RecurrentForCausalLM, prompt: torch.Tensor, count: int, *, use_cache: bool) -> float:
    """Return how long it takes to generate ``count`` tokens behind a prompt."""
    began = clock()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        use_cache=use_cache,
    )
    return clock() - began


def a_token(model: RecurrentForCausalLM, prompt: torch.Tensor, *, use_cache: bool) -> Callable[[], float]:
    """Return a function that returns the seconds of one more token."""

    def once() -> float:
        long = seconds(model, prompt, LONG, use_cache=use_cache)
        return (long - seconds(model, prompt, SHORT, use_cache=use_cache)) / (LONG - SHORT)

    return once


def run(quick: bool) -> Table:
    """Generate behind a short and a long prompt, with and without the state."""
    model = build()
    cases = {}
    for length in PROMPTS:
        prompt = torch.randint(1, 1000, (1, length))
        cases[f"carried state, prompt of {length}"] = a_token(model, prompt, use_cache=True)
        cases[f"recomputing, prompt of {length}"] = a_token(model, prompt, use_cache=False)
    samples = interleave(cases, 3 if quick else 15)
    short, long = PROMPTS
    rows: list[Row] = [
        ratio(samples, f"carried state, prompt of {length}", f"recomputing, prompt of {length}") for length in PROMPTS
    ]
    rows += [
        ratio(samples, f"{how}, prompt of {long}", f"{how}, prompt of {short}")
        for how in ("carried state", "recomputing")
    ]
    return Table("Generation: time of one more token", rows)
