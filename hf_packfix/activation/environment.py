"""What ``HF_PACKFIX`` and ``HF_PACKFIX_FAST_RNN`` mean.

The same table stands in ``startup/_hf_packfix_boot.py``, which lies outside the package and must not import it.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "HF_PACKFIX"

#: Asks for the recurrent layers as well; alone it activates nothing.
FAST_RNN_VARIABLE = "HF_PACKFIX_FAST_RNN"

#: The accepted values, by what they ask for; case and surrounding blanks do not matter.
ACCEPTED = {
    "on": ("1", "true", "yes", "on"),
    "force": ("force",),
    "off": ("0", "false", "no", "off"),
}


def parse(value: str | None) -> str | None:
    """Return what a value asks for: "on", "force" or "off"; "" for unset or empty; None for anything else."""
    word = (value or "").strip().lower()
    if not word:
        return ""
    return next((asks for asks, words in ACCEPTED.items() if word in words), None)


def raw(variable: str = VARIABLE) -> str | None:
    """Return the variable's value; None if it is unset, or not to be looked at (isolated mode, -I and -E)."""
    return None if sys.flags.ignore_environment else os.environ.get(variable)


def requested(variable: str = VARIABLE) -> str | None:
    """Return what a variable asks for in this process, as :func:`parse` has it; only ``HF_PACKFIX`` has "force"."""
    asks = parse(raw(variable))
    return None if asks == "force" and variable != VARIABLE else asks


def misunderstood(variable: str) -> str:
    """Return what is wrong with the value of a variable; empty if nothing is."""
    if requested(variable) is not None:
        return ""
    words = [word for asks in ACCEPTED if asks != "force" or variable == VARIABLE for word in ACCEPTED[asks]]
    return f"{variable}={raw(variable)!r} is not one of: {', '.join(words)}"
