"""Hugging Face Trainers that handle ``torch.nn.utils.rnn.PackedSequence``.

Importing this package activates it: every ``transformers.Trainer`` subclass of the process, defined before
or after, trains on packed batches. It imports neither torch nor transformers itself.
"""

from typing import TYPE_CHECKING, Any

from hf_packfix._version import __version__
from hf_packfix.activation import (
    HFPackfixWarning,
    Status,
    activate_on_import,
    disable,
    enable,
    is_enabled,
    status,
)
from hf_packfix.versions import UnsupportedVersionError

if TYPE_CHECKING:
    from hf_packfix.collator import DataCollatorForPackedSequence

__all__ = [
    "DataCollatorForPackedSequence",
    "HFPackfixWarning",
    "Status",
    "UnsupportedVersionError",
    "__version__",
    "disable",
    "enable",
    "is_enabled",
    "status",
]


def __getattr__(name: str) -> Any:
    # The collator needs torch, which importing this package must not import.
    if name == "DataCollatorForPackedSequence":
        from hf_packfix.collator import DataCollatorForPackedSequence

        return DataCollatorForPackedSequence
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


activate_on_import()
del activate_on_import
