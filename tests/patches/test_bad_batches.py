"""Fields that contradict each other, and batches that do not fit together: an error that names the place.

``torch`` checks none of this. Its constructor takes any fields, and its recurrent layers train on them: they leave out
rows of ``data`` that ``batch_sizes`` do not reach, and hand a row the state of another one.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import operations
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from transformers.trainer_pt_utils import (
    EvalLoopContainer,
    find_batch_size,
    nested_concat,
    nested_numpify,
    nested_truncate,
)
from transformers.trainer_utils import EvalPrediction

import hf_packfix
from hf_packfix import evaluation
from hf_packfix.packing import jagged, packed, trees
from tests.support.oracle import (
    Classifier,
    PlainTagger,
    Row,
    Tagger,
    count_items,
    new_trainer,
    packed_batch,
    rows,
)
from tests.support.packed_sequences import Pair
from tests.support.reports import Stream
from tests.support.strategies import all_lengths, attack

Sequences = list[list[int]]


# --- any PackedSequence with one field spoilt -----------------------------------------------------------


#: What is done to a field; ``draw`` returns an integer from its first argument to its second one.
CHANGES: list[Callable[[Callable[..., int], torch.Tensor], torch.Tensor]] = [
    lambda draw, field: field.index_fill(0, torch.tensor(draw(0, len(field) - 1)), draw(-2, 8)),
    lambda draw, field: field[: draw(0, len(field) - 1)],
    lambda draw, field: torch.cat([field, field.new_tensor([draw(-1, 6)])]),
    lambda draw, field: field.roll(draw(1, 4)),
]
OF_DATA = [*CHANGES, lambda draw, field: field[0]]
OF_OTHERS = [
    *CHANGES,
    lambda draw, field: field.to([torch.float32, torch.int32, torch.uint8, torch.bool][draw(0, 3)]),
    lambda draw, field: [field[None], field[:, None], field[0]][draw(0, 2)],
]


def spoil(draw: Any, sequences: PackedSequence) -> PackedSequence:
    """Return it with one field changed by a little, in a way that may or may not contradict the others."""
    name = draw(st.sampled_from(["data", "batch_sizes", "sorted_indices", "unsorted_indices", "both"]))
    fields = sequences._asdict()
    if name == "both":
        order = draw(st.permutations(range(packed.batch_size(sequences))))
        fields |= {key: torch.tensor(order) for key in ("sorted_indices", "unsorted_indices")}
        return PackedSequence._make(fields.values())
    field = fields[name]
    if field is None:
        fields[name] = torch.tensor(draw(st.permutations(range(packed.batch_size(sequences)))))
    else:
        change = draw(st.sampled_from(OF_DATA if name == "data" else OF_OTHERS))
        fields[name] = change(lambda *limits: draw(st.integers(*limits)), field)
        if name not in ("data", "batch_sizes") and draw(st.integers(0, 9)) == 0:
            fields[name] = None
    return PackedSequence._make(fields.values())


def read(packed: PackedSequence) -> Sequences | None:
    """Return the sequences, read by plain loops; None where the fields do not say which they are."""
    data, sizes = packed.data, packed.batch_sizes
    indices = [index for index in packed[2:] if index is not None]
    if data.dim() == 0 or len(indices) == 1:
        return None
    if any(field.dim() != 1 or field.dtype != torch.int64 for field in (sizes, *indices)):
        return None
    values = data.tolist()
    by_rank: Sequences = [[] for _ in range(int(sizes[0]) if len(sizes) else 0)]
    alive = len(by_rank)
    for size in sizes.tolist():
        if not 1 <= size <= min(alive, len(values)):
            return None
        alive = size
        for rank in range(size):
            by_rank[rank].append(values.pop(0))
    if values:
        return None
    if not indices:
        return by_rank
    there, back = (index.tolist() for index in indices)
    if sorted(there) != list(range(len(by_rank))) or back != [there.index(place) for place in range(len(there))]:
        return None
    return [by_rank[rank] for rank in back]


def padded(sequences: Sequences, *, left: bool = False) -> Any:
    width = max(map(len, sequences), default=0)
    padding = [[-100] * (width - len(sequence)) for sequence in sequences]
    return [fill + s if left else s + fill for s, fill in zip(sequences, padding, strict=True)]


OTHER = [[7, 8, 9], [5]]


def other() -> PackedSequence:
    return pack_sequence([torch.tensor(sequence) for sequence in OTHER], enforce_sorted=False)


def collected(packed: PackedSequence) -> Any:
    container = EvalLoopContainer()
    container.add(operations.pad_across_processes(packed, dim=1, pad_index=-100))
    container.add(operations.pad_across_processes(other(), dim=1, pad_index=-100))
    return container.get_arrays()


def sequences_of(packed: PackedSequence) -> Sequences:
    return [sequence.tolist() for sequence in unpack_sequence(packed)] if len(packed.batch_sizes) else []


def gathered_for_metrics(p: PackedSequence) -> Any:
    accelerator = Accelerator(cpu=True)
    # accelerate up to 0.34 keeps in it that the last data loader ended with a batch to be cut.
    accelerator.gradient_state._reset_state()
    return accelerator.gather_for_metrics(p)


#: Everything that makes numbers of a PackedSequence, and what the numbers are for given sequences.
USES: dict[str, tuple[Callable[[PackedSequence], Any], Callable[[Sequences], Any]]] = {
    "hf_packfix.batch_size": (hf_packfix.batch_size, len),
    "hf_packfix.num_tokens": (hf_packfix.num_tokens, lambda s: sum(map(len, s))),
    "hf_packfix.pad": (lambda p: hf_packfix.pad(p, -100), padded),
    "pad_left": (lambda p: packed.pad_left(p, -100), lambda s: padded(s, left=True)),
    "lengths": (packed.lengths, lambda s: list(map(len, s))),
    "to_flat": (lambda p: jagged.to_jagged(p)[0], lambda s: [value for sequence in s for value in sequence]),
    "take": (lambda p: sequences_of(jagged.take(p, slice(1, None))), lambda s: s[1:]),
    "concatenate": (lambda p: sequences_of(jagged.concatenate([other(), p])), lambda s: OTHER + s),
    "nested_numpify": (nested_numpify, padded),
    "nested_concat": (lambda p: nested_concat(p, other()), lambda s: padded(s + OTHER)),
    "nested_concat behind": (lambda p: nested_concat(other(), p), lambda s: padded(OTHER + s)),
    "nested_truncate": (lambda p: sequences_of(nested_truncate(p, 1)), lambda s: s[:1]),
    "find_batch_size": (find_batch_size, len),
    "EvalPrediction": (lambda p: EvalPrediction(p, p).label_ids, padded),
    "EvalLoopContainer": (collected, lambda s: padded(s + OTHER)),
    "accelerate find_batch_size": (operations.find_batch_size, len),
    "accelerate slice_tensors": (lambda p: sequences_of(operations.slice_tensors(p, slice(1))), lambda s: s[:1]),
    "accelerate concatenate": (
        lambda p: sequences_of(operations.concatenate([{"x": p}, {"x": other()}])["x"]),
        lambda s: s + OTHER,
    ),
    "accelerate pad_across_processes": (
        lambda p: operations.pad_across_processes({"x": p}, dim=1, pad_index=-100)["x"],
        padded,
    ),
    "accelerate gather": (operations.gather, padded),
    "gather_for_metrics": (gathered_for_metrics, padded),
    "same_packing": (lambda p: packed.same_packing(p, p), lambda s: True),
}


@attack
@given(st.data())
def test_a_changed_field_is_an_error_or_the_right_numbers(data):
    pieces = [torch.randint(10, 99, (length,)) for length in data.draw(all_lengths)]
    in_order = data.draw(st.booleans())
    if in_order:
        pieces.sort(key=len, reverse=True)
    packed = pack_sequence(pieces, enforce_sorted=in_order)
    spoilt = spoil(data.draw, packed)
    sequences = read(spoilt)
    for name, (use, expected) in USES.items():
        found = outcome(use, spoilt)
        if sequences is None:
            assert isinstance(found, ValueError), (name, spoilt, found)
            assert "this PackedSequence is inconsistent" in str(found), name
        else:
            assert found == expected(sequences), (name, spoilt)


def outcome(use: Callable[[PackedSequence], Any], packed: PackedSequence) -> Any:
    try:
        found = use(packed)
    except Exception as error:
        return error
    return found.tolist() if isinstance(found, (torch.Tensor, np.ndarray)) else found


# --- spoilt batches in a Trainer ------------------------------------------------------------------------

#: A few, since the test above has every kind.
SPOILT: dict[str, Callable[[PackedSequence], dict[str, torch.Tensor | None]]] = {
    "batch_sizes leave out the last row": lambda p: {"batch_sizes": shortened(p.batch_sizes)},
    "batch_sizes increase": lambda p: {"batch_sizes": p.batch_sizes.flip(0)},
    "indices contradict": lambda p: {"sorted_indices": p.sorted_indices.roll(1)},
    "one index tensor": lambda p: {"sorted_indices": None},
}


def shortened(sizes: torch.Tensor) -> torch.Tensor:
    """Return batch sizes that sum to one less: nothing in torch notices the row of data that is left over."""
    last = sizes.clone()
    last[-1] -= 1
    return last if last[-1] else last[:-1]


def spoiling(key: str, fault: str) -> Callable[[Any], Any]:
    """Return a collator whose PackedSequence under ``key`` has the fault."""

    def collate(features: Any) -> Any:
        batch = packed_batch(features)
        packed = batch[key]
        return {**batch, key: packed._replace(**SPOILT[fault](packed))}

    return collate


@pytest.mark.parametrize("run", ["train", "train on a stream", "evaluate", "predict"])
@pytest.mark.parametrize("fault", SPOILT)
@pytest.mark.parametrize(("model", "key"), [(Classifier, "input_ids"), (Tagger, "labels")], ids=["input", "labels"])
def test_a_trainer_names_what_is_wrong(tmp_path, model, key, fault, run):
    data = rows(3, labels="row" if model is Classifier else "tokens", seed=2)
    train_on = Stream(data) if run == "train on a stream" else data
    options = {"compute_metrics": lambda p: {"n": len(p.label_ids)}}
    trainer = new_trainer(tmp_path, model, train_on, spoiling(key, fault), options=options, max_steps=1)
    with pytest.raises(ValueError, match=f"^'{key}' in the batch: this PackedSequence is inconsistent"):
        trainer.predict(data) if run == "predict" else getattr(trainer, run.split()[0])()


@pytest.mark.parametrize("name", ["sorted_indices", "unsorted_indices"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_index_tensors_of_another_number_of_sequences_are_named(name, device):
    sequences = pack_sequence([torch.ones(n) for n in (1, 3, 2)], enforce_sorted=False)
    indices = getattr(sequences, name)
    for wrong in (indices[:-1], torch.cat([indices, indices[:1]])):
        with pytest.raises(
            ValueError, match=rf"its {name} must be int64 \[3\], one a sequence, found .*\[{len(wrong)}\]"
        ):
            packed.check(sequences._replace(**{name: wrong.to(device)}), wait=False)


def test_indices_on_another_device_than_the_data_are_an_error_not_a_guess():
    sequences = pack_sequence([torch.arange(2), torch.arange(4)], enforce_sorted=False)
    away = sequences._replace(data=sequences.data.to("meta"))
    padded = packed.pad(away)
    assert (padded.device.type, padded.shape) == ("meta", (2, 4))
    assert packed.lengths(away).tolist() == [2, 4]
    indices = {key: getattr(sequences, key).to("meta") for key in sequences._fields[2:]}
    for lost in (
        {"sorted_indices": indices["sorted_indices"]},
        {"unsorted_indices": indices["unsorted_indices"]},
        indices,
    ):
        for use in (packed.pad, packed.lengths, jagged.to_jagged, nested_numpify):
            with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
                use(sequences._replace(**lost))


def test_data_that_requires_gradients_becomes_no_array():
    packed = pack_sequence([torch.ones(2), torch.ones(1)], enforce_sorted=False)
    packed.data.requires_grad_()
    with pytest.raises(RuntimeError, match="requires grad"):
        nested_numpify(packed)
    container = EvalLoopContainer()
    container.add(packed)
    with pytest.raises(RuntimeError, match="requires grad"):
        container.get_arrays()


def test_a_packed_sequence_may_hold_no_sequence():
    empty = PackedSequence(torch.ones(0, 2), torch.ones(0).long(), torch.ones(0).long())
    without_order = PackedSequence(torch.ones(0, 2), torch.ones(0).long())
    full = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)], enforce_sorted=False)
    for sequences in (empty, without_order):
        assert find_batch_size(sequences) == 0
        assert nested_numpify(sequences).shape == (0, 0, 2)
        both = jagged.concatenate([sequences, full, sequences])
        assert packed.lengths(both).tolist() == [3, 1]
        assert torch.equal(packed.pad(both), packed.pad(full))
        assert nested_concat(sequences, full).shape == (2, 3, 2)
        assert operations.gather(sequences).shape == (0, 0, 2)
    with pytest.raises(ValueError, match=r"must be int64 \[0\], one a sequence"):
        hf_packfix.batch_size(empty._replace(sorted_indices=torch.tensor([0])))


def test_every_packed_sequence_of_a_mapping_is_looked_at():
    packed = pack_sequence([torch.tensor([5])], enforce_sorted=False)
    # On a GPU index tensors are taken as they are: looking into them would wait for it. `meta` cannot be looked into.
    away = packed._replace(**{name: getattr(packed, name).to("meta") for name in packed._fields[2:]})
    for batch in (
        {"x": packed},
        {"n": 1, "x": [{"y": (packed, None)}]},
        {"x": UserDict(y=packed)},
        UserDict(x=packed),
        {"x": away},
    ):
        assert trees.check_batch(batch) is True
    for batch in (
        {},
        {"x": [torch.ones(1)], "y": {"z": ()}, "t": torch.ones(1)},
        UserDict(x=[1]),
        [packed],
        packed,
        None,
    ):
        assert trees.check_batch(batch) is False


INCONSISTENT = "in the batch: this PackedSequence is inconsistent: its batch_sizes sum to"


def inconsistent(packed: PackedSequence) -> PackedSequence:
    return packed._replace(data=packed.data[:-1])


def test_keys_and_positions_are_named_in_batches_of_every_kind(tmp_path):
    packed = packed_batch(rows(3))["input_ids"]
    trainer = new_trainer(tmp_path, PlainTagger, rows(3), packed_batch)
    checks = [
        trees.check_batch,
        lambda batch: count_items(trainer, [batch]),
        lambda batch: trainer.prediction_step(trainer.model, batch, True),
    ]
    for batch, name in (
        ([packed, inconsistent(packed)], "position 1"),
        ((1, [{"deep": inconsistent(packed)}]), "position 1"),
        (Pair(packed, inconsistent(packed)), "'second'"),
        ({"x": packed, "y": [inconsistent(packed)]}, "'y'"),
        ({"x": packed, 3: (inconsistent(packed),)}, "3"),
    ):
        for check in checks:
            with pytest.raises(ValueError, match=f"^{name} {INCONSISTENT}"):
                check(batch)
    for find in (find_batch_size, operations.find_batch_size):
        for batch, name in (
            ({"x": inconsistent(packed)}, "'x'"),
            ([inconsistent(packed)], "position 0"),
            ({"outer": [{"inner": inconsistent(packed)}]}, "'outer'"),
        ):
            with pytest.raises(ValueError, match=f"^{name} {INCONSISTENT}"):
                find(batch)


# --- steps of another shape ------------------------------------------------------------------------------


def widths(features: list[Row], width: int) -> PackedSequence:
    return pack_sequence([row["input_ids"].float()[:, None].expand(-1, width) for row in features], False)


class Wide(nn.Module):
    """Returns logits, and takes labels, of as many features a step as the batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Any, labels: Any = None, more: Any = None) -> Any:
        logits = x._replace(data=x.data * self.weight)
        if more is None:
            return {"loss": logits.data.mean(), "logits": logits}
        return {"loss": logits.data.mean(), "logits": logits, "more": more._replace(data=more.data * 2)}


