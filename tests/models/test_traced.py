"""Models that are traced or exported: the programs give the numbers of the model for any lengths, masks and rows."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import hf_packfix
from hf_packfix.models import (
    RecurrentEncoderDecoder,
    RecurrentForCausalLM,
    RecurrentForSequenceClassification,
    RecurrentForTokenClassification,
    RecurrentModel,
)
from hf_packfix.models.traced import run_exported, run_traced
from tests.support.layouts import CELLS, arrange, new_model, sequences_of, tokens

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LENGTHS = (3, 7, 1, 5)
LAYOUTS = ["right", "left", "holes"]
#: Each kind of model, with the cell, the layers and the directions it is tried with.
KINDS: dict[type[Any], tuple[str, int, bool]] = {
    RecurrentModel: ("lstm", 2, False),
    RecurrentForSequenceClassification: ("lstm", 1, True),
    RecurrentForTokenClassification: ("gru", 2, True),
    RecurrentForCausalLM: ("gru", 1, False),
    RecurrentEncoderDecoder: ("rnn", 1, True),
}
# With an `is_exporting`; but torch 2.7, which has no `torch.onnx.ops`, fails on loops that carry several tensors.
exports = pytest.mark.skipif(not hasattr(torch.onnx, "ops"), reason="this torch exports no loops")


def build(kind: type[Any], cell: str = "") -> Any:
    usual, layers, bidirectional = KINDS[kind]
    return new_model(kind, cell or usual, layers, bidirectional=bidirectional).eval()


def batch(kind: type[Any], layout: str = "right", lengths: tuple[int, ...] = LENGTHS) -> dict[str, torch.Tensor]:
    """Return a padded batch with a mask, by the keywords of ``forward``."""
    ids, mask = arrange(layout, tokens(lengths, low=3))
    given = {"input_ids": ids, "attention_mask": mask}
    if kind is RecurrentEncoderDecoder:
        given["decoder_input_ids"] = torch.stack(tokens([1 + max(lengths)] * len(lengths), seed=1, low=3))
    return given


def without_padding(kind: type[Any]) -> dict[str, torch.Tensor]:
    given = batch(kind, "right", (4, 4))
    # Contiguous: of a slice of columns, torch.export also records that T is not the width of the whole.
    return {name: value[:, :4].contiguous() for name, value in given.items()}


def dynamic(kind: type[Any]) -> dict[str, Any]:
    rows, steps, target = (torch.export.Dim(name, min=1, max=64) for name in ("rows", "steps", "target"))
    shapes = {"input_ids": {0: rows, 1: steps}, "attention_mask": {0: rows, 1: steps}}
    return shapes | ({"decoder_input_ids": {0: rows, 1: target}} if kind is RecurrentEncoderDecoder else {})


def first(output: Any) -> torch.Tensor:
    return output["logits"] if "logits" in output else output["last_hidden_state"]


class First(nn.Module):
    """A model with one tensor as its output, and its inputs by place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, decoder_input_ids: Any = None) -> torch.Tensor:
        target = {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
        return first(self.model(input_ids=input_ids, attention_mask=attention_mask, **target))


# --- the layers -----------------------------------------------------------------------------------------


ONCE_EXPORTED = pytest.param(run_exported, 2, True, True, marks=exports)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("function", "layers", "bidirectional", "begun"),
    [(run_traced, 1, True, False), (run_traced, 2, False, True), (run_traced, 2, True, True), ONCE_EXPORTED],
)
def test_a_layer_over_any_padding_equals_torchs_over_each_sequence_alone(function, cell, layers, bidirectional, begun):
    torch.manual_seed(0)
    kind = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[cell]
    layer = kind(4, 6, layers, batch_first=True, bidirectional=bidirectional)
    sequences = [torch.randn(n, 4) for n in LENGTHS]
    states = [torch.randn(layers * (1 + bidirectional), len(LENGTHS), 6) for _ in range(2 if cell == "lstm" else 1)]

    def state_of(rows: slice) -> Any:
        parts = tuple(state[:, rows].contiguous() for state in states)
        return None if not begun else parts if cell == "lstm" else parts[0]

    alone = [layer(x[None], state_of(slice(row, row + 1))) for row, x in enumerate(sequences)]
    for layout in LAYOUTS:
        inputs, mask = arrange(layout, sequences)
        outputs, state = function(layer, inputs, mask.bool(), state_of(slice(None)))
        assert not outputs[mask == 0].any()
        for row, (found, (expected, final)) in enumerate(zip(sequences_of(outputs, mask), alone, strict=True)):
            torch.testing.assert_close(found, expected[0], **CLOSE)
            ends = [part[:, row : row + 1] for part in (state if cell == "lstm" else [state])]
            torch.testing.assert_close(ends, list(final) if cell == "lstm" else [final], **CLOSE)


