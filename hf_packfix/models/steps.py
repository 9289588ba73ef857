"""Between padded tensors and PackedSequences, for the recurrent models.

Steps come in one of two layouts: a padded tensor ``[B, T, *]``, with ``real`` (bool ``[B, T]``) true at the steps
that are not padding, or a PackedSequence. ``real`` may be any pattern: a sequence is its real steps,
in order, wherever they stand, so padding on the left, on the right and in between are the same to a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from hf_packfix.packing.packed import PackedSequence, batch_size, move_without_waiting, with_data

Steps: TypeAlias = Tensor | PackedSequence

#: Whether ``torch.export`` records, as ``torch.onnx.export(dynamo=True)`` lets it; torch < 2.7 cannot tell.
is_exporting: Callable[[], bool] = getattr(getattr(torch, "compiler", None), "is_exporting", lambda: False)
#: Whether ``torch.jit.trace`` records, as ``torch.onnx.export(dynamo=False)`` lets it.
is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


def real_steps(attention_mask: Steps | None, inputs: Steps, *, continues: bool = False) -> Tensor | None:
    """Return which steps of padded inputs are real: bool ``[B, T]``.

    Args:
        attention_mask: ``[B, T]``, zero at padding; None if there is none. Packed inputs have none, or a
            packed one, which changes nothing.
        inputs: ``[B, T, *]``, or packed.
        continues: whether the inputs continue sequences; the mask may then begin with the steps before.

    Returns:
        None if all steps are real, and for packed inputs; while the program is recorded, only without a mask.

    Raises:
        ValueError: one is packed and the other is not, the mask has another shape than the inputs, or a row
            of it has no real step.
    """
    if attention_mask is None or (isinstance(inputs, PackedSequence) and isinstance(attention_mask, PackedSequence)):
        return None
    if isinstance(inputs, PackedSequence) or isinstance(attention_mask, PackedSequence):
        found = "padded" if isinstance(inputs, PackedSequence) else "packed"
        raise ValueError(
            f"found a {found} attention_mask beside inputs that are not: packed inputs need none, padded "
            f"ones a padded one"
        )
    shape = inputs.shape[:2]
    if continues:
        attention_mask = attention_mask[:, -shape[1] :]
    if is_exporting() or is_tracing():
        return attention_mask.bool()  # no branch: what is recorded must be right for any later mask
    if attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask must have the shape of the inputs, {list(shape)}, found {list(attention_mask.shape)}"
        )
    real = attention_mask.bool()
    if bool(real.all()):
        return None
    empty = (~real.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"attention_mask has no real step in row {empty[0]}: drop empty sequences from the batch")
    return real


def map_steps(function: Callable[[Tensor], Tensor], steps: Steps) -> Steps:
    """Apply a function of the last dimension to every step, in the layout of ``steps``."""
    if isinstance(steps, PackedSequence):
        return with_data(steps, function(steps.data))
    return function(steps)


def previous_rows(packed: PackedSequence) -> Tensor:
    """Return for every row of ``data`` after the first steps the row one step before: int64 ``[N - B]``.

    The first ``batch_sizes[0]`` rows of ``data`` are first steps; row n of step t follows row
    ``n - batch_sizes[t - 1]``, since sequences keep their rank from step to step.
    """
    sizes = packed.batch_sizes
    rows = torch.arange(batch_size(packed), packed.data.shape[0], device="cpu")
    return move_without_waiting(rows - sizes[:-1].repeat_interleave(sizes[1:]), packed.data.device)