def varying(keys: dict[str, list[int]]) -> Any:
    """Return a collator whose keys have these numbers of features, batch by batch."""
    number = -1

    def collate(features: list[Row]) -> Any:
        nonlocal number
        number += 1
        return {key: widths(features, sizes[number % len(sizes)]) for key, sizes in keys.items()}

    return collate


OUTPUT_X, OUTPUT_MORE = "'x' and output 'logits' of the model", "'more' and output 'more' of the model"


@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"x": [2, 2, 2], "labels": [3, 3, 1]}, r"'labels' has steps of shape \[1\] in batch 2 .* \[3\] in batch 0"),
        ({"x": [2, 2, 2], "labels": [1, 3, 3]}, r"'labels' has steps of shape \[3\] in batch 1 .* \[1\] in batch 0"),
        ({"x": [4, 5, 4], "labels": [1, 1, 1]}, rf"{OUTPUT_X} has steps of shape \[5\] in batch 1"),
        ({"x": [4, 4, 4], "labels": [1, 1, 1], "more": [2, 3, 2]}, rf"{OUTPUT_MORE} .* shape \[3\] in batch 1"),
    ],
)
def test_an_evaluation_names_key_and_batch(tmp_path, keys, message, metrics):
    options = {"compute_metrics": lambda p: {"n": len(p.label_ids)}} if metrics else {}
    data = rows(9)
    trainer = new_trainer(tmp_path, Wide, data, varying(keys), options=options, remove_unused_columns=False)
    with pytest.raises(ValueError, match=f"^{message}"):
        trainer.predict(data)


