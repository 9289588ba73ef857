"""A data collator whose batches hold PackedSequences."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_packfix.packed import PackedSequence, from_flat

__all__ = ["DataCollatorForPackedSequence"]

_IGNORED = -100
# As in transformers' `default_data_collator` (`data/data_collator.py`).
_LABEL_NAMES = ("label", "label_ids")


@dataclass
class DataCollatorForPackedSequence:
    """Pack the sequences of a list of features, and stack everything else.

    Features are mappings of lists, numpy arrays or tensors. A value with steps, ``[T]`` or ``[T, *]``, goes
    into a PackedSequence (``enforce_sorted=False``, in the order of the features), each key with lengths of
    its own; a number goes into a tensor ``[B]``. As in ``default_data_collator``, ``label`` and
    ``label_ids`` become ``labels``, and a key whose first value is a string or None is left out.

    What a tokenizer padded is cut: a key that in every row has as many steps as the ``attention_mask`` loses
    those where the mask is zero. The mask itself, all ones from then on, is dropped.

    Args:
        packed_keys: keys to pack whatever their values look like.
        tensor_keys: keys to stack into a tensor ``[B, *]`` though their values have a dimension, such as the
            ``labels`` of a multi-label problem; they are never cut.
        keep_attention_mask: keep the mask, packed.

    Raises:
        ValueError: when called, naming key and row: a feature is not a mapping or lacks a key, a sequence is
            empty, trailing dimensions or the shapes to stack differ, values are no numbers or of dtypes with
            no common one, or the mask fits no key, leaves no step, or would cut off a label that is not
            padding. At construction: a key is in both collections, or a collection is a single string.
    """

    packed_keys: Collection[str] = ()
    tensor_keys: Collection[str] = ()
    keep_attention_mask: bool = False

    def __post_init__(self) -> None:
        for name in ("packed_keys", "tensor_keys"):
            if isinstance(getattr(self, name), str):
                raise ValueError(
                    f"{name} must be a collection of keys, found the string {getattr(self, name)!r}; put it "
                    f"into a list"
                )
        both = set(self.packed_keys) & set(self.tensor_keys)
        if both:
            raise ValueError(f"packed_keys and tensor_keys must not share a key, found {sorted(both)} in both")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | PackedSequence]:
        """Return the batch of these features."""
        columns = {
            key: [_tensor(value, key, row) for row, value in enumerate(values)]
            for key, values in _columns(features).items()
            if key in self.packed_keys or key in self.tensor_keys or not _is_left_out(values[0])
        }
        masks = columns.get("attention_mask")
        if masks is not None and "attention_mask" not in self.tensor_keys:
            self._cut(columns, masks)
            if not self.keep_attention_mask:
                del columns["attention_mask"]
        return {key: self._collate(key, values) for key, values in columns.items()}

    def _cut(self, columns: dict[str, list[Tensor]], masks: list[Tensor]) -> None:
        """Take out the steps that a row's mask calls padding, in place."""
        keep = [mask.bool() for mask in masks]
        padded = [row for row, real in enumerate(keep) if not bool(real.all())]
        if not padded:
            return
        # In every row, since a target may have the length of one padded source by chance.
        aligned = [
            key
            for key, values in columns.items()
            if key not in self.tensor_keys
            and all(value.shape[:1] == real.shape for value, real in zip(values, keep, strict=True))
        ]
        if aligned in ([], ["attention_mask"]):
            raise ValueError("'attention_mask' marks padding, but no other key has as many steps in every row")
        for row in padded:
            if not bool(keep[row].any()):
                raise ValueError(f"'attention_mask' of row {row} has no real step: drop empty sequences")
            if "labels" in aligned:
                _check_labels(columns["labels"][row], columns.get("input_ids"), keep[row], row)
        for key in aligned:
            for row in padded:
                columns[key][row] = columns[key][row][keep[row]]

    def _collate(self, key: str, values: list[Tensor]) -> Tensor | PackedSequence:
        packs = key in self.packed_keys or (key not in self.tensor_keys and values[0].dim() > 0)
        shapes = [tuple(value.shape) for value in values]
        alike = {shape[1:] for shape in shapes} if packs else set(shapes)
        if len(alike) > 1 or (packs and not all(shape and shape[0] for shape in shapes)):
            for row, value in enumerate(values):
                _check_like_first(key, row, value, values[0], packs=packs)
        values = _promote(key, values)
        if not packs:
            return torch.stack(values)
        return from_flat(torch.cat(values), torch.tensor([shape[0] for shape in shapes], device="cpu"))


