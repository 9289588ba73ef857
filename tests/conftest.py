"""What every test needs: an offline hub, one thread, and the plugin switched on."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("HF_PACKFIX", None)
os.environ.pop("HF_PACKFIX_FAST_RNN", None)

import pytest
import torch

import hf_packfix

pytest_plugins = ["tests.support.needed"]

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    """Start every test with the plugin on, whatever the test before it did."""
    hf_packfix.enable()
    yield
    hf_packfix.enable()
