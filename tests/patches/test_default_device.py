"""``torch.set_default_device``: the package's own tensors are on the devices that they are meant for."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors

import hf_packfix
from hf_packfix import DataCollatorForPackedSequence

PACKAGE = Path(hf_packfix.__file__).parent
#: Programs of their own, whose tensors are on the default device as a user's are.
PROGRAMS = {"demo.py", "selftest.py", "trainers.py"}


def unnamed(source: str) -> list[int]:
    """Return the lines in which a tensor is made on the default device, whatever that is."""
    names = {function.__name__ for function in _device_constructors()} - {"__init__"}
    nodes = list(ast.walk(ast.parse(source)))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "torch"]
    makers = {alias.name for node in imports for alias in node.names if alias.name in names}
    makers |= {f"torch.{name}" for name in names}
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) in makers]
    return sorted(node.lineno for node in calls if not any(keyword.arg == "device" for keyword in node.keywords))


def test_a_tensor_that_names_no_device_is_found():
    assert unnamed("import torch\ntorch.zeros(2, device=None)\ntorch.zeros(2)\ntorch.tensor(1, **options)") == [3, 4]
    assert unnamed("from torch import Tensor, zeros\nzeros(2)\nTensor(2)\nzeros(2, device='cpu')") == [2]


def test_every_tensor_of_the_package_names_its_device():
    # In the code: torch's own layers run under any mode, such as a default device.
    paths = [path for path in PACKAGE.rglob("*.py") if not {*PROGRAMS, "docs"} & {*path.relative_to(PACKAGE).parts}]
    assert {path: lines for path in paths if (lines := unnamed(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_a_batch_of_our_collator_is_on_the_cpu(make):
    features = [
        {"input_ids": make(ids), "labels": len(ids), "attention_mask": [1] * len(ids)} for ids in ([1, 2], [3])
    ]
    expected = DataCollatorForPackedSequence(keep_attention_mask=True)(features)
    with torch.device("meta"):
        found = DataCollatorForPackedSequence(keep_attention_mask=True)(features)
    assert torch.equal(found["labels"], expected["labels"])
    for key in ("input_ids", "attention_mask"):
        for mine, other in zip(found[key], expected[key], strict=True):
            assert mine.device.type == "cpu"
            assert torch.equal(mine, other)


def test_what_is_a_tensor_stays_on_its_device():
    class Subclass(torch.Tensor):
        pass

    elsewhere = torch.ones(3, device="meta").as_subclass(Subclass)
    batch = DataCollatorForPackedSequence()([{"input_ids": torch.ones(2, device="meta")}, {"input_ids": elsewhere}])
    assert batch["input_ids"].data.device.type == "meta"
