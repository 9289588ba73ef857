"""What ``HF_PACKFIX`` means."""

from __future__ import annotations

#: The accepted values, by what they ask for; case and surrounding blanks do not matter.
ACCEPTED = {
    "on": ("1", "true", "yes", "on"),
    "force": ("force",),
    "off": ("0", "false", "no", "off"),
}


def meaning(value: str | None) -> str | None:
    """Return what a value of ``HF_PACKFIX`` asks for.

    Returns:
        "on", "force" or "off"; "" where it is unset or empty; None where it is not an accepted value.
    """
    word = (value or "").strip().lower()
    if not word:
        return ""
    return next((asks for asks, words in ACCEPTED.items() if word in words), None)