@exports
def test_dropout_acts_between_the_layers_of_an_exported_model():
    layer, inputs = nn.GRU(4, 6, 2, batch_first=True, dropout=0.5), torch.randn(2, 5, 4)
    expected = layer.eval()(inputs)[0]
    torch.testing.assert_close(run_exported(layer, inputs, None, None)[0], expected, **CLOSE)
    layer.train()
    torch.manual_seed(0)
    found = run_exported(layer, inputs, None, None)[0]
    torch.manual_seed(0)
    torch.testing.assert_close(run_exported(layer, inputs, None, None)[0], found)
    assert not torch.allclose(found, expected)


# --- the models -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.jit, "trace"), reason="this torch has no torch.jit.trace")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("cell", CELLS)
def test_a_trace_made_without_padding_is_right_for_any_padding(kind, cell):
    model = First(build(kind, cell)).eval()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        traced = torch.jit.trace(model, tuple(without_padding(kind).values()), check_trace=False)
    # Nothing about our own code.
    assert [str(w.message) for w in warned if Path(w.filename).is_relative_to(Path(hf_packfix.__file__).parent)] == []
    for layout in LAYOUTS:
        given = batch(kind, layout)
        torch.testing.assert_close(traced(*given.values()), model(*given.values()), **CLOSE)


@exports
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_exported_model_is_right_for_any_padding(kind):
    model = build(kind)
    program = torch.export.export(model, (), without_padding(kind), dynamic_shapes=dynamic(kind))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for layout in LAYOUTS:
        given = batch(kind, layout)
        found, expected = loaded(**given), model(**given)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(first(found), first(expected), **CLOSE)
    if "recurrent_state" in found:
        torch.testing.assert_close(found.recurrent_state.cell_state, expected.recurrent_state.cell_state, **CLOSE)


@exports
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_without_a_mask_reads_every_step(strict):
    model, ids = build(RecurrentForSequenceClassification), torch.stack(tokens([6] * 4, low=3))
    # A slice of another tensor, as one takes of a data set.
    program = torch.export.export(
        model, (), {"input_ids": ids[:2]}, dynamic_shapes={"input_ids": {1: torch.export.Dim("steps")}}, strict=strict
    )
    other = torch.stack(tokens([11] * 2, low=3))
    torch.testing.assert_close(program.module()(input_ids=other).logits, model(other).logits, **CLOSE)


@exports
def test_a_packed_batch_is_not_exported():
    model, ids = build(RecurrentForSequenceClassification), pack_sequence([torch.tensor([3, 4]), torch.tensor([5])])
    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(model, (), {"input_ids": ids})


@exports
def test_an_exported_language_model_continues_from_a_state():
    model, ids = build(RecurrentForCausalLM, "lstm"), torch.stack(tokens([5] * 2, low=3))
    state = model(ids[:, :4], use_cache=True).past_key_values
    program = torch.export.export(model, (), {"input_ids": ids[:, 4:], "past_key_values": state})
    found = program.module()(input_ids=ids[:, 4:], past_key_values=state)
    torch.testing.assert_close(found.logits, model(ids).logits[:, 4:], **CLOSE)


@exports
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "dynamo"),
    [
        *((kind, False) for kind in KINDS),
        pytest.param(RecurrentForSequenceClassification, True, marks=exports),
        *(
            pytest.param(kind, True, marks=[pytest.mark.slow, exports])
            for kind in KINDS
            if "ForSeq" not in kind.__name__
        ),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_onnxruntime_gives_the_numbers_of_the_model(tmp_path, kind, dynamo):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, example, shapes = First(build(kind)).eval(), without_padding(kind), dynamic(kind)
    options: dict[str, Any] = {"dynamic_shapes": tuple(shapes.values()), "verbose": False} if dynamo else {}
    if not dynamo:
        named = {name: {axis: dim.__name__ for axis, dim in axes.items()} for name, axes in shapes.items()}
        options = {"dynamic_axes": named}
    path = tmp_path / "model.onnx"
    arguments = tuple(example.values())
    torch.onnx.export(model, arguments, str(path), input_names=list(example), dynamo=dynamo, **options)
    session = runtime.InferenceSession(str(path))
    for layout in LAYOUTS:
        given = batch(kind, layout)
        (found,) = session.run(None, {name: value.numpy() for name, value in given.items()})
        torch.testing.assert_close(torch.from_numpy(found), model(*given.values()), **CLOSE)
