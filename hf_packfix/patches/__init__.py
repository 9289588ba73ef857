"""The patches: one file per upstream module, named after it.

To add one: a decorator of ``hf_packfix.engine.declare`` above a function that bears the name of what it replaces, and
a test that fails without it. Every file of this folder is found by itself.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from hf_packfix.engine.declare import declared, files
from hf_packfix.engine.patch import Patch

# The Trainer first, then its parts: `status()` lists the patches in this order.
_names = [f"{__name__}.{module.name}" for module in iter_modules(__path__)]
for _name in sorted(_names, key=lambda name: f"{name}~", reverse=True):
    import_module(_name)
    if _name not in files:
        # An empty file of a damaged installation.
        raise ImportError(f"{_name} declares no patch: install hf_packfix again")

#: Every patch that is on by default, in the order in which they are applied.
PATCHES: tuple[Patch, ...] = declared("default")

#: The patches that ``enable(fast_rnn=True)`` and ``HF_PACKFIX_FAST_RNN=1`` ask for.
FAST_RNN: tuple[Patch, ...] = declared("fast_rnn")
