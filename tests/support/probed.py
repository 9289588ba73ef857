"""The patches that have a probe, and their wrappers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import hf_packfix
from hf_packfix.engine.patch import Patch
from hf_packfix.engine.targets import resolve
from hf_packfix.patches import PATCHES
from tests.tools import drift

# What `get_batch_samples` has for a probe asks about the methods around it.
PROBED = [
    patch
    for patch in PATCHES
    if patch.upstream_supports is not None
    and drift.state_here(patch) == "applied"
    and patch.path != "Trainer.get_batch_samples"
]


def wrapper_of(patch: Patch) -> Any:
    import_module(patch.module)
    hf_packfix.enable()
    assert patch.active
    return resolve(patch.module, patch.path)[1]
