"""A data collator whose batches hold PackedSequences.

A column is the list of a key's values in all rows of the features; ``rows`` are the numbers of those in the batch, in
its order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_packfix.packing.jagged import from_jagged, packed_like, packing_of, to_jagged
from hf_packfix.packing.packed import PackedSequence, batch_size, check, dtype_with, num_tokens

__all__ = ["DataCollatorForPackedSequence"]

_IGNORED = -100
_DROP = (
    "there is nothing to pack; drop such rows from the data set, or from their batch with empty='drop'; a target that "
    "may be empty, as that of CTC, belongs into padded_keys"
)

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
        unknown = sorted(named - found.keys() - {"labels"})  # rows to predict have no labels
        if unknown:
            raise ValueError(
                f"{', '.join(_COLLECTIONS)} must name keys of the rows, found {unknown}; the rows have {list(found)}"
            )
        columns = {
            key: [_as_tensor(value, key, row) for row, value in enumerate(values)]
            for key, values in found.items()
            if key in named or not (values[0] is None or isinstance(values[0], str))
        }
        masks = columns.get("attention_mask")
        if masks is not None and "attention_mask" not in tensor_keys:
            self._cut(columns, masks, tensor_keys)
            if not self.keep_attention_mask:
                del columns["attention_mask"]
        packed = [
            key
            for key, values in columns.items()
            if key in packed_keys or (key not in named and _steps(values[0]) is not None)
        ]
        rows = list(range(len(features)))
        if self.empty == "drop":
            rows = _without_empty(columns, packed)
        if self.enforce_sorted:
            rows = _by_length(columns, packed, rows)
        packings: dict[tuple[int, ...], PackedSequence] = {}
        make = dict.fromkeys(packed, partial(self._pack, packings)) | dict.fromkeys(padded_keys, _pad_rows)
        return {
            key: make.get(key, _stack)(key, [values[row] for row in rows], rows) for key, values in columns.items()
        }

    def _cut(self, columns: dict[str, list[Any]], masks: list[Any], tensor_keys: Collection[str]) -> None:
        """Take out the steps that a row's mask calls padding, in place."""
        if any(isinstance(mask, PackedSequence) for mask in masks):
            for row, mask in enumerate(masks):
                if not (isinstance(mask, PackedSequence) and bool(mask.data.all())):
                    raise ValueError(
                        f"'attention_mask' of row {row} cannot cut rows that are packed already: pack only real "
                        f"steps, and leave out the mask"
                    )
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
            and all(
                isinstance(value, Tensor) and value.shape[:1] == real.shape
                for value, real in zip(values, keep, strict=True)
            )
        ]
        if aligned in ([], ["attention_mask"]):
            raise ValueError("'attention_mask' marks padding, but no other key has as many steps in every row")
        for row in padded:
            if not bool(keep[row].any()):
                if self.empty == "drop":
                    continue
                raise ValueError(f"'attention_mask' of row {row} has no real step: {_DROP}")
            if "labels" in aligned:
                _check_labels(columns["labels"][row], columns.get("input_ids"), keep[row], row)
        for key in aligned:
            for row in padded:
                columns[key][row] = columns[key][row][keep[row]]

    def _pack(
        self, packings: dict[tuple[int, ...], PackedSequence], key: str, values: list[Any], rows: list[int]
    ) -> PackedSequence:
        """Return the rows of one key as a PackedSequence; keys of the same lengths share all other fields."""
        if any(issubclass(kind, PackedSequence) for kind in set(map(type, values))):
            return self._join(key, values, rows)
        shapes = [tuple(value.shape) for value in values]
        if len({shape[1:] for shape in shapes}) > 1 or not all(shape and shape[0] for shape in shapes):
            for row, value in zip(rows, values, strict=True):
                _check_sequence(key, row, value, values[0], rows[0])
        lengths = tuple(shape[0] for shape in shapes)
        if lengths not in packings:
            packings[lengths] = packing_of(torch.tensor(lengths, device="cpu"), keep_order=self.enforce_sorted)
        return packed_like(packings[lengths], torch.cat(_promote(key, values, rows)))

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
            _check_sequence(key, row, value.data, values[0].data, rows[0])
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


def _batch_names(keys: Collection[str]) -> set[str]:
    """Return the names that keys of the features have in the batch."""
    return {"labels" if key in _LABEL_NAMES else key for key in keys}


# --- the rows of one key: to tensors, checked, stacked, chosen and ordered ---------------------------------


def _as_tensor(value: Any, key: str, row: int) -> Tensor | PackedSequence:
    """Return a row as a tensor; one that is packed already as it is."""
    if type(value) is Tensor or isinstance(value, PackedSequence):
        return value
    try:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], np.ndarray):
            # torch reads a list of arrays element by element.
            value = np.stack(value)
        # Batches are made on the CPU, whatever the default device is; what is a tensor stays on its own.
        return torch.as_tensor(value, device=value.device if isinstance(value, Tensor) else "cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{key!r} of row {row} must be a number, or evenly nested numbers (list, array, tensor): {error}"
        ) from error


