"""What this process knows about hf_packfix: one object, and the lock around it."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from hf_packfix._warnings import warn_once

__all__ = ["State", "state"]


@dataclass
class State:
    """What changes while the process runs.

    Attributes:
        lock: held while patches are applied or reverted. Reentrant: applying a patch imports torch, which may call
            another of our import hooks.
        activated_by: what turned hf_packfix on; None while it is off.
        why_inactive: why it is off.
        fast_rnn: whether the patches of the recurrent layers are asked for.
        hooked: modules with an import hook of ours.
        loaded: modules whose import hook was called, and whose patches are still to be applied; "" for a Trainer that
            is first used.
        torch_is_loaded: whether torch is loaded to its last line.
        failures: errors that were logged.
        announced: whether the line about the patched Trainer was logged.
        report: how differences upstream are reported; set by ``enable``.
    """

    lock: threading.RLock = field(default_factory=threading.RLock)
    activated_by: str | None = None
    why_inactive: str = "hf_packfix.enable() was not called"
    fast_rnn: bool = False
    hooked: set[str] = field(default_factory=set)
    loaded: deque[str] = field(default_factory=deque)
    torch_is_loaded: bool = False
    failures: set[str] = field(default_factory=set)
    announced: bool = False
    report: Callable[[str], None] = warn_once

    def renew_lock(self) -> None:
        """Forget who holds the lock."""
        self.lock = threading.RLock()


# `importlib.reload` and IPython's autoreload run this file again: what is known must stay.
state: State = globals().get("state") or State()

# Another thread may hold the lock while this one forks; in the child it would never be released.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: state.renew_lock())
