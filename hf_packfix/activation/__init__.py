"""Turning the patches on and off, and what is known about where they stand. Imports neither torch nor transformers.

``control.py`` has what users call, ``applying.py`` applies patches as modules are imported, ``messages.py`` logs and
warns; ``environment.py`` reads the environment variables, ``versions.py`` the installed versions.
"""

from hf_packfix.activation.control import (
    activate_on_import,
    disable,
    enable,
    enable_for_run,
    is_enabled,
    status,
)
from hf_packfix.activation.messages import difference
from hf_packfix.activation.status_report import Status

__all__ = [
    "Status",
    "activate_on_import",
    "difference",
    "disable",
    "enable",
    "enable_for_run",
    "is_enabled",
    "status",
]
