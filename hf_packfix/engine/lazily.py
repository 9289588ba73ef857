"""Modules for the patches, imported when first used.

``status()`` lists every patch in a process that has loaded neither torch nor transformers, so a patch file must not
import them. It gets them from here instead: ``from hf_packfix.engine.lazily import packing, torch``.
"""

from __future__ import annotations

import types
from importlib import import_module
from typing import TYPE_CHECKING, Any


class _LazyModule(types.ModuleType):
    """Stands for the module of its name, which it does not replace in ``sys.modules``."""

    def __getattr__(self, name: str) -> Any:
        module = import_module(self.__name__)
        # From now on its names are plain attributes here, as fast as the module's own.
        vars(self).update({key: value for key, value in vars(module).items() if not key.startswith("__")})
        return getattr(module, name)


if TYPE_CHECKING:
    import torch as torch

    from hf_packfix import evaluation as evaluation
    from hf_packfix import packing as packing
    from hf_packfix import rnn as rnn
else:
    evaluation = _LazyModule("hf_packfix.evaluation")
    packing = _LazyModule("hf_packfix.packing")
    rnn = _LazyModule("hf_packfix.rnn")
    torch = _LazyModule("torch")
