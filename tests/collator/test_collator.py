"""The packing collator: what packs, what stacks, what a mask cuts, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from hf_packfix import DataCollatorForPackedSequence
from hf_packfix.models import RecurrentConfig, RecurrentForTokenClassification
from tests.support.oracle import assert_same_run, packed_batch, rows, train
from tests.support.packed_sequences import assert_same_packed

collate = DataCollatorForPackedSequence()


CONTENTS = [[3, 1, 2], [7], [5, 6, 5, 6, 8]]


@pytest.mark.parametrize(
    "make",
    [list, tuple, np.array, torch.tensor, lambda ids: [np.int64(i) for i in ids]],
    ids=["list", "tuple", "array", "tensor", "list of NumPy numbers"],
)
def test_sequences_pack_as_torch_packs_them(make):
    batch = collate([{"input_ids": make(ids)} for ids in CONTENTS])
    assert_same_packed(batch["input_ids"], [torch.tensor(ids) for ids in CONTENTS])


@pytest.mark.parametrize("make", [torch.tensor, np.array, list, lambda x: [np.array(step) for step in x]])
def test_features_of_several_dimensions_pack_step_by_step(make):
    sequences = [torch.arange(float(3 * n)).reshape(n, 3) for n in (2, 4, 1)]
    batch = collate([{"input_values": make(s.tolist())} for s in sequences])
    assert_same_packed(batch["input_values"]._replace(data=batch["input_values"].data.float()), sequences)


def test_each_key_has_lengths_of_its_own():
    features = [{"input_ids": [1, 2, 3], "labels": [4]}, {"input_ids": [5], "labels": [6, 7]}]
    batch = collate(features)
    assert_same_packed(batch["input_ids"], [torch.tensor([1, 2, 3]), torch.tensor([5])])
    assert_same_packed(batch["labels"], [torch.tensor([4]), torch.tensor([6, 7])])


@pytest.mark.parametrize("name", ["label", "label_ids", "labels"])
@pytest.mark.parametrize(
    ("values", "dtype"), [((2, 0), torch.int64), ((0.5, 2), torch.float32), ((True, False), torch.bool)]
)
def test_numbers_stack_under_the_name_labels(name, values, dtype):
    batch = collate([{"input_ids": [1], name: value} for value in values])
    assert set(batch) == {"input_ids", "labels"}
    assert torch.equal(batch["labels"], torch.tensor([float(v) for v in values]).to(dtype))
    assert batch["labels"].dtype == dtype


def test_text_and_none_are_left_out():
    batch = collate([{"input_ids": [1], "text": "a", "label": None}, {"input_ids": [2], "text": "b", "label": None}])
    assert list(batch) == ["input_ids"]


def test_tensor_keys_stack_what_would_pack():
    features = [{"input_ids": [1, 2, 3], "labels": [0.0, 1.0]}, {"input_ids": [1], "labels": [1.0, 1.0]}]
    batch = DataCollatorForPackedSequence(tensor_keys=["labels"])(features)
    assert torch.equal(batch["labels"], torch.tensor([[0.0, 1.0], [1.0, 1.0]]))


def test_other_mappings_are_features():
    batch = collate([BatchEncoding({"input_ids": [1, 2]}), BatchEncoding({"input_ids": [3]})])
    assert_same_packed(batch["input_ids"], [torch.tensor([1, 2]), torch.tensor([3])])


# --- padding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_cut_by_the_mask(side):
    def padded(values, fill):
        blank = (6 - len(values)) * [fill]
        return blank + values if side == "left" else values + blank

    targets, masks = [[i % 3 for i in ids] for ids in CONTENTS], [[1] * len(ids) for ids in CONTENTS]
    features = [
        {"input_ids": padded(ids, 0), "attention_mask": padded(mask, 0), "labels": padded(target, -100)}
        for ids, mask, target in zip(CONTENTS, masks, targets, strict=True)
    ]
    batch = collate(features)
    assert set(batch) == {"input_ids", "labels"}
    assert_same_packed(batch["input_ids"], list(map(torch.tensor, CONTENTS)))
    assert_same_packed(batch["labels"], list(map(torch.tensor, targets)))
    kept = DataCollatorForPackedSequence(keep_attention_mask=True)(features)
    assert_same_packed(kept["attention_mask"], list(map(torch.tensor, masks)))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[7, 8, 9, 6]], [[7, 8, 9, 6]]),
        ([[7, 8, 9], [7]], [[7, 8, 9], [7]]),  # the first has the length of the mask by chance
        ([[4, 5, 0]], [[4, 5]]),  # they repeat the inputs, padding included
    ],
)
def test_a_mask_cuts_labels_that_are_one_a_step(labels, expected):
    inputs = [([4, 5, 0], [1, 1, 0]), ([4, 5, 6], [1, 1, 1])]
    features = [
        {"input_ids": ids, "attention_mask": mask, "labels": row}
        for (ids, mask), row in zip(inputs, labels, strict=False)
    ]
    assert_same_packed(collate(features)["labels"], list(map(torch.tensor, expected)))
    if len(labels) == 1:
        stacked = DataCollatorForPackedSequence(tensor_keys=["labels"])(features)["labels"]
        assert torch.equal(stacked, torch.tensor(labels))  # uncut


def test_a_mask_must_not_cut_off_labels():
    features = [
        {"input_ids": [4, 5], "attention_mask": [1, 1], "labels": [4, 5]},
        {"input_ids": [4, 0], "attention_mask": [1, 0], "labels": [7, 8]},
    ]
    with pytest.raises(ValueError, match=r"'labels' of row 1 hold 8 at step 1, .* padding"):
        collate(features)


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "nothing to collate"),
        ([{"x": [1]}, [1]], "row 1 must be a mapping of keys to values, found list"),
        ([{"x": [1], "y": 1}, {"x": [1]}], "'y' is missing in row 1"),
        ([{"x": [1]}, {"x": [1], "y": 1}], "'y' is missing in row 0"),
        ([{"x": [1]}, {"x": []}], "'x' of row 1 is empty"),
        ([{"x": []}], "'x' of row 0 is empty"),
        ([{"x": [1]}, {"x": 1}], "'x' of row 1 must be a sequence, found the number 1"),
        ([{"x": 1}, {"x": [1]}], r"'x' of row 1 has shape \[1\], but row 0 has \[\]"),
        ([{"x": [[1.0, 2.0]]}, {"x": [[1.0]]}], r"'x' of row 1 has steps of shape \[1\], but row 0 has \[2\]"),
        ([{"x": [1]}, {"x": [[1.0], [1.0, 2.0]]}], "'x' of row 1 must be a number, or evenly nested numbers"),
        ([{"x": [1]}, {"x": "text"}], "'x' of row 1 must be a number, or evenly nested numbers"),
        ([{"x": [1]}, {"x": None}], "'x' of row 1 must be a number, or evenly nested numbers"),
        ([{"label": 1, "labels": 2}], r"expected labels under one key, found \['label', 'labels'\]"),
        ([{"x": [1, 2], "attention_mask": [0, 0]}], "'attention_mask' of row 0 has no real step"),
        ([{"x": [1], "attention_mask": [1, 0]}], "'attention_mask' marks padding, but no other key has"),
    ],
)
def test_refusals_name_key_and_row(features, message):
    with pytest.raises(ValueError, match=message):
        collate(features)


@pytest.mark.skipif(not hasattr(torch, "float8_e5m2"), reason="all dtypes of this torch have a common one")
def test_a_refusal_of_dtypes_without_a_common_one_names_key_and_row():
    with pytest.raises(ValueError, match=r"'x' is torch.float8_e5m2 in row 0 but torch.float32 in row 1, with no"):
        collate([{"x": torch.ones(1, dtype=torch.float8_e5m2)}, {"x": torch.ones(1)}])


def test_dtypes_with_a_common_one_promote():
    batch = collate([{"x": [1, 2]}, {"x": [0.5]}])
    assert_same_packed(batch["x"], [torch.tensor([1.0, 2.0]), torch.tensor([0.5])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packed_keys": "labels"}, "packed_keys must be a collection of keys, found the string 'labels'"),
        ({"packed_keys": ["a", "b"], "tensor_keys": ["b"]}, r"must not share a key, found \['b'\]"),
        ({"packed_keys": ["label"], "tensor_keys": ["labels"]}, r"must not share a key, found \['labels'\] in both"),
        ({"empty": "skip"}, "empty must be 'error' or 'drop', found 'skip'"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorForPackedSequence(**options)


# --- in the Trainer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_trains_on_datasets_rows_with_unused_columns(tmp_path, workers):
    datasets = pytest.importorskip("datasets")
    data = rows()
    listed = [{key: value.tolist() for key, value in row.items()} | {"text": "unused"} for row in data]
    options = {"dataloader_num_workers": workers, "num_train_epochs": 1}

    def model():
        torch.manual_seed(0)
        return RecurrentForTokenClassification(RecurrentConfig(vocab_size=17, hidden_size=8, num_labels=4))

    found = train(tmp_path, model(), datasets.Dataset.from_list(listed), collate, **options)
    expected = train(tmp_path, model(), data, packed_batch, **options)
    assert_same_run(found, expected)
