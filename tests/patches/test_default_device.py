"""``torch.set_default_device``: the package's own tensors are on the devices that they are meant for.

There is no other device than the CPU everywhere, and nothing, padded or packed, trains under "meta": torch's own data
loader fails. So training runs under a mode that raises where the package makes a tensor without naming a device.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import hf_packfix
from hf_packfix import DataCollatorForPackedSequence
from hf_packfix.models import (
    RecurrentConfig,
    RecurrentEncoderDecoder,
    RecurrentEncoderDecoderConfig,
    RecurrentForCausalLM,
)
from tests.support.oracle import (
    Tagger,
    assert_same_run,
    packed_batch,
    padded_batch,
    rows,
    stock,
    train,
)
from tests.support.reports import assert_same_report, report

PACKAGE = Path(hf_packfix.__file__).parent
#: Programs of their own, whose tensors are on the default device as a user's are.
PROGRAMS = {"demo", "selftest.py", "trial.py"}


class NoDefaultDevice(TorchFunctionMode):
    """Raise where the package makes a tensor on the default device, whatever that is."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _device_constructors() and kwargs.get("device") is None:
            caller = sys._getframe(1)
            if Path(caller.f_code.co_filename).is_relative_to(PACKAGE):
                place = f"{caller.f_code.co_filename}:{caller.f_lineno}"
                raise AssertionError(f"{place}: {function.__name__} is on the default device; name one")
        return function(*args, **kwargs)


def test_the_mode_refuses_what_names_no_device():
    careless = compile(
        "import torch\ndef make(**options): return torch.zeros(2, **options)", PACKAGE / "careless.py", "exec"
    )
    names: dict[str, Any] = {}
    exec(careless, names)
    with NoDefaultDevice():
        torch.zeros(2)
        names["make"](device="cpu")
        with pytest.raises(AssertionError, match=r"careless.py:2: zeros is on the default device"):
            names["make"]()


def test_every_tensor_of_the_package_names_its_device():
    # In the code, too: torch turns `hf_packfix.rnn` off under any mode, and under a default device.
    names = {function.__name__ for function in _device_constructors()} - {"__init__"}
    found = []
    for path in PACKAGE.rglob("*.py"):
        if {*PROGRAMS, "docs"} & {*path.relative_to(PACKAGE).parts}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
                named = any(keyword.arg in ("device", None) for keyword in node.keywords)
                if of_torch and node.func.attr in names and not named:
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: torch.{node.func.attr}")
    assert found == []


# --- the Trainer ----------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "evaluated between the steps": {"eval_strategy": "steps", "eval_steps": 3},
    "accumulated and smoothed": {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1},
    "with inputs for metrics": {"include_for_metrics": ["inputs"]},
    "counting tokens": {"include_num_input_tokens_seen": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_and_evaluation(tmp_path, options):
    def run(collate: Any) -> tuple[Any, Any]:
        return train(tmp_path, Tagger, rows(), collate, **options), report(tmp_path, Tagger, collate, rows())

    with NoDefaultDevice():
        packed, reported = run(packed_batch)
        with stock():
            padded, expected = run(padded_batch)
    assert_same_run(packed, padded)
    assert_same_report(reported, expected)


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


# --- models ---------------------------------------------------------------------------------------------


def causal(kind: Any) -> Any:
    torch.manual_seed(0)
    return RecurrentForCausalLM(RecurrentConfig(kind, vocab_size=17, hidden_size=6, num_hidden_layers=2))


def encoder_decoder(kind: Any) -> Any:
    torch.manual_seed(0)
    words = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return RecurrentEncoderDecoder(RecurrentEncoderDecoderConfig(kind, vocab_size=17, hidden_size=6, **words))


def tokens(count: int = 9) -> list[dict[str, Any]]:
    ids = [row["input_ids"] for row in rows(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("build", [causal, encoder_decoder])
@pytest.mark.parametrize("collate", [packed_batch, padded_batch], ids=["packed", "padded"])
def test_our_models(tmp_path, build, cell, collate):
    def run(directory: Path) -> tuple[Any, float, Any]:
        found = train(directory, build(cell), tokens(), collate, gradient_accumulation_steps=2)
        ids = padded_batch(tokens(3))
        prompt = {key: ids[key] for key in ("input_ids", "attention_mask")}
        generated = found.trainer.model.generate(**prompt, max_new_tokens=4, do_sample=False)
        return found, found.trainer.evaluate()["eval_loss"], generated

    with NoDefaultDevice():
        found, loss, generated = run(tmp_path)
    expected, expected_loss, expected_generated = run(tmp_path)
    assert_same_run(found, expected)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert torch.equal(generated, expected_generated)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_our_layers_under_a_default_device(kind):
    torch.manual_seed(0)
    layer = getattr(hf_packfix.rnn, kind)(3, 4, num_layers=2)
    values = [torch.randn(n, 3) for n in (9, 12, 7)]
    packed = torch.nn.utils.rnn.pack_sequence(values, enforce_sorted=False)

    def run() -> list[torch.Tensor]:
        layer.zero_grad()
        states, _ = layer(packed)
        states.data.square().sum().backward()
        return [states.data.detach(), *(parameter.grad.clone() for parameter in layer.parameters())]

    expected = run()
    with torch.device("meta"):
        found = run()
    torch.testing.assert_close(found, expected)