def _columns(features: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of every key, rows in order, labels under the name ``labels``."""
    if len(features) == 0:
        raise ValueError("there is nothing to collate: expected at least one feature")
    for row, feature in enumerate(features):
        if not isinstance(feature, Mapping):
            raise ValueError(f"row {row} must be a mapping of keys to values, found {type(feature).__name__}")
    keys = dict.fromkeys(key for feature in features for key in feature)
    columns: dict[str, list[Any]] = {}
    for key in keys:
        missing = [row for row, feature in enumerate(features) if key not in feature]
        if missing:
            raise ValueError(f"{key!r} is missing in row {missing[0]}: every row must have the same keys")
        name = "labels" if key in _LABEL_NAMES else key
        if name in columns:
            given = [key for key in keys if key in (*_LABEL_NAMES, "labels")]
            raise ValueError(f"expected labels under one key, found {given}")
        columns[name] = [feature[key] for feature in features]
    return columns


def _is_left_out(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _tensor(value: Any, key: str, row: int) -> Tensor:
    if type(value) is Tensor:
        return value
    if isinstance(value, PackedSequence):
        # torch would read its four fields as rows of numbers, where they have one shape.
        raise ValueError(
            f"{key!r} of row {row} is a PackedSequence already: expected the steps of one sequence (list, array, "
            f"tensor), of which the collator packs those of all rows"
        )
    try:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], np.ndarray):
            # torch reads a list of arrays element by element.
            value = np.stack(value)
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{key!r} of row {row} must be a number, or evenly nested numbers (list, array, tensor): {error}"
        ) from error


def _check_labels(labels: Tensor, input_ids: list[Tensor] | None, keep: Tensor, row: int) -> None:
    """Raise where cutting would lose a label that counts.

    Labels as long as the mask may still be those of another sequence, a target padded to the same length.
    """
    if labels.dim() != 1:
        return
    lost = ~keep & (labels != _IGNORED)
    if input_ids is not None and input_ids[row].shape == labels.shape:
        # Labels that repeat the inputs repeat their padding.
        lost &= labels != input_ids[row]
    if bool(lost.any()):
        step = int(lost.nonzero()[0])
        raise ValueError(
            f"'labels' of row {row} hold {labels[step].item()} at step {step}, which 'attention_mask' calls "
            f"padding: put {_IGNORED} there, or leave out the padding and the mask"
        )


def _check_like_first(key: str, row: int, value: Tensor, first: Tensor, *, packs: bool) -> None:
    """Raise where a row is not like the first one, or cannot be packed."""
    if not packs and value.shape != first.shape:
        raise ValueError(
            f"{key!r} of row {row} has shape {list(value.shape)}, but row 0 has {list(first.shape)}: what is "
            f"stacked must have one shape; to pack the key, name it in packed_keys"
        )
    if packs and value.dim() == 0:
        raise ValueError(f"{key!r} of row {row} must be a sequence, found the number {value.item()}")
    if packs and len(value) == 0:
        raise ValueError(f"{key!r} of row {row} is empty: drop empty sequences, there is nothing to pack")
    if packs and value.shape[1:] != first.shape[1:]:
        raise ValueError(
            f"{key!r} of row {row} has steps of shape {list(value.shape[1:])}, but row 0 has "
            f"{list(first.shape[1:])}: every step must have the same features"
        )


def _promote(key: str, values: Iterable[Tensor]) -> list[Tensor]:
    """Return the values in the one dtype that torch promotes them to."""
    values = list(values)
    dtypes = list(dict.fromkeys(value.dtype for value in values))
    if len(dtypes) == 1:
        return values
    try:
        common = reduce(torch.promote_types, dtypes)
    except RuntimeError as error:
        row = next(row for row, value in enumerate(values) if value.dtype != dtypes[0])
        raise ValueError(
            f"{key!r} is {dtypes[0]} in row 0 but {values[row].dtype} in row {row}, with no common dtype: "
            f"convert them to one"
        ) from error
    return [value.to(common) for value in values]
