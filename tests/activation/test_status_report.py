"""What ``status()`` shows: a line as ``repr``, a table in a notebook, and the truth after an autoreload."""

from __future__ import annotations

import importlib
import sys
from xml.etree import ElementTree

import pytest

import hf_packfix
from hf_packfix.patches import PATCHES


def test_the_repr_is_a_line():
    shown = repr(hf_packfix.status())
    assert shown.startswith("<Status: hf_packfix is enabled: activated by ")
    assert " applied" in shown
    assert "\n" not in shown
    assert len(shown) < 200


def test_a_notebook_shows_a_table():
    page = hf_packfix.status()._repr_html_()
    rows = ElementTree.fromstring(f"<div>{page.replace('<br>', '<br/>')}</div>").findall(".//tbody/tr")
    shown = {row.find("td/code").text: row.find("td").text for row in rows}
    assert shown == {patch.target: patch.state for patch in hf_packfix.status().patches}
    assert PATCHES[0].target in shown


@pytest.mark.parametrize("name", ["control", "environment", "versions"])
def test_a_module_of_ours_that_is_loaded_again_knows_what_it_knew(name):
    module = sys.modules[f"hf_packfix.activation.{name}"]
    importlib.reload(module)  # as IPython's autoreload does
    assert hf_packfix.is_enabled()
    assert hf_packfix.status().enabled
    hf_packfix.disable()
    assert not hf_packfix.is_enabled()
    hf_packfix.enable()
    assert hf_packfix.is_enabled()
