"""The collator's options: known keys, rows that are packed already, sorted rows, and sequences without steps."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.nn.functional import ctc_loss
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import hf_packfix
from hf_packfix import DataCollatorForPackedSequence
from tests.support.oracle import (
    DropsIndices,
    Tagger,
    assert_same_run,
    by_length,
    new_trainer,
    padded_batch,
    rows,
    sorted_packed_batch,
    stock,
    train,
)
from tests.support.packed_sequences import assert_same_packed

collate = DataCollatorForPackedSequence()


def test_rows_to_predict_need_no_labels():
    for name in ("label", "label_ids", "labels"):
        collate = DataCollatorForPackedSequence(tensor_keys=[name])
        assert list(collate([{"input_ids": [1, 2]}])) == ["input_ids"]
        # A name that the rows have stands for the one of the batch.
        assert torch.equal(collate([{"input_ids": [1], "label": [3, 4]}])["labels"], torch.tensor([[3, 4]]))


# --- rows that are packed already -------------------------------------------------------------------------


def packed_rows(count: int = 14) -> list[Any]:
    return [{key: pack_sequence([value]) for key, value in row.items()} for row in rows(count)]


def test_packed_rows_are_concatenated():
    batch = collate(packed_rows())
    for key in ("input_ids", "labels"):
        expected = [row[key] for row in rows()]
        assert_same_packed(batch[key], expected)


def test_packed_rows_of_several_sequences_stay_in_their_order():
    pieces = [torch.arange(n).float() for n in (2, 4, 1, 3, 3)]
    features = [
        {"x": pack_sequence(pieces[:2], enforce_sorted=False), "n": 2},
        {"x": pack_sequence(pieces[2:], enforce_sorted=False), "n": 3},
    ]
    batch = collate(features)
    assert_same_packed(batch["x"], pieces)
    assert batch["n"].tolist() == [2, 3]


def test_packed_rows_train_like_the_padded_ones(tmp_path):
    found = train(tmp_path, Tagger, packed_rows(), collate)
    with stock():
        assert_same_run(found, train(tmp_path, Tagger, rows(), padded_batch))


def test_a_packed_mask_is_dropped_or_kept():
    packed = pack_sequence([torch.ones(3).long()])
    features = [{"x": packed, "attention_mask": packed}] * 2
    assert list(collate(features)) == ["x"]
    kept = DataCollatorForPackedSequence(keep_attention_mask=True)(features)
    assert_same_packed(kept["attention_mask"], [torch.ones(3).long()] * 2)


# --- sorted rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda row: row, lambda row: {k: pack_sequence([v]) for k, v in row.items()}])
def test_sorted_rows_train_without_index_tensors(tmp_path, make):
    sort = DataCollatorForPackedSequence(enforce_sorted=True)
    data = [make(row) for row in rows()]
    batch = sort(data)
    expected = by_length(sorted_packed_batch)(rows())
    for key in ("input_ids", "labels"):
        assert batch[key].sorted_indices is None
        assert batch[key].unsorted_indices is None
        assert all(map(torch.equal, batch[key][:2], expected[key][:2]))
    found = train(tmp_path, Tagger, data, sort)
    with stock():
        assert_same_run(found, train(tmp_path, Tagger, rows(), by_length(padded_batch)))


def test_a_model_that_drops_the_index_tensors_is_evaluated_in_order(tmp_path):
    def compute_metrics(prediction: Any) -> dict[str, float]:
        real = prediction.label_ids != -100
        return {"product": float((prediction.predictions[real, 0] * prediction.label_ids[real]).sum())}

    options = {"compute_metrics": compute_metrics}
    sort = DataCollatorForPackedSequence(enforce_sorted=True)
    found = new_trainer(tmp_path, DropsIndices, rows(), sort, options=options).evaluate()
    with stock():
        expected = new_trainer(tmp_path, Tagger, rows(), padded_batch, options=options).evaluate()
    assert found["eval_product"] == pytest.approx(expected["eval_product"], rel=1e-4)
    # Without it, one sequence's labels are compared with another one's predictions.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hf_packfix.HFPackfixWarning)
        wrong = new_trainer(tmp_path, DropsIndices, rows(), collate, options=options).evaluate()
    assert wrong["eval_product"] != pytest.approx(expected["eval_product"], rel=1e-2)


def test_what_is_stacked_is_sorted_alike_and_rows_of_one_length_keep_their_order():
    features = [
        {"x": list(range(n)), "y": [number] * m, "number": number}
        for number, (n, m) in enumerate([(2, 1), (3, 2), (2, 2), (3, 2), (2, 1)])
    ]
    batch = DataCollatorForPackedSequence(enforce_sorted=True)(features)
    assert batch["number"].tolist() == [1, 3, 2, 0, 4]
    assert hf_packfix.pad(batch["y"], -1)[:, 0].tolist() == [1, 3, 2, 0, 4]
    assert batch["x"].sorted_indices is batch["y"].sorted_indices is None


# --- sequences without steps ------------------------------------------------------------------------------

drop = DataCollatorForPackedSequence(empty="drop")


def test_rows_without_steps_are_dropped_in_all_keys():
    features = [
        {"x": [], "y": [7], "number": 0},
        {"x": [1, 2], "y": [8, 9], "number": 1},
        {"x": [3], "y": [], "number": 2},
        {"x": [4], "y": [5], "number": 3},
    ]
    batch = drop(features)
    assert_same_packed(batch["x"], [torch.tensor([1, 2]), torch.tensor([4])])
    assert_same_packed(batch["y"], [torch.tensor([8, 9]), torch.tensor([5])])
    assert batch["number"].tolist() == [1, 3]
    both = DataCollatorForPackedSequence(empty="drop", enforce_sorted=True)(features[::-1])
    assert both["number"].tolist() == [1, 3]


def test_rows_of_features_and_packed_rows_without_steps():
    features = [{"x": []}, {"x": torch.ones(2, 3)}, {"x": torch.ones(0, 3)}]
    assert_same_packed(drop(features)["x"], [torch.ones(2, 3)])
    packed = pack_sequence([torch.ones(2)])
    nothing = PackedSequence(torch.ones(0), torch.ones(0).long())
    assert_same_packed(drop([{"x": nothing}, {"x": packed}, {"x": packed}])["x"], [torch.ones(2)] * 2)


def test_rows_that_the_mask_calls_all_padding_are_dropped():
    features = [
        {"input_ids": [0, 0], "attention_mask": [0, 0], "labels": 1},
        {"input_ids": [5, 0], "attention_mask": [1, 0], "labels": 2},
    ]
    batch = drop(features)
    assert_same_packed(batch["input_ids"], [torch.tensor([5])])
    assert batch["labels"].tolist() == [2]


def test_dropping_trains_like_a_data_set_without_these_rows(tmp_path):
    nothing = {"input_ids": torch.ones(0).long(), "labels": torch.ones(0).long()}
    data = [row for pair in zip(rows(12), [nothing] * 12, strict=True) for row in pair]
    options = {"options": {"compute_metrics": lambda p: {"n": len(p.label_ids)}}}

    def sizes(train_batch: int) -> dict[str, int]:
        return {"per_device_train_batch_size": train_batch, "per_device_eval_batch_size": train_batch // 6}

    found = train(tmp_path, Tagger, data, drop, **sizes(24), **options)
    with stock():
        expected = train(tmp_path, Tagger, rows(12), padded_batch, **sizes(12), **options)
    assert_same_run(found, expected)
    ours, theirs = found.trainer.evaluate(), expected.trainer.evaluate()
    assert ours["eval_n"] == theirs["eval_n"] == 12
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)


# --- padded keys ------------------------------------------------------------------------------------------

TARGETS = [[1, 2], [], [3, 4, 3]]


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [1, 1, 1]])
@pytest.mark.parametrize("make", [list, lambda row: torch.tensor(row, dtype=torch.int64)])
def test_ctc_loss_takes_padded_targets_with_empty_ones(order, make):
    signals, targets = [torch.randn(n, 4) for n in (9, 7, 8)], [TARGETS[row] for row in order]
    features = [{"signal": s, "labels": make(t)} for s, t in zip(signals, targets, strict=True)]
    batch = DataCollatorForPackedSequence(padded_keys=["labels"])(features)
    assert_same_packed(batch["signal"], signals)
    scores, steps = torch.randn(9, 3, 6).log_softmax(-1), torch.tensor([9, 7, 8])
    lengths = (batch["labels"] != -100).sum(1)
    assert lengths.tolist() == [len(target) for target in targets]
    found = ctc_loss(scores, batch["labels"], steps, lengths, reduction="none")
    joined = torch.tensor([digit for target in targets for digit in target]).long()
    expected = ctc_loss(scores, joined, steps, lengths, reduction="none")
    torch.testing.assert_close(found, expected)


def test_padded_keys_hold_steps_of_any_shape_and_minus_100():
    collate = DataCollatorForPackedSequence(padded_keys=["x", "flag"], empty="drop", enforce_sorted=True)
    features = [
        {"ids": [1], "x": [], "flag": [True]},
        {"ids": [1, 2], "x": [[0.5, 1]], "flag": [False, True]},
        {"ids": [], "x": [[2, 2]], "flag": [True]},
    ]
    batch = collate(features)
    assert batch["x"].tolist() == [[[0.5, 1]], [[-100, -100]]]
    assert batch["flag"].tolist() == [[0, 1], [1, -100]]


def test_padded_keys_lose_what_the_mask_calls_padding():
    features = [{"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "labels": [7, 8, -100]}]
    batch = DataCollatorForPackedSequence(padded_keys=["labels"])(features)
    assert batch["labels"].tolist() == [[7, 8]]


# --- refusals -------------------------------------------------------------------------------------------

TWO = pack_sequence([torch.ones(3), torch.ones(2)])
# All four fields have one shape, and would pass for four numbers.
ONE_STEP = pack_sequence([torch.tensor([5])], enforce_sorted=False)
NO_STEP = PackedSequence(torch.ones(0), torch.ones(0).long())
MASK = TWO._replace(data=torch.tensor([1, 1, 1, 0, 1]))
SORTED, DROP, PADDED = {"enforce_sorted": True}, {"empty": "drop"}, {"padded_keys": ["y"]}


@pytest.mark.parametrize(
    ("options", "features", "message"),
    [
        *(
            ({option: ["idz", "ids"]}, [{"ids": [1], "n": 1}], r"found \['idz'\]; the rows have \['ids', 'n'\]")
            for option in ("packed_keys", "tensor_keys", "padded_keys")
        ),
        ({"packed_keys": ["a"], "tensor_keys": ["b"]}, [{"x": [1]}], r"\['a', 'b'\]; the rows have"),
        # packed rows
        ({}, [{"x": [1, 2]}, {"x": ONE_STEP}], "'x' of row 0 is not a PackedSequence, but that of another row is"),
        ({}, [{"x": TWO}, {"x": [1.0]}], "'x' of row 1 is not a PackedSequence, but that of another row is"),
        (
            {},
            [{"x": TWO}, {"x": TWO._replace(data=torch.ones(4))}],
            "'x' of row 1: this PackedSequence is inconsistent",
        ),
        ({}, [{"x": TWO}, {"x": TWO._replace(data=torch.ones(5, 2))}], r"steps of shape \[2\], but row 0 has \[\]"),
        ({}, [{"x": TWO}, {"x": NO_STEP}], "'x' of row 1 is empty"),
        ({}, [{"x": [1, 0], "y": TWO, "attention_mask": MASK}], "'attention_mask' of row 0 cannot cut rows"),
        ({"tensor_keys": ["x"]}, [{"x": TWO}], "'x' of row 0 is a PackedSequence, which cannot be stacked"),
        # sorted rows
        (SORTED, [{"x": [1, 2, 3], "y": [1]}, {"x": [1, 2], "y": [1, 2]}], r"by 'x', 'y' has the lengths \[1, 2\]"),
        (SORTED, [{"x": TWO}], "enforce_sorted sorts rows, but 'x' of row 0 holds 2 sequences"),
        # rows without steps
        ({}, [{"x": [], "y": [7]}], "'x' of row 0 is empty: .* empty='drop'"),
        ({}, [{"x": [3], "y": []}], "'y' of row 0 is empty: .* empty='drop'"),
        ({}, [{"x": [0], "attention_mask": [0]}], "'attention_mask' of row 0 has no real step: .* empty='drop'"),
        (
            DROP,
            [{"x": []}, {"x": [[1]]}, {"x": [[1, 2]]}],
            r"'x' of row 2 has steps of shape \[2\], but row 1 has \[1\]",
        ),
        (
            DROP,
            2 * [{"x": [], "y": 1}],
            r"each of the 2 rows of the batch has a sequence without steps in one of \['x'",
        ),
        # padded keys, which the errors about empty targets name
        (PADDED, [{"y": [1]}, {"y": 2}], "'y' of row 1 must be a sequence, found the number 2"),
        (PADDED, [{"y": [[1, 2]]}, {"y": [[3]]}], r"'y' of row 1 has steps of shape \[1\], but row 0 has \[2\]"),
        (PADDED, [{"y": [1]}, {"y": ONE_STEP}], "'y' of row 1 is a PackedSequence, which cannot be padded"),
        ({}, [{"x": [1], "y": [1]}, {"x": [1], "y": []}], "padded_keys"),
        ({"tensor_keys": ["y"]}, [{"x": [1], "y": [1]}, {"x": [1], "y": []}], "padded_keys"),
    ],
)
def test_refusals_name_key_and_row(options, features, message):
    collate = DataCollatorForPackedSequence(**options)
    with pytest.raises(ValueError, match=message):
        collate(features)
