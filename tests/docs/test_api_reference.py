"""The API reference is what the docstrings say."""

from __future__ import annotations

from tests.tools.api_reference import PAGE, reference


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python -m tests.tools.api_reference"


def test_every_entry_says_something():
    for entry in reference().split("\n### ")[1:]:
        assert len(entry.split("```")[2].strip()) > 20, entry
