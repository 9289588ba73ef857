"""Joining the batches of a packed evaluation once: the arrays are those that stock concatenates, to the last bit."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import transformers.trainer_pt_utils as pt_utils
from accelerate.utils import operations
from torch.nn.utils.rnn import pack_sequence
from transformers.trainer_pt_utils import EvalLoopContainer

from hf_packfix import evaluation, pad, with_data
from hf_packfix.patches import accelerate_utils_operations
from tests.support.oracle import PlainTagger, Tagger, new_trainer, packed_batch, padded_batch, rows, stock
from tests.support.reports import assert_same_report, assert_same_tree, messages, report

LENGTHS = [[3, 1], [1, 1, 1], [2, 7], [7], [4, 6, 5]]


def batches(dtype: torch.dtype = torch.float32, trailing: tuple[int, ...] = (2,)) -> list[Any]:
    """Return packed batches, and beside each the numbers of its rows."""
    generator = torch.Generator().manual_seed(0)
    result, first = [], 0
    for lengths in LENGTHS:
        pieces = [torch.randint(0, 50, (n, *trailing), generator=generator).to(dtype) for n in lengths]
        numbers = torch.arange(first, first + len(lengths))
        result.append((pack_sequence(pieces, enforce_sorted=False), {"number": numbers}))
        first += len(lengths)
    return result


def padded_tensors(tree: Any) -> Any:
    return operations.pad_across_processes(tree, dim=1, pad_index=-100)


def collect(trees: list[Any], to_cpu_after: tuple[int, ...] = (), *, first_packed: int = 0, **options: Any) -> Any:
    """Return the arrays of a container, in an evaluation loop that meets a packed batch at this place, if at all."""
    with evaluation.running(evaluation.Loop()) as loop:
        container = EvalLoopContainer(**options)
        for number, tree in enumerate(trees):
            loop.packed = number >= first_packed
            container.add(tree)
            if number in to_cpu_after:
                container.to_cpu_and_numpy()
        return container.get_arrays()


@pytest.fixture
def concatenations(monkeypatch) -> list[int]:
    """An element for each time that upstream concatenated padded tensors."""
    calls: list[int] = []
    original = pt_utils.torch_pad_and_concatenate

    def concatenate(first, second, **options):
        if first.dim() > 1:  # losses come one by one
            calls.append(1)
        return original(first, second, **options)

    monkeypatch.setattr(pt_utils, "torch_pad_and_concatenate", concatenate)
    return calls


@pytest.mark.needs_patch("transformers.trainer_pt_utils:EvalLoopContainer.add")
def test_batches_are_kept_apart_until_the_arrays_are_asked_for():
    trees = list(map(padded_tensors, batches()))
    with evaluation.running(evaluation.Loop(packed=True)):
        container = EvalLoopContainer()
        for number, tree in enumerate(trees):
            container.add(tree)
            if number == 1:
                container.to_cpu_and_numpy()  # frees the memory of a device
        assert [array.shape[0] for array, _ in container.arrays] == [2, 3]
        assert [tensor.shape[0] for tensor, _ in container.tensors] == [2, 1, 3]
        assert container.get_arrays()[0].shape == (11, 7, 2)


@pytest.mark.parametrize("to_cpu_after", [(), (0,), (1, 3), (4,), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize(
    ("dtype", "trailing"),
    [(torch.float32, (2,)), (torch.int64, ()), (torch.bfloat16, (3, 2)), (torch.bool, ()), (torch.uint8, (1,))],
)
def test_the_arrays_are_those_of_stock(concatenations, to_cpu_after, dtype, trailing):
    # -100 means something else in bytes; what, is up to the caller
    index = 1 if dtype in (torch.bool, torch.uint8) else -100
    padded = [operations.pad_across_processes(tree, dim=1, pad_index=index) for tree in batches(dtype, trailing)]
    found = collect(padded, to_cpu_after, padding_index=index)
    assert index == 1 or not concatenations
    with stock():
        expected = collect(padded, to_cpu_after, padding_index=index)
    assert_same_tree(found, expected)


def test_packed_sequences_that_nobody_padded_are_joined_as_padded_ones(concatenations):
    found = collect(batches())
    with stock():
        expected = collect(list(map(padded_by_stock, batches())))
    assert_same_tree(found, expected)


def padded_by_stock(tree: Any) -> Any:
    packed, rest = tree
    return torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first=True, padding_value=-100)[0], rest


@pytest.mark.parametrize("count", [1, 3])
def test_a_scalar_beside_packed_sequences_is_joined_as_in_stock(count):
    trees = [(padded_tensors(packed), torch.tensor(float(n))) for n, (packed, _) in enumerate(batches()[:count])]
    found = collect(trees)
    with stock():
        expected = collect(trees)
    assert_same_tree(found, expected)
    assert found[1].shape == (() if count == 1 else (count,))


#: What `preprocess_logits_for_metrics` may return: tensors without padding, of several kinds and widths.
PREPROCESSED = {
    "argmax": lambda logits, labels: logits.argmax(-1),
    "a tuple": lambda logits, labels: (logits.argmax(-1), logits.flatten(1).sum(-1)),
    "a mapping": lambda logits, labels: {"class": logits.argmax(-1), "mean": [logits.mean((1, 2))]},
    "another width": lambda logits, labels: logits.argmax(-1)[:, ::2],
    "no steps": lambda logits, labels: logits.sum(1),
    "a scalar": lambda logits, labels: (logits.argmax(-1), torch.tensor(logits.shape[1])),
    "nothing": lambda logits, labels: None,
}


@pytest.mark.parametrize("kind", PREPROCESSED)
@pytest.mark.parametrize("changes", [{}, {"eval_accumulation_steps": 2}], ids=["at once", "accumulated"])
def test_preprocessed_logits_are_joined_once(tmp_path, concatenations, kind, changes):
    def preprocess(logits, labels):  # what the padded model makes of padding is not the same
        return PREPROCESSED[kind](logits.masked_fill((labels == -100)[..., None], 0.0), labels)

    options = {"preprocess_logits_for_metrics": preprocess}
    found = new_trainer(tmp_path, Tagger, rows(), packed_batch, options=options, **changes).predict(rows())
    assert not concatenations
    with stock():
        expected = new_trainer(tmp_path, Tagger, rows(), padded_batch, options=options, **changes).predict(rows())
    assert_same_tree(found.predictions, expected.predictions)
    assert_same_tree(found.label_ids, expected.label_ids)


def test_memory_that_is_used_again_for_the_next_batch_spoils_nothing(tmp_path):
    memory = torch.empty(64, 64)

    def preprocess(logits, labels):
        view = memory[: len(logits), : logits.shape[1]]
        return view.copy_(logits.argmax(-1).masked_fill(labels == -100, -100))

    options = {"preprocess_logits_for_metrics": preprocess}
    found = new_trainer(tmp_path, Tagger, rows(), packed_batch, options=options).predict(rows())
    expected = new_trainer(tmp_path, Tagger, rows(), packed_batch).predict(rows()).predictions.argmax(-1)
    real = found.label_ids != -100
    assert (found.predictions[real] == expected[real]).all()


@pytest.mark.parametrize("to_cpu_after", [(), (0,), (1,)])
def test_batches_before_the_first_packed_one_are_kept(to_cpu_after):
    trees = [padded_tensors(tree) for tree in batches()]
    found = collect(trees, to_cpu_after, first_packed=2)
    with stock():
        expected = collect(trees, to_cpu_after)
    assert_same_tree(found, expected)


def test_without_concatenation_the_batches_stay_apart():
    found = collect([padded_tensors(tree) for tree in batches()], do_nested_concat=False)
    assert [array.shape for array, _ in found] == [(len(lengths), max(lengths), 2) for lengths in LENGTHS]


def test_ordinary_batches_take_the_original_path(concatenations):
    collect([padded_tensors(tree) for tree in batches()], first_packed=len(LENGTHS))
    assert concatenations


@pytest.mark.parametrize("inference_mode", [False, True])
def test_an_evaluation_concatenates_nothing_and_reports_the_same(tmp_path, concatenations, inference_mode):
    with torch.inference_mode(inference_mode):
        found = report(tmp_path, Tagger, packed_batch, rows())
    assert not concatenations
    with stock():
        expected = report(tmp_path, Tagger, padded_batch, rows())
    assert concatenations
    assert_same_report(found, expected)


@pytest.mark.parametrize("shapes", [[(3,), (1,)], [(1,), (3,)], [(), (1,)]], ids=str)
@pytest.mark.parametrize("to_cpu_after", [(), (0,)])
def test_batches_that_differ_in_their_features_are_not_broadcast(shapes, to_cpu_after):
    # One step, which fits into any other.
    trees = [padded_tensors(pack_sequence([torch.ones(1 + n, *shape)])) for n, shape in enumerate(shapes)]
    with pytest.raises(ValueError, match=r"batch 1 .* batches can be joined only if their steps have one shape"):
        collect(trees, to_cpu_after)


def test_batches_that_differ_in_their_outputs_are_named():
    with pytest.raises(ValueError, match="2 tensors in batch 1 of the evaluation, but 1 in batch 0"):
        collect([(torch.ones(2),), (torch.ones(2), torch.ones(2))])


def test_joining_frees_each_piece_as_it_is_copied():
    pieces = [np.ones((2, n, 3), np.float32) for n in (2, 5, 3)]
    held = list(pieces)
    assert evaluation.join(held, -100).shape == (6, 5, 3)
    assert held == []


def test_bytes_are_gathered_in_a_dtype_that_can_be_sent():
    sent = []

    def from_two_processes(tree: Any) -> Any:
        sent.append(tree)
        return torch.cat([tree, tree])

    padded = torch.tensor([[1, 200], [3, -100]], dtype=torch.int16)
    found = accelerate_utils_operations.gather(from_two_processes, padded)
    assert sent[0].dtype == torch.int32
    assert found.dtype == torch.int16
    assert torch.equal(found, torch.cat([padded, padded]))
    assert torch.equal(accelerate_utils_operations.gather(lambda tree: tree, padded), padded)  # in a single process


@pytest.mark.parametrize("moved", [False, True])
def test_a_container_gives_all_it_holds_after_disabling(moved):
    trees = [padded_tensors(tree) for tree in batches()]
    with evaluation.running(evaluation.Loop(packed=True)):
        found = EvalLoopContainer()
        for tree in trees[:-1]:
            found.add(tree)
        with stock():
            found.add(trees[-1])
            if moved:
                found.to_cpu_and_numpy()
            arrays = found.get_arrays()
            expected = EvalLoopContainer()
            for tree in trees:
                expected.add(tree)
            assert_same_tree(arrays, expected.get_arrays())
            assert vars(found).keys() == vars(expected).keys()


# --- outputs that cannot be joined ----------------------------------------------------------------------


class WithMore(PlainTagger):
    """A tagger that returns one more output, made of the packed or padded states ``[B, T, H]``."""

    def __init__(self, make: Any, name: str = "more") -> None:
        super().__init__()
        self.make, self.name = make, name

    def forward(self, input_ids: Any, labels: Any = None, attention_mask: Any = None) -> dict[str, Any]:
        states = self.gru(self.embedding(input_ids) if attention_mask is not None else self.embedded(input_ids))
        padded = states[0] if attention_mask is not None else pad(states[0])
        return super().forward(input_ids, labels, attention_mask) | {self.name: self.make(padded, states)}

    def embedded(self, input_ids: Any) -> Any:
        return with_data(input_ids, self.embedding(input_ids.data))


def maps(padded: torch.Tensor, _: Any = None) -> torch.Tensor:
    return padded @ padded.mT


ATTENTIONS = {
    "a map a head": lambda padded, _: maps(padded)[:, None].repeat(1, 2, 1, 1),
    "one map": maps,
    "packed": lambda padded, states: with_data(
        states[0],
        torch.cat(
            [row.expand(int(size), -1) for row, size in zip(maps(padded)[0], states[0].batch_sizes, strict=True)]
        ),
    ),
}


def predict(tmp_path: Any, make: Any, collate: Any = packed_batch, ignore: Any = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    trainer = new_trainer(tmp_path, WithMore(make), rows(), collate, per_device_eval_batch_size=3, **changes)
    return trainer.predict(rows(), ignore_keys=ignore)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_outputs_whose_width_changes_are_named_with_their_cure(tmp_path, kind):
    with pytest.raises(ValueError, match=r"^output 'more' of the model has steps of shape .* in batch 1 .*, but") as e:
        predict(tmp_path, ATTENTIONS[kind])
    assert "ignore_keys=" in str(e.value)
    assert "keys_to_ignore_at_inference" in str(e.value)
    assert "eval_do_concat_batches=False" in str(e.value)
    found = predict(tmp_path, ATTENTIONS[kind], ignore=["loss", "more"])
    apart = predict(tmp_path, ATTENTIONS[kind], eval_do_concat_batches=False)
    if kind == "packed":
        return
    with stock():
        expected = predict(tmp_path, ATTENTIONS[kind], padded_batch, ignore=["loss", "more"])
        expected_apart = predict(tmp_path, ATTENTIONS[kind], padded_batch, eval_do_concat_batches=False)
    np.testing.assert_allclose(found.predictions, expected.predictions, rtol=1e-5, atol=1e-6)
    for batch, other in zip(apart.predictions, expected_apart.predictions, strict=True):
        assert [array.shape for array in batch] == [array.shape for array in other]


def test_an_output_that_is_no_tensor_is_named_with_its_cure(tmp_path):
    with pytest.raises(
        TypeError, match=r"^output 'more' of the model holds a Fraction, .*: leave it out with ignore_"
    ):
        predict(tmp_path, lambda *_: (torch.zeros(1), Fraction(1)))
    assert predict(tmp_path, lambda *_: Fraction(1), ignore=["loss", "more"]).predictions.shape == (14, 9, 4)


STATES = {
    "a state": lambda padded, states: states[1].repeat(2, 1, 1),
    "nested": lambda padded, states: {"h": (states[1].repeat(2, 1, 1),)},
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_beside_logits_is_warned_of_once(tmp_path, kind):
    trainer = new_trainer(tmp_path, WithMore(STATES[kind]), rows(), packed_batch)
    (message,) = messages(trainer, "predict", rows())
    assert message.startswith("output 'more' of the model has shape [2, 3, 8] in a batch of 3 rows")
    assert "state.transpose(0, 1)" in message
    assert "ignore_keys=" in message
    padded = new_trainer(tmp_path, WithMore(STATES[kind]), rows(), padded_batch)
    assert messages(padded, "predict", rows()) == []


def test_a_state_with_the_rows_first_is_what_it_is_of_padded_rows(tmp_path):
    def final(padded, states):
        real = (padded != 0).any(-1).sum(1)
        return padded[torch.arange(len(padded)), real - 1]  # of packed rows, the last state

    trainer = new_trainer(tmp_path, WithMore(lambda padded, states: states[1].transpose(0, 1)), rows(), packed_batch)
    assert messages(trainer, "predict", rows()) == []
    found = predict(tmp_path, lambda padded, states: states[1].transpose(0, 1)).predictions[1]
    expected = predict(tmp_path, final).predictions[1]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_outputs_without_keys_are_named_by_their_place(tmp_path):
    data = [{"input_ids": row["input_ids"]} for row in rows()]  # without labels the Trainer calls the model itself
    trainer = new_trainer(tmp_path, WithMore(ATTENTIONS["one map"]), data, packed_batch)
    with pytest.raises(ValueError, match=r"^output 1 of the model has steps of shape"):
        trainer.predict(data)
