"""Recurrent layers and models on a GPU: cuDNN, what ``hf_packfix.rnn`` leaves to torch, and ``generate``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import hf_packfix
import hf_packfix.rnn
from hf_packfix.models import (
    RecurrentEncoderDecoder,
    RecurrentForCausalLM,
    RecurrentForSequenceClassification,
    RecurrentForTokenClassification,
)
from tests.gpu.device import DEVICE, ON_GPU
from tests.support import layouts
from tests.support.layouts import LAYOUTS, arrange, sequences_of, tokens

pytestmark = pytest.mark.gpu

LENGTHS = (12, 30, 7, 30, 1)
#: Of float32 results that two kernels, or two devices, sum in another order.
# cuDNN adds in another order from run to run.
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
SHAPES: list[dict[str, Any]] = [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}]


@pytest.fixture(params=["torch", "hf_packfix.rnn", "fast_rnn=True"])
def layers(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Return a namespace with LSTM, GRU and RNN."""
    if request.param == "fast_rnn=True":
        hf_packfix.enable(fast_rnn=True)
    yield hf_packfix.rnn if request.param == "hf_packfix.rnn" else nn
    hf_packfix.enable(fast_rnn=False)


def final_states(states: Any) -> Tensor:
    """Return the hidden states ``[L, B, H]`` of a layer."""
    return states[0] if isinstance(states, tuple) else states


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_packed_equals_each_sequence_alone(layers: Any, cell: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = getattr(layers, cell)(6, 8, **options).to(DEVICE)
    alone = getattr(nn, cell)(6, 8, **options).to(DEVICE)
    alone.load_state_dict(layer.state_dict())
    rows = [torch.randn(length, 6, device=DEVICE) for length in LENGTHS]
    packed = pack_sequence(rows, enforce_sorted=False)
    assert not ON_GPU or torch.backends.cudnn.is_acceptable(packed.data)
    output, states = layer(packed)
    output.data.square().sum().backward()
    assert output.data.device == DEVICE
    for number, (row, found) in enumerate(zip(rows, sequences_of(output, None), strict=True)):
        expected, last = alone(row[None] if layer.batch_first else row[:, None])
        torch.testing.assert_close(found, expected.flatten(0, 1), **CLOSE)
        torch.testing.assert_close(final_states(states)[:, number], final_states(last)[:, 0], **CLOSE)
        expected.square().sum().backward()
    for name, weight in alone.named_parameters():
        torch.testing.assert_close(layer.get_parameter(name).grad, weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not ON_GPU, reason="on a CPU these layers are not left to torch")
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_layers_on_a_gpu_are_left_to_torch(cell: str) -> None:
    torch.manual_seed(0)
    layer = getattr(nn, cell)(6, 8).to(DEVICE)
    packed = pack_sequence([torch.randn(length, 6, device=DEVICE) for length in LENGTHS], enforce_sorted=False)
    assert hf_packfix.rnn.run(layer, packed) is None
    ours = getattr(hf_packfix.rnn, cell)(6, 8).to(DEVICE)
    assert type(ours(packed)[0].data.grad_fn) is type(layer(packed)[0].data.grad_fn)


TOKENS = tokens((4, 9, 1, 6, 2), low=2, high=17)


def new_model(kind: Any, cell: str) -> Any:
    """Return a model on the CPU, whose scores are far apart and depend on what it read."""
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    model = layouts.new_model(kind, cell, 2, vocab_size=17, hidden_size=12, num_labels=4, **special).eval()
    if kind is not RecurrentEncoderDecoder:
        with torch.no_grad():
            model.recurrent.embeddings.weight.mul_(20)
            for parameter in model.recurrent.rnn.parameters():
                parameter.mul_(2)
    return model


def run(model: Any, layout: str, device: torch.device) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Return the loss, the logits of every sequence, and the gradients, on the CPU."""
    model = copy.deepcopy(model).to(device)
    inputs, mask = arrange(layout, TOKENS)
    if isinstance(model, RecurrentForSequenceClassification):
        labels = torch.tensor([0, 2, 1, 3, 3])
    elif isinstance(model, RecurrentForTokenClassification):
        labels = arrange(layout, [ids % 4 for ids in TOKENS], fill=-100)[0]
    else:
        labels = arrange(layout, TOKENS, fill=-100)[0]
    inputs, labels = inputs.to(device), labels.to(device)
    mask = None if mask is None else mask.to(device)
    output = model(inputs, attention_mask=mask, labels=labels)
    assert output.loss.device == device
    output.loss.backward()
    is_row = isinstance(output.logits, Tensor) and output.logits.dim() == 2
    logits = [output.logits] if is_row else sequences_of(output.logits, mask)
    gradients = {name: weight.grad.cpu() for name, weight in model.named_parameters() if weight.grad is not None}
    return output.loss.detach().cpu(), [value.detach().cpu() for value in logits], gradients


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "kind", [RecurrentForCausalLM, RecurrentForTokenClassification, RecurrentForSequenceClassification]
)
def test_a_model_computes_what_it_computes_on_a_cpu(kind: Any, layout: str, cell: str) -> None:
    model = new_model(kind, cell)
    model.train()
    loss, logits, gradients = run(model, layout, DEVICE)
    expected_loss, expected_logits, expected_gradients = run(model, "right", torch.device("cpu"))
    torch.testing.assert_close(loss, expected_loss, **CLOSE)
    torch.testing.assert_close(logits, expected_logits, **CLOSE)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generate(cell: str, layout: str, options: dict[str, Any]) -> None:
    model = new_model(RecurrentForCausalLM, cell)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
        for parameter in model.recurrent.rnn.parameters():
            parameter.mul_(2)
    inputs, mask = arrange(layout, TOKENS)
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    expected = model.generate(inputs, attention_mask=mask, **options)
    mask = None if mask is None else mask.to(DEVICE)
    found = model.to(DEVICE).generate(inputs.to(DEVICE), attention_mask=mask, **options)
    assert found.device == DEVICE
    assert found.tolist() == expected.tolist()
    assert len({tuple(row[-8:]) for row in found.tolist()}) > 1  # not the same for every prompt


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_an_encoder_decoder_generates(cell: str) -> None:
    model = new_model(RecurrentEncoderDecoder, cell)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    sources = pack_sequence(TOKENS, enforce_sorted=False)
    targets = pack_sequence(tokens((4, 9, 1, 6, 2), seed=1, low=2, high=17), enforce_sorted=False)
    expected = model.generate(sources, max_new_tokens=8, do_sample=False)
    expected_loss = model(sources, labels=targets).loss
    model.to(DEVICE)
    loss = model(sources.to(DEVICE), labels=targets.to(DEVICE)).loss
    assert loss.device == DEVICE
    torch.testing.assert_close(loss.cpu(), expected_loss, **CLOSE)
    assert model.generate(sources.to(DEVICE), max_new_tokens=8, do_sample=False).tolist() == expected.tolist()
