"""The first use of a Trainer: the last moment to apply the patches of a module whose import hook never ran.

If a third-party import hook loads a module, ours is not called. But every Trainer makes an ``Accelerator`` when it is
made, and a ``DataLoader`` when it is used. These two are wrapped while a patch is pending. They do not change how
packed batches are handled, and are not among the patches that ``status()`` lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_packfix.engine.declare import Declaration, always, around, declared
from hf_packfix.engine.patch import Patch
from hf_packfix.engine.targets import Function

#: Called before the original; ``hf_packfix.activation`` sets it.
before: Callable[[], None] = lambda: None  # noqa: E731

_DECLARATION: Declaration = {
    "parameters": ("self",),
    "problem": "import hooks of other packages may keep ours from running",
    "fix": "applies what is pending when a Trainer is first used",
    "group": "first_use",
}


@around("torch.utils.data.dataloader:DataLoader.__init__", when=always, **_DECLARATION)
@around("accelerate.accelerator:Accelerator.__init__", when=always, **_DECLARATION)
def call_before(original: Function, self: Any, *args: Any, **kwargs: Any) -> None:
    """Call :data:`before`, then the original."""
    before()
    original(self, *args, **kwargs)


FIRST_USE: tuple[Patch, ...] = declared("first_use")
