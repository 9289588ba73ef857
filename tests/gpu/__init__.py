"""Tests on a GPU: ``pytest -m gpu``."""
