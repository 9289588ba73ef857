"""Time per generated token: the state carried along against recomputing everything, at two prompt lengths.

    python -m tests.benchmarks.generation --json generation.json

Carried state costs one step a token whatever the prompt's length; recomputing costs a step for every token
before. Each figure is the median over interleaved repeats, on one thread, of the difference between a long
and a short continuation, so that reading the prompt once does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_packfix.models import RecurrentConfig, RecurrentForCausalLM

PROMPTS = (10, 1000)
SHORT, LONG = 2, 22


def build() -> RecurrentForCausalLM:
    torch.manual_seed(0)
    config = RecurrentConfig("lstm", vocab_size=1000, hidden_size=256, num_hidden_layers=2, pad_token_id=0)
    return RecurrentForCausalLM(config).eval()


def seconds(model: RecurrentForCausalLM, prompt: torch.Tensor, count: int, *, use_cache: bool) -> float:
    """Return how long it takes to generate ``count`` tokens behind a prompt."""
    began = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        use_cache=use_cache,
    )
    return time.perf_counter() - began


def measure(repeats: int) -> list[dict[str, float | int]]:
    """Return one row a prompt length, times in milliseconds a token."""
    model = build()
    prompts = {length: torch.randint(1, 1000, (1, length)) for length in PROMPTS}
    cases = [(length, use_cache) for length in PROMPTS for use_cache in (True, False)]
    times: dict[tuple[int, bool], list[float]] = {case: [] for case in cases}
    for repeat in range(repeats + 1):
        for length, use_cache in cases:
            long = seconds(model, prompts[length], LONG, use_cache=use_cache)
            short = seconds(model, prompts[length], SHORT, use_cache=use_cache)
            if repeat:  # The first round warms up.
                times[length, use_cache].append(1e3 * (long - short) / (LONG - SHORT))
    rows: list[dict[str, float | int]] = []
    for length in PROMPTS:
        carried, recomputed = (statistics.median(times[length, use_cache]) for use_cache in (True, False))
        rows.append(
            {
                "prompt_length": length,
                "carried_ms": round(carried, 3),
                "recomputed_ms": round(recomputed, 3),
                "ratio": round(recomputed / carried, 2),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description="Time per generated token, carried state against recomputing.")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds (default: 7)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = measure(options.repeats)
    print("| prompt length | carried state (ms/token) | recomputing (ms/token) | recomputing / carried |")
    print("|---:|---:|---:|---:|")
    for row in rows:
        print("| {prompt_length} | {carried_ms} | {recomputed_ms} | {ratio} |".format(**row))
    first, last = rows[0]["carried_ms"], rows[-1]["carried_ms"]
    print(f"\ncarried state, {PROMPTS[-1]} against {PROMPTS[0]}: {last / first:.2f} times")
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
