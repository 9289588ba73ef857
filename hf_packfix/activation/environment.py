"""What ``HF_PACKFIX`` and ``HF_PACKFIX_FAST_RNN`` mean.

The same table stands in ``startup/_hf_packfix_boot.py``, which lies outside the package and must not import it.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "HF_PACKFIX"

#: Asks for the recurrent layers on a CPU as well; alone it activates nothing.
FAST_RNN_VARIABLE = "HF_PACKFIX_FAST_RNN"

#: The accepted values, by what they ask for; case and surrounding blanks do not matter.
ACCEPTED = {
    "on": ("1", "true", "yes", "on"),
    "force": ("force",),
    "off": ("0", "false", "no", "off"),
}


def meaning(value: str | None) -> str | None:
    """Return what a value asks for: "on", "force" or "off"; "" for unset or empty; None for anything else."""
    word = (value or "").strip().lower()
    if not word:
        return ""
    return next((asks for asks, words in ACCEPTED.items() if word in words), None)


def value(variable: str = VARIABLE) -> str | None:
    """Return the variable's value; None where it is unset, or not to be looked at (isolated mode, -I and -E)."""
    return None if sys.flags.ignore_environment else os.environ.get(variable)


def switch() -> str | None:
    """Return what ``HF_PACKFIX`` asks for in this process, as :func:`meaning` has it."""
    return meaning(value())


def fast_rnn() -> bool | None:
    """Return whether ``HF_PACKFIX_FAST_RNN`` is on; None for a value that is neither on nor off."""
    asks = meaning(value(FAST_RNN_VARIABLE))
    return None if asks in (None, "force") else asks == "on"


def misunderstood(variable: str) -> str:
    """Return what is wrong with the value of a variable; empty if it has a meaning."""
    asks = meaning(value(variable))
    if asks is not None and (asks != "force" or variable == VARIABLE):
        return ""
    groups = ("on", "force", "off") if variable == VARIABLE else ("on", "off")
    accepted = ", ".join(word for group in groups for word in ACCEPTED[group])
    return f"{variable}={value(variable)!r} is not one of: {accepted}"
