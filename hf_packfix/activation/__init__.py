"""Turning the patches on and off, and what is known about where they stand. Imports neither torch nor transformers.

``control.py`` turns them on and off, and applies them as modules are imported; ``environment.py`` reads the
environment variables, ``versions.py`` the installed versions.
"""
