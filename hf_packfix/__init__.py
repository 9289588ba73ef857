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

if not TYPE_CHECKING:  # type checkers would accept any name

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # Modules that import torch, on first use: importing this package stays light.
        from hf_packfix import collator, packing

        value = globals()[name] = getattr(collator if name in collator.__all__ else packing, name)
        return value


def __dir__() -> list[str]:
    return __all__


activate_on_import()
del activate_on_import