def test_an_evaluation_without_arrays_takes_steps_of_any_shape(tmp_path):
    keys = {"x": [4, 5, 6], "labels": [1, 2, 3]}
    options = {"remove_unused_columns": False, "prediction_loss_only": True}
    trainer = new_trainer(tmp_path, Wide, rows(9), varying(keys), **options)
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_container_of_a_loop_without_prediction_steps_names_what_it_can():
    first, other = widths(rows(3), 2), widths(rows(3), 1)
    for wrap in (lambda packed: packed, lambda packed: (packed, packed), lambda packed: {"logits": packed}):
        with evaluation.running(evaluation.Loop(packed=True)):
            container = EvalLoopContainer()
            container.add(wrap(first))
            with pytest.raises(ValueError, match=r"^number 0 of what .* has steps of shape \[1\] in batch 1 of"):
                container.add(wrap(other))


def test_concatenation_names_key_and_batch():
    wide, narrow = widths(rows(3), 2), widths(rows(3), 1)
    with pytest.raises(ValueError, match=r"number 0 have \[2\], those of number 2 have \[1\]"):
        jagged.concatenate([wide, wide, narrow])
    with pytest.raises(ValueError, match=r"those of a batch have \[1\], those before it \[2\]"):
        nested_concat(wide, narrow)
    for batches, name in (
        ([{"x": wide, "y": wide}, {"x": wide, "y": narrow}], "'y'"),
        ([{"x": wide, "y": [{"z": wide}]}, {"x": wide, "y": [{"z": narrow}]}], "'y'"),
        ([(wide, wide), (wide, narrow)], "position 1"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} has steps of shape \[1\] in batch 1, but \[2\] in batch 0"):
            operations.concatenate(batches)
    with pytest.raises(ValueError, match=f"^'y' {INCONSISTENT}"):
        operations.concatenate([{"x": wide, "y": wide}, {"x": wide, "y": inconsistent(wide)}])