def _check_labels(labels: Tensor, input_ids: list[Any] | None, keep: Tensor, row: int) -> None:
    """Raise where cutting would lose a label that counts.

    Labels as long as the mask may still be those of another sequence, a target padded to the same length.
    """
    if labels.dim() != 1:
        return
    lost = ~keep & (labels != _IGNORED)
    if input_ids is not None and isinstance(ids := input_ids[row], Tensor) and ids.shape == labels.shape:
        # Labels that repeat the inputs repeat their padding.
        lost &= labels != ids
    if bool(lost.any()):
        step = int(lost.nonzero()[0])
        raise ValueError(
            f"'labels' of row {row} hold {labels[step].item()} at step {step}, which 'attention_mask' calls "
            f"padding: put {_IGNORED} there, or leave out the padding and the mask"
        )


def _stack(key: str, values: list[Any], rows: list[int]) -> Tensor:
    """Return the rows as one tensor ``[B, *]``."""
    for row, value in zip(rows, values, strict=True):
        if isinstance(value, PackedSequence):
            raise ValueError(f"{key!r} of row {row} is a PackedSequence, which cannot be stacked: pack the key")
        if value.shape != values[0].shape:
            raise ValueError(
                f"{key!r} of row {row} has shape {list(value.shape)}, but row {rows[0]} has "
                f"{list(values[0].shape)}: what is stacked must have one shape; to pack the key, name it in "
                f"packed_keys, to pad it, in padded_keys"
            )
    return torch.stack(_promote(key, values, rows))


def _pad_rows(key: str, values: list[Any], rows: list[int]) -> Tensor:
    """Return the rows as one tensor ``[B, T, *]``, padded with -100; a row may be empty."""
    first = next((place for place, value in enumerate(values) if _steps(value)), None)
    for row, value in zip(rows, values, strict=True):
        if isinstance(value, PackedSequence):
            raise ValueError(f"{key!r} of row {row} is a PackedSequence, which cannot be padded: pack the key")
        if first is not None and _steps(value) != 0:
            _check_sequence(key, row, value, values[first], rows[first])
    # Of an empty list, neither the dtype nor the shape of the steps is known.
    nothing = torch.empty(0, dtype=torch.int64, device="cpu") if first is None else values[first][:0]
    values = _promote(key, [value if len(value) else nothing for value in values], rows)
    dtype = dtype_with(values[0].dtype, _IGNORED)
    return pad_sequence([value.to(dtype) for value in values], batch_first=True, padding_value=_IGNORED)


def _check_sequence(key: str, row: int, value: Tensor, first: Tensor, first_row: int) -> None:
    """Raise if the steps of a row ``[T, *]`` cannot be packed with those of the first one."""
    if value.dim() == 0:
        raise ValueError(f"{key!r} of row {row} must be a sequence, found the number {value.item()}")
    if len(value) == 0:
        raise ValueError(f"{key!r} of row {row} is empty: {_DROP}")
    if value.shape[1:] != first.shape[1:]:
        raise ValueError(
            f"{key!r} of row {row} has steps of shape {list(value.shape[1:])}, but row {first_row} has "
            f"{list(first.shape[1:])}: every step must have the same features"
        )


def _without_empty(columns: dict[str, list[Any]], packed: list[str]) -> list[int]:
    """Return the rows without those that have a sequence without steps."""
    count = len(next(iter(columns.values()), []))
    rows = [row for row in range(count) if all(_steps(columns[key][row]) != 0 for key in packed)]
    if not rows:
        raise ValueError(
            f"each of the {count} rows of the batch has a sequence without steps in one of {packed}, so that nothing "
            f"is left of it: drop such rows from the data set, as dataset.filter(lambda row: len(row[key]) > 0) does"
        )
    return rows


def _by_length(columns: dict[str, list[Any]], packed: list[str], rows: list[int]) -> list[int]:
    """Return the rows from the longest down; rows of one length stay in their order."""
    for key in packed:
        for row in rows:
            value = columns[key][row]
            if isinstance(value, PackedSequence) and batch_size(value) != 1:
                raise ValueError(
                    f"enforce_sorted sorts rows, but {key!r} of row {row} holds {batch_size(value)} sequences: "
                    f"expected one a row"
                )
    ordered = sorted(rows, key=lambda row: [-(_steps(columns[key][row]) or 0) for key in packed])
    for key in packed:
        steps = [_steps(columns[key][row]) or 0 for row in ordered]
        if steps != sorted(steps, reverse=True):
            raise ValueError(
                f"enforce_sorted found no order of the rows that sorts all keys: sorted by {packed[0]!r}, {key!r} has "
                f"the lengths {steps}. Leave it off, or give the keys the same lengths"
            )
    return ordered


def _steps(value: Any) -> int | None:
    """Return the number of steps of a row; None for a number, which has none."""
    if isinstance(value, PackedSequence):
        return num_tokens(value)
    return len(value) if value.dim() else None


def _promote(key: str, values: list[Tensor], rows: list[int]) -> list[Tensor]:
    """Return the values in the one dtype that torch promotes them to."""
    dtypes = list(dict.fromkeys(value.dtype for value in values))
    if len(dtypes) == 1:
        return values
    try:
        common = reduce(torch.promote_types, dtypes)
    except RuntimeError as error:
        row = next(row for row, value in zip(rows, values, strict=True) if value.dtype != dtypes[0])
        raise ValueError(
            f"{key!r} is {dtypes[0]} in row {rows[0]} but {dtypes[1]} in row {row}, with no common dtype: "
            f"convert them to one"
        ) from error
    return [value.to(common) for value in values]
