"""Losses over steps and over sequences, the same for padded and packed batches.

As in transformers (``loss/loss_utils.py``), a label of -100 is ignored, and if the Trainer passes
``num_items_in_batch`` a loss is the sum divided by it, so that accumulated gradients weigh every label alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_packfix.models.configuration_recurrent import RecurrentConfig
from hf_packfix.models.steps import Steps, previous_rows, real_steps
from hf_packfix.packing.jagged import to_jagged
from hf_packfix.packing.packed import PackedSequence, batch_size, same_packing, with_data

IGNORED = -100


def step_labels(labels: Steps, logits: Steps, attention_mask: Steps | None = None) -> Steps:
    """Return the labels in the layout of the logits, -100 at padding.

    Args:
        labels: int64 ``[B, T]``, or packed; packed in another order of the rows is set right.
        logits: ``[B, T, C]``, or packed; or the inputs ``[B, T, *]``, which have the same steps.
        attention_mask: ``[B, T]``, of a padded batch.

    Raises:
        ValueError: one is packed and the other is not, or their shapes or lengths differ.
    """
    if isinstance(labels, PackedSequence) and isinstance(logits, PackedSequence):
        if same_packing(labels, logits):
            return labels
        values, found = to_jagged(labels)
        rows = torch.arange(len(logits.data), device=logits.data.device)
        places, expected = to_jagged(with_data(logits, rows))
        if not torch.equal(found, expected):
            raise ValueError(
                f"packed labels must have the lengths of the inputs, {expected.tolist()}, found {found.tolist()}"
            )
        return with_data(logits, torch.empty_like(values).index_copy(0, places.to(values.device), values))
    if isinstance(labels, PackedSequence) or isinstance(logits, PackedSequence):
        layout, other = ("packed", "padded") if isinstance(labels, PackedSequence) else ("padded", "packed")
        raise ValueError(f"labels must be {other} as the inputs are, found {layout} labels")
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels must have one label a step, {list(logits.shape[:2])}, found {list(labels.shape)}")
    real = real_steps(attention_mask, labels)
    return labels if real is None else labels.masked_fill(~real, IGNORED)


def next_labels(labels: Steps, attention_mask: Steps | None = None) -> Steps:
    """Return at every step the label of the next real step of its sequence; -100 at the last one."""
    if isinstance(labels, PackedSequence):
        shifted = torch.full_like(labels.data, IGNORED)
        shifted[previous_rows(labels)] = labels.data[batch_size(labels) :]
        return with_data(labels, shifted)
    real = real_steps(attention_mask, labels)
    followed = functional.pad(labels, (0, 1), value=IGNORED)
    if real is None:
        return followed[:, 1:]
    width = labels.shape[1]
    columns = torch.arange(width, device=labels.device)
    # The first real column from each column on; `width`, where `followed` holds -100, if there is none.
    first_real = columns.where(real, width).flip(1).cummin(1).values.flip(1)
    after = functional.pad(first_real[:, 1:], (0, 1), value=width)
    return followed.gather(1, after).masked_fill(~real, IGNORED)


def shift_right(labels: Steps, start_token_id: int, pad_token_id: int) -> Steps:
    """Return what a decoder reads to predict ``labels``: each the step before, the first the start token.

    A label of -100 is no token and becomes padding. Padded labels are padded on the right.
    """
    if isinstance(labels, PackedSequence):
        shifted = torch.full_like(labels.data, start_token_id)
        shifted[batch_size(labels) :] = labels.data[previous_rows(labels)]
        return with_data(labels, shifted.masked_fill(shifted == IGNORED, pad_token_id))
    shifted = functional.pad(labels, (1, 0), value=start_token_id)[:, :-1]
    return shifted.masked_fill(shifted == IGNORED, pad_token_id)


def step_loss(logits: Steps, labels: Steps, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Return the cross entropy over the steps whose label is not -100: a float32 scalar.

    Args:
        logits: ``[B, T, C]``, or packed ``[N, C]``.
        labels: int64, in the layout of the logits.
        num_items_in_batch: what the sum is divided by; by default, the number of labels that count.
    """
    if isinstance(logits, PackedSequence) and isinstance(labels, PackedSequence):
        logits, labels = logits.data, labels.data
    assert isinstance(logits, Tensor)
    assert isinstance(labels, Tensor)
    return _cross_entropy(logits.flatten(0, -2), labels.flatten(), num_items_in_batch)


def sequence_loss(
    logits: Tensor, labels: Tensor, config: RecurrentConfig, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Return the loss of one prediction a sequence.

    As transformers' own classifiers do, infers ``config.problem_type`` from the first labels and keeps it.

    Args:
        logits: ``[B, C]``.
        labels: int64 ``[B]`` for single-label classification, ``[B, C]`` of 0 and 1 for multi-label,
            float ``[B, C]`` (``[B]`` if C is 1) for regression.
        config: has C (``num_labels``) and the problem type.
        num_items_in_batch: what the sum is divided by; by default, the number of labels that count.

    Raises:
        ValueError: the labels do not have the shape that the problem type needs.
    """
    if config.problem_type is None:
        integral = isinstance(labels, Tensor) and labels.dtype in (torch.int64, torch.int32)
        of_labels: Any = "single_label_classification" if integral else "multi_label_classification"
        config.problem_type = "regression" if logits.shape[1] == 1 else of_labels
    single = config.problem_type == "single_label_classification"
    expected = logits.shape[:1] if single else logits.shape
    if not isinstance(labels, Tensor) or labels.numel() != expected.numel() or labels.shape[:1] != expected[:1]:
        found = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels for {config.problem_type} must have shape {list(expected)}, found {found}")
    labels = labels.reshape(expected)
    if single:
        return _cross_entropy(logits, labels, num_items_in_batch)
    of_regression = config.problem_type == "regression"
    criterion = functional.mse_loss if of_regression else functional.binary_cross_entropy_with_logits
    total = criterion(logits.float(), labels.float(), reduction="sum")
    return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


def _cross_entropy(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    # In float32: a sum over thousands of logits in half precision loses what distinguishes them.
    logits, labels = logits.float(), labels.to(torch.int64)
    if num_items_in_batch is None:
        return functional.cross_entropy(logits, labels, ignore_index=IGNORED)
    total = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
