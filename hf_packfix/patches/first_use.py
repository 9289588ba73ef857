"""Where a Trainer is used for the first time: the last moment to apply the patches of a module whose hook never ran.

Of a module that a foreign import hook loads, ours hears nothing. But every Trainer makes an ``Accelerator`` when it is
made, and a ``DataLoader`` when it is used. These two are wrapped while a patch is pending. They change nothing of what
a Trainer does with packs, and are not among the patches that ``status()`` lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_packfix.patches.patch import Function, Patch, patch

__all__ = ["PATCHES"]

#: Called before the original; ``hf_packfix.activation`` sets it.
before: Callable[[], None] = lambda: None  # noqa: E731


def _call_before(original: Function, patch: Patch) -> Function:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if patch.active:
            before()
        original(self, *args, **kwargs)

    return __init__


PATCHES = tuple(
    patch(target, reason="import hooks of others may keep ours from running", parameters=("self",))(_call_before)
    for target in ("accelerate.accelerator:Accelerator.__init__", "torch.utils.data.dataloader:DataLoader.__init__")
)
