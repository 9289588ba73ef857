"""The patches: one file per upstream module, named after it.

To add one: a decorator of ``hf_packfix.engine.declare`` above a function that bears the name of what it replaces, and
a test that fails without it. Every file of this folder is found by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from hf_packfix.engine.declare import Declaration, always, around, declared, files
from hf_packfix.engine.patch import Patch
from hf_packfix.engine.targets import Function

# The Trainer first, then its parts: `status()` lists the patches in this order.
_names = [f"{__name__}.{module.name}" for module in iter_modules(__path__)]
for _name in sorted(_names, key=lambda name: f"{name}~", reverse=True):
    import_module(_name)
    if _name not in files:
        # An empty file of a damaged installation.
        raise ImportError(f"{_name} declares no patch: install hf_packfix again")
if f"{__name__}.transformers_trainer" not in files:
    # A frozen program finds only what the hook in `hf_packfix/pyinstaller` collects.
    raise ImportError(f"{__name__} has no file for transformers.trainer: install hf_packfix again")

#: Every patch that is on by default, in the order in which they are applied.
PATCHES: tuple[Patch, ...] = declared("default")

#: The patches that ``enable(fast_rnn=True)`` and ``HF_PACKFIX_FAST_RNN=1`` ask for.
FAST_RNN: tuple[Patch, ...] = declared("fast_rnn")


# --- the last moment to apply a patch ---------------------------------------------------------------------

# If a third-party import hook loads a module, ours is not called. But every Trainer makes an `Accelerator` when it is
# made, and a `DataLoader` when it is used. These two are wrapped while a patch is pending. They do not change how
# packed batches are handled, and `status()` does not list them.

#: Called when a Trainer is first used; ``hf_packfix.activation`` sets it.
on_first_use: Callable[[], None] = lambda: None  # noqa: E731

_FIRST_USE: Declaration = {
    "parameters": ("self",),
    "problem": "import hooks of other packages may keep ours from running",
    "fix": "applies what is pending when a Trainer is first used",
    "group": "first_use",
}


@around("torch.utils.data.dataloader:DataLoader.__init__", when=always, **_FIRST_USE)
@around("accelerate.accelerator:Accelerator.__init__", when=always, **_FIRST_USE)
def _init(original: Function, self: Any, *args: Any, **kwargs: Any) -> None:
    on_first_use()
    original(self, *args, **kwargs)


FIRST_USE: tuple[Patch, ...] = declared("first_use")
