"""What the collator does with the rows of one key: to tensors, checked, stacked, chosen and ordered.

A column is the list of a key's values in all rows; ``rows`` are the numbers of those in the batch, in its order.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_packfix.packing.packed import PackedSequence, batch_size, dtype_with, num_tokens

IGNORED = -100
DROP = (
    "there is nothing to pack; drop such rows from the data set, or from their batch with empty='drop'; a target that "
    "may be empty, as that of CTC, belongs into padded_keys"
)


def as_tensor(value: Any, key: str, row: int) -> Tensor | PackedSequence:
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


def is_aligned(value: Any, mask: Tensor) -> bool:
    """Return whether a row has a step for each of a mask's."""
    return isinstance(value, Tensor) and value.shape[:1] == mask.shape


def check_labels(labels: Tensor, input_ids: list[Any] | None, keep: Tensor, row: int) -> None:
    """Raise where cutting would lose a label that counts.

    Labels as long as the mask may still be those of another sequence, a target padded to the same length.
    """
    if labels.dim() != 1:
        return
    lost = ~keep & (labels != IGNORED)
    if input_ids is not None and isinstance(ids := input_ids[row], Tensor) and ids.shape == labels.shape:
        # Labels that repeat the inputs repeat their padding.
        lost &= labels != ids
    if bool(lost.any()):
        step = int(lost.nonzero()[0])
        raise ValueError(
            f"'labels' of row {row} hold {labels[step].item()} at step {step}, which 'attention_mask' calls "
            f"padding: put {IGNORED} there, or leave out the padding and the mask"
        )


def check_packed_masks(masks: list[Any]) -> None:
    """Raise if masks of rows that are packed already call a step padding."""
    for row, mask in enumerate(masks):
        if not (isinstance(mask, PackedSequence) and bool(mask.data.all())):
            raise ValueError(
                f"'attention_mask' of row {row} cannot cut rows that are packed already: pack real steps alone, and "
                f"leave out the mask"
            )


def stack(key: str, column: list[Any], rows: list[int]) -> Tensor:
    """Return the rows as one tensor ``[B, *]``."""
    values = [column[row] for row in rows]
    for row, value in zip(rows, values, strict=True):
        if isinstance(value, PackedSequence):
            raise ValueError(f"{key!r} of row {row} is a PackedSequence, which cannot be stacked: pack the key")
        if value.shape != values[0].shape:
            raise ValueError(
                f"{key!r} of row {row} has shape {list(value.shape)}, but row {rows[0]} has "
                f"{list(values[0].shape)}: what is stacked must have one shape; to pack the key, name it in "
                f"packed_keys, to pad it, in padded_keys"
            )
    return torch.stack(promote(key, values, rows))


def pad_rows(key: str, column: list[Any], rows: list[int]) -> Tensor:
    """Return the rows as one tensor ``[B, T, *]``, padded with -100; a row may be empty."""
    values = [column[row] for row in rows]
    first = next((place for place, value in enumerate(values) if _steps(value)), None)
    for row, value in zip(rows, values, strict=True):
        if isinstance(value, PackedSequence):
            raise ValueError(f"{key!r} of row {row} is a PackedSequence, which cannot be padded: pack the key")
        if first is not None and _steps(value) != 0:
            check_sequence(key, row, value, values[first], rows[first])
    # Of an empty list, neither the dtype nor the shape of the steps is known.
    nothing = torch.empty(0, dtype=torch.int64, device="cpu") if first is None else values[first][:0]
    values = promote(key, [value if len(value) else nothing for value in values], rows)
    dtype = dtype_with(values[0].dtype, IGNORED)
    return pad_sequence([value.to(dtype) for value in values], batch_first=True, padding_value=IGNORED)


def check_sequence(key: str, row: int, value: Tensor, first: Tensor, first_row: int) -> None:
    """Raise if a row cannot be packed with the first one."""
    if value.dim() == 0:
        raise ValueError(f"{key!r} of row {row} must be a sequence, found the number {value.item()}")
    if len(value) == 0:
        raise ValueError(f"{key!r} of row {row} is empty: {DROP}")
    check_steps(key, row, value, first, first_row)


def check_steps(key: str, row: int, value: Tensor, first: Tensor, first_row: int) -> None:
    """Raise if the steps of a row differ in shape from those of the first one."""
    if value.shape[1:] != first.shape[1:]:
        raise ValueError(
            f"{key!r} of row {row} has steps of shape {list(value.shape[1:])}, but row {first_row} has "
            f"{list(first.shape[1:])}: every step must have the same features"
        )


def without_empty(columns: dict[str, list[Any]], packed: list[str]) -> list[int]:
    """Return the rows without those that have a sequence without steps."""
    count = len(next(iter(columns.values()), []))
    rows = [row for row in range(count) if all(_steps(columns[key][row]) != 0 for key in packed)]
    if not rows:
        raise ValueError(
            f"each of the {count} rows of the batch has a sequence without steps in one of {packed}, so that nothing "
            f"is left of it: drop such rows from the data set, as dataset.filter(lambda row: len(row[key]) > 0) does"
        )
    return rows


def by_length(columns: dict[str, list[Any]], packed: list[str], rows: list[int]) -> list[int]:
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


def has_steps(value: Any) -> bool:
    """Return whether a row is a sequence, and not a number."""
    return isinstance(value, PackedSequence) or value.dim() > 0


def promote(key: str, values: list[Tensor], rows: list[int]) -> list[Tensor]:
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
