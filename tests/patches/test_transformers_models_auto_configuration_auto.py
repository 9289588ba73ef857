"""Asking for the model type of a saved recurrent model imports what it needs."""

from __future__ import annotations

import sys

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_packfix.models import RecurrentConfig, RecurrentEncoderDecoderConfig


@pytest.mark.needs_patch("transformers.models.auto.configuration_auto:_LazyConfigMapping.__contains__")
def test_asking_for_a_model_type_registers_it(monkeypatch):
    for name in ("recurrent", "recurrent-encoder-decoder"):
        monkeypatch.delitem(CONFIG_MAPPING._extra_content, name)
    monkeypatch.delitem(sys.modules, "hf_packfix.models")
    assert "bert" in CONFIG_MAPPING
    assert "unknown" not in CONFIG_MAPPING
    assert "hf_packfix.models" not in sys.modules
    config = AutoConfig.for_model("recurrent-encoder-decoder", vocab_size=3, pad_token_id=0)
    assert type(config) is RecurrentEncoderDecoderConfig
    assert type(AutoConfig.for_model("recurrent", vocab_size=3)) is RecurrentConfig
