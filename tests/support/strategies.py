"""Packed sequences for property-based tests."""

from __future__ import annotations

import os

from hypothesis import settings
from hypothesis import strategies as st

PROPERTIES = 5
EXAMPLES = os.environ.get("HF_PACKFIX_EXAMPLES")

attack = settings(
    max_examples=int(EXAMPLES or 400) // PROPERTIES, derandomize=EXAMPLES is None, deadline=None, database=None
)


all_lengths = st.one_of(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 5).map(lambda n: [1] * n))
