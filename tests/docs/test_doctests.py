"""The examples in the docstrings print what they say, and every public function has one."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest

import hf_packfix
from hf_packfix import models, rnn

#: What is not a function of batches: switches, results and errors.
WITHOUT = {"HFPackfixWarning", "Status", "UnsupportedVersionError", "Window", "__version__"}
WITHOUT |= {"disable", "enable", "is_enabled", "status"}
WITHOUT |= {"RecurrentCache", "RecurrentModelOutput", "RecurrentPreTrainedModel", "RecurrentEncoderDecoderConfig"}
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (hf_packfix, models, rnn)
    for name in module.__all__
    if name not in WITHOUT
}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_prints_what_it_says(name):
    thing = PUBLIC[name]
    scope = dict(vars(importlib.import_module(thing.__module__)))
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(thing) or "", scope, name, None, 0)
    assert examples.examples, "no example"
    output: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=output.append)
    assert output == []
