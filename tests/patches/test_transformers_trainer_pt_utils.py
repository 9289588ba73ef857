"""``transformers.trainer_pt_utils`` leaf by leaf: what the Trainer seldom hands over, and users of it may."""

from __future__ import annotations

import pytest
import torch
import transformers.trainer_pt_utils as pt_utils
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers.trainer_pt_utils import LabelSmoother

from hf_packfix.packing.packed import pad
from tests.support.oracle import Tagger, assert_training_equals_padded, packed_batch, padded_batch, rows, stock, train

PIECES = [torch.tensor([1, 0]), torch.tensor([2, 2, 1]), torch.tensor([0])]
LABELS = [*PIECES, torch.tensor([1, -100])]  # two of one length


def logits_and_labels() -> tuple[PackedSequence, PackedSequence]:
    labels = pack_sequence(LABELS, enforce_sorted=False)
    generator = torch.Generator().manual_seed(0)
    return labels._replace(data=torch.randn(len(labels.data), 3, generator=generator)), labels


@pytest.mark.parametrize("shift_labels", [False, True])
@pytest.mark.parametrize("which", ["both", "logits", "labels", "other packing"])
@pytest.mark.parametrize("kind", ["mapping", "tuple", "bare"])
def test_smoothing_over_packed_sequences_is_smoothing_over_their_padded_tensors(shift_labels, which, kind):
    logits, labels = logits_and_labels()
    with stock():
        expected = LabelSmoother()({"logits": pad(logits)}, pad(labels, -100), shift_labels=shift_labels)
    if which == "logits":
        labels = pad(labels, -100)
    elif which == "labels":
        logits = pad(logits)
    elif which == "other packing":  # the same sequences, with those of one length the other way round
        pieces = [pad(logits)[row, : len(piece)] for row, piece in enumerate(LABELS)]
        order = sorted(range(len(pieces)), key=lambda row: (-len(pieces[row]), -row))
        again = pack_sequence([pieces[row] for row in order])
        logits = PackedSequence(again.data, again.batch_sizes, torch.tensor(order))
        assert not torch.equal(logits.sorted_indices, labels.sorted_indices)
    # Bare logits have as many classes as steps: taken for a tuple, the rows of the data would pass for padded logits.
    output = {"mapping": {"logits": logits}, "tuple": (logits, None), "bare": logits}[kind]
    if kind == "bare" and which == "labels":
        return  # a bare tensor means something else upstream
    torch.testing.assert_close(LabelSmoother()(output, labels, shift_labels=shift_labels), expected)


def test_smoothing_names_lengths_that_differ():
    logits, _ = logits_and_labels()
    other = pack_sequence([torch.zeros(n).long() for n in (1, 3, 2, 2)], enforce_sorted=False)
    with pytest.raises(ValueError, match=r"lengths \[2, 3, 1, 2\], the packed labels \[1, 3, 2, 2\]"):
        LabelSmoother()({"logits": logits}, other)
    # One row of labels would be spread over all rows of the logits.
    with pytest.raises(ValueError, match="sum to 8, but its data has 1 rows"):
        LabelSmoother()({"logits": logits}, logits._replace(data=torch.ones(1).long()))


@pytest.mark.needs_patch(
    "transformers.trainer_pt_utils:nested_concat",
    "transformers.trainer_pt_utils:nested_numpify",
    "transformers.trainer_pt_utils:nested_truncate",
)
def test_packed_labels_become_what_padded_ones_do():
    def converted(labels):
        whole = pt_utils.nested_concat(labels, labels, padding_index=-100)
        return [whole, pt_utils.nested_numpify(labels), pt_utils.nested_numpify(pt_utils.nested_truncate(labels, 2))]

    with stock():
        expected = converted(padded_batch(rows(4))["labels"])
    for found, value in zip(converted(packed_batch(rows(4))["labels"]), expected, strict=True):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(value))


@pytest.mark.needs_patch("transformers.trainer_pt_utils:LabelSmoother.__call__")
@pytest.mark.parametrize("steps", [1, 3])
def test_label_smoothing_trains_as_on_padded_labels(tmp_path, steps):
    options = {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": steps}
    packed, _ = assert_training_equals_padded(tmp_path, Tagger, rows(), **options)
    plain = train(tmp_path, Tagger, rows(), packed_batch, gradient_accumulation_steps=steps)
    assert abs(packed.losses[-1] - plain.losses[-1]) > 1e-4  # it does smooth
