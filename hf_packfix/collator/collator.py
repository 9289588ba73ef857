"""A data collator whose batches hold PackedSequences."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from hf_packfix.collator.rows import (
    DROP,
    as_tensor,
    by_length,
    check_labels,
    check_packed_masks,
    check_sequence,
    check_steps,
    has_steps,
    is_aligned,
    pad_rows,
    promote,
    stack,
    without_empty,
)
from hf_packfix.packing.jagged import from_jagged, packed_like, packing_of, to_jagged
from hf_packfix.packing.packed import PackedSequence, check, num_tokens

_COLLECTIONS = ("packed_keys", "tensor_keys", "padded_keys")

# As in transformers' `default_data_collator` (`data/data_collator.py`).
_LABEL_NAMES = ("label", "label_ids")


@dataclass
class DataCollatorForPackedSequence:
    """Pack the sequences of a list of features, and stack everything else.

    Features are mappings of lists, numpy arrays or tensors. A value with steps, ``[T]`` or ``[T, *]``, goes
    into a PackedSequence (``enforce_sorted=False``, in the order of the features), each key with lengths of
    its own; a number goes into a tensor ``[B]``. As in ``default_data_collator``, ``label`` and
    ``label_ids`` become ``labels``, and a key whose first value is a string or None is left out. Values that are
    PackedSequences already are concatenated.

    What a tokenizer padded is cut: a key that in every row has as many steps as the ``attention_mask`` loses
    those where the mask is zero. The mask itself, all ones from then on, is dropped.

    Args:
        packed_keys: keys to pack whatever their values look like.
        tensor_keys: keys to stack into a tensor ``[B, *]`` though their values have a dimension, such as the
            ``labels`` of a multi-label problem; they are never cut.
        keep_attention_mask: keep the mask, packed.
        enforce_sorted: sort the rows of a batch by length, the longest first and all keys alike, and pack without
            index tensors: for models that drop these, such as those from before torch 1.1.
        empty: what to do with a row that has a sequence without steps, which cannot be packed: ``"error"``, or
            ``"drop"`` to leave the row out of the batch, in all keys.
        padded_keys: keys to pad into a tensor ``[B, T, *]`` with -100 behind the end of a row, which may be empty,
            as the target of a silent recording: ``ctc_loss`` takes ``labels`` and ``(labels != -100).sum(1)``.

    Raises:
        ValueError: when called, naming key and row: a feature is not a mapping or lacks a key, a sequence is
            empty (with ``empty="drop"``: one in each row), trailing dimensions or the shapes to stack differ, values
            are no numbers or of dtypes with no common one, or the mask fits no key, leaves no step, or would cut off
            a label that is not padding; no row has a key of a collection (other than labels, which rows to predict do
            not have); with ``enforce_sorted``, no order of the rows sorts all keys. At construction: a key is in two
            collections, a collection is a single string, or ``empty`` is something else.

    Example:
        >>> from hf_packfix import DataCollatorForPackedSequence, pad
        >>> collate = DataCollatorForPackedSequence(empty="drop")
        >>> sequences, labels = [[5, 6], [], [7, 8, 9]], [0, 1, 1]
        >>> batch = collate([{"input_ids": s, "label": label} for s, label in zip(sequences, labels)])
        >>> pad(batch["input_ids"])
        tensor([[5, 6, 0],
                [7, 8, 9]])
        >>> batch["labels"]
        tensor([0, 1])
    """

    packed_keys: Collection[str] = ()
    tensor_keys: Collection[str] = ()
    keep_attention_mask: bool = False
    enforce_sorted: bool = False
    empty: Literal["error", "drop"] = "error"
    padded_keys: Collection[str] = ()

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for name in _COLLECTIONS:
            keys = getattr(self, name)
            if isinstance(keys, str):
                raise ValueError(f"{name} must be a collection of keys, found the string {keys!r}; put it into a list")
            for key in _batch_names(keys):
                if key in seen:
                    raise ValueError(f"{seen[key]} and {name} must not share a key, found {[key]} in both")
                seen[key] = name
        if self.empty not in ("error", "drop"):
            raise ValueError(f"empty must be 'error' or 'drop', found {self.empty!r}")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | PackedSequence]:
        """Return the batch of these features."""
        packed_keys, tensor_keys, padded_keys = (_batch_names(getattr(self, name)) for name in _COLLECTIONS)
        named = packed_keys | tensor_keys | padded_keys
        found = _columns(features)
        _check_known(named, found)
        columns = {
            key: [as_tensor(value, key, row) for row, value in enumerate(values)]
            for key, values in found.items()
            if key in named or not _is_left_out(values[0])
        }
        packed = [
            key for key, values in columns.items() if key in packed_keys or (key not in named and has_steps(values[0]))
        ]
        masks = columns.get("attention_mask")
        if masks is not None and "attention_mask" not in tensor_keys:
            self._cut(columns, masks, tensor_keys)
            if not self.keep_attention_mask:
                del columns["attention_mask"]
                packed = [key for key in packed if key != "attention_mask"]
        rows = list(range(len(features)))
        if self.empty == "drop":
            rows = without_empty(columns, packed)
        if self.enforce_sorted:
            rows = by_length(columns, packed, rows)
        packings: dict[tuple[int, ...], PackedSequence] = {}
        make = dict.fromkeys(packed, partial(self._pack, packings)) | dict.fromkeys(padded_keys, pad_rows)
        return {key: make.get(key, stack)(key, values, rows) for key, values in columns.items()}

    def _cut(self, columns: dict[str, list[Any]], masks: list[Any], tensor_keys: Collection[str]) -> None:
        """Take out the steps that a row's mask calls padding, in place."""
        if any(isinstance(mask, PackedSequence) for mask in masks):
            check_packed_masks(masks)
            return
        keep = [mask.bool() for mask in masks]
        padded = [row for row, real in enumerate(keep) if not bool(real.all())]
        if not padded:
            return
        # In every row, since a target may have the length of one padded source by chance.
        aligned = [
            key
            for key, values in columns.items()
            if key not in tensor_keys
            and all(is_aligned(value, real) for value, real in zip(values, keep, strict=True))
        ]
        if aligned in ([], ["attention_mask"]):
            raise ValueError("'attention_mask' marks padding, but no other key has as many steps in every row")
        for row in padded:
            if not bool(keep[row].any()):
                if self.empty == "drop":
                    continue
                raise ValueError(f"'attention_mask' of row {row} has no real step: {DROP}")
            if "labels" in aligned:
                check_labels(columns["labels"][row], columns.get("input_ids"), keep[row], row)
        for key in aligned:
            for row in padded:
                columns[key][row] = columns[key][row][keep[row]]

    def _pack(
        self, packings: dict[tuple[int, ...], PackedSequence], key: str, column: list[Any], rows: list[int]
    ) -> PackedSequence:
        """Return the rows of one key as a PackedSequence; keys of the same lengths share all other fields."""
        values = [column[row] for row in rows]
        if any(issubclass(kind, PackedSequence) for kind in set(map(type, values))):
            return self._join(key, values, rows)
        shapes = [tuple(value.shape) for value in values]
        if len({shape[1:] for shape in shapes}) > 1 or not all(shape and shape[0] for shape in shapes):
            for row, value in zip(rows, values, strict=True):
                check_sequence(key, row, value, values[0], rows[0])
        lengths = tuple(shape[0] for shape in shapes)
        if lengths not in packings:
            packings[lengths] = packing_of(torch.tensor(lengths, device="cpu"), keep_order=self.enforce_sorted)
        return packed_like(packings[lengths], torch.cat(promote(key, values, rows)))

    def _join(self, key: str, values: list[Any], rows: list[int]) -> PackedSequence:
        """Concatenate rows that are PackedSequences."""
        for row, value in zip(rows, values, strict=True):
            if not isinstance(value, PackedSequence):
                raise ValueError(
                    f"{key!r} of row {row} is not a PackedSequence, but that of another row is: pack all rows of a "
                    f"key, or none"
                )
            try:
                check(value)
            except ValueError as error:
                raise ValueError(f"{key!r} of row {row}: {error}") from None
            if not num_tokens(value):
                raise ValueError(f"{key!r} of row {row} is empty: {DROP}")
            check_steps(key, row, value.data, values[0].data, rows[0])
        flats, steps = zip(*map(to_jagged, values), strict=True)
        # As with rows that are not packed, whether or not each of these had index tensors.
        return from_jagged(torch.cat(flats), torch.cat(steps), keep_order=self.enforce_sorted)


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


def _batch_names(keys: Collection[str]) -> set[str]:
    """Return the names that keys of the features have in the batch."""
    return {"labels" if key in _LABEL_NAMES else key for key in keys}


def _check_known(keys: set[str], columns: Mapping[str, Any]) -> None:
    unknown = sorted(keys - columns.keys() - {"labels"})  # rows to predict have no labels
    if unknown:
        raise ValueError(
            f"{', '.join(_COLLECTIONS)} must name keys of the rows, found {unknown}; the rows have {list(columns)}"
        )
