"""Programs in a process of their own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from tests.support import interpreters


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=interpreters.environment() | environment,
        timeout=300,
        check=False,
    )


TRAINS = """
from torch.nn.utils.rnn import pack_sequence
import torch, types
t = Trainer.__new__(Trainer)
t.args = types.SimpleNamespace(device=torch.device("meta"), _n_gpu=1)
t.is_deepspeed_enabled = False
p = pack_sequence([torch.ones(1), torch.ones(2)], enforce_sorted=False)
assert t._prepare_input({"x": p})["x"].data.device.type == "meta"
import hf_packfix
assert hf_packfix.is_enabled()
states = {p.state for p in hf_packfix.status().patches if not p.target.startswith("torch.nn.modules.rnn:")}
assert "applied" in states <= {"applied", "not-needed", "not-applicable"}, str(hf_packfix.status())
"""
