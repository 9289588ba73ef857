"""What ``hf-packfix docs api`` prints: every public name, its call and its docstring."""

from __future__ import annotations

import importlib
import inspect

from hf_packfix.commands.pages import MODULES, reference
from hf_packfix.models import RecurrentConfig

PAGE = reference()


def test_every_public_name_has_an_entry_that_says_something():
    public = {f"{name}.{word}" for name in MODULES for word in importlib.import_module(name).__all__}
    entries = [entry.split("\n", 1) for entry in PAGE.split("\n### ")[1:]]
    assert {title for title, _ in entries} == public - {"hf_packfix.__version__"}
    for title, text in entries:
        assert len(text.split("```")[2].strip()) > 20, title


def test_an_entry_is_the_call_and_the_docstring():
    text = "batch_size(packed: PackedSequence) -> int\n```\n\nReturn B, the number of sequences.\n"
    assert f"\n### hf_packfix.batch_size\n\n```text\n{text}" in PAGE
    call = PAGE.split("### hf_packfix.models.RecurrentConfig\n\n```text\n")[1].split("\n```")[0]
    assert "\n    cell_type: str = 'gru',\n    vocab_size: int | None = None,\n" in call
    assert inspect.cleandoc(RecurrentConfig.__doc__ or "").split("Example:")[0].replace("``", "`") in PAGE
    assert "\n#### hf_packfix.models.RecurrentForCausalLM.labels_in_loss\n" in PAGE
