from __future__ import annotations

import pytest

from hf_packfix.rnn.coverage import _is_known


@pytest.fixture(autouse=True)
def always_faster(monkeypatch) -> None:
    """Run our operators whatever the cost model says: the packings of these tests are small."""
    if not _is_known:
        pytest.skip("this torch lacks a name of LEANS_ON: everything is left to torch")
    monkeypatch.setattr("hf_packfix.rnn.stack.has_enough_steps", lambda *_: True)
    monkeypatch.setattr("hf_packfix.rnn.stack.is_one_block", lambda *_: False)
