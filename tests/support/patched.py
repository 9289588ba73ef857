"""The patches by their targets, for tests of one of them."""

from __future__ import annotations

from hf_packfix.engine.patch import Patch
from hf_packfix.patches import FAST_RNN, PATCHES


def patch_of(target: str) -> Patch:
    """Return the patch of ``module:path``."""
    (found,) = [patch for patch in PATCHES + FAST_RNN if patch.target == target]
    return found
