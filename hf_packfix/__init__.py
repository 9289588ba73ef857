"""Hugging Face Trainers that handle ``torch.nn.utils.rnn.PackedSequence``.

Importing this package activates it: every ``transformers.Trainer`` subclass of the process, defined before
or after, trains on packed batches. It imports neither torch nor transformers itself.
"""

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

__all__ = [
    "HFPackfixWarning",
    "Status",
    "UnsupportedVersionError",
    "__version__",
    "disable",
    "enable",
    "is_enabled",
    "status",
]

activate_on_import()
del activate_on_import
