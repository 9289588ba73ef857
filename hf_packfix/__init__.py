"""Hugging Face Trainers that handle ``torch.nn.utils.rnn.PackedSequence``.

Importing this package activates it: every ``transformers.Trainer`` subclass of the process, defined before
or after, trains on packed batches. It imports neither torch nor transformers itself.
"""

from typing import TYPE_CHECKING

from hf_packfix._version import __version__
from hf_packfix._warnings import HFPackfixWarning
from hf_packfix.activation.control import activate_on_import, disable, disabled, enable, is_enabled, status
from hf_packfix.activation.status_report import Status
from hf_packfix.activation.versions import UnsupportedVersionError

if TYPE_CHECKING:
    from hf_packfix.collator import DataCollatorForPackedSequence
    from hf_packfix.packing.jagged import concatenate, from_jagged, take, to_jagged
    from hf_packfix.packing.packed import batch_size, lengths, num_tokens, pad, with_data
    from hf_packfix.packing.windows import Window, windows

__all__ = [
    "DataCollatorForPackedSequence",
    "HFPackfixWarning",
    "Status",
    "UnsupportedVersionError",
    "Window",
    "__version__",
    "batch_size",
    "concatenate",
    "disable",
    "disabled",
    "enable",
    "from_jagged",
    "is_enabled",
    "lengths",
    "num_tokens",
    "pad",
    "status",
    "take",
    "to_jagged",
    "windows",
    "with_data",
]

# Public names whose modules import torch, loaded on first use: importing this package stays light.
_LAZY = {
    "DataCollatorForPackedSequence": "collator",
    "Window": "packing.windows",
    "batch_size": "packing.packed",
    "concatenate": "packing.jagged",
    "from_jagged": "packing.jagged",
    "lengths": "packing.packed",
    "num_tokens": "packing.packed",
    "pad": "packing.packed",
    "take": "packing.jagged",
    "to_jagged": "packing.jagged",
    "windows": "packing.windows",
    "with_data": "packing.packed",
}


if not TYPE_CHECKING:  # type checkers would accept any name

    def __getattr__(name):
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
        return value


def __dir__() -> list[str]:
    return __all__


activate_on_import()
del activate_on_import
