"""Where PyInstaller finds our hook: what a program that it makes must contain besides the code."""

from pathlib import Path

__all__ = ["hook_dirs"]


def hook_dirs() -> list[str]:
    """Return the folder of the hook, as the entry point ``hook-dirs`` of the group ``pyinstaller40`` does."""
    return [str(Path(__file__).parent)]
