"""``accelerate.utils.operations``: what is done to a batch between processes, and before it is gathered.

The data loader of an ``IterableDataset`` runs most of these, even in a single process: process 0 concatenates batches,
describes the result, broadcasts it, and every process slices its part out of it.

Functions that communicate (``broadcast``, ``pad_across_processes``, ``gather``) have no ``upstream_supports``: calling
one creates ``PartialState``, which fixes for good whether and how this process is distributed. That is up to the
Trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_packfix.engine import probe
from hf_packfix.engine.declare import always, around, holds_packed, on_leaf
from hf_packfix.engine.lazily import evaluation, packing, torch
from hf_packfix.engine.targets import Function

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn.utils.rnn import PackedSequence


@around(
    "accelerate.utils.operations:find_batch_size",
    when=always,
    parameters=("data",),
    problem="silently counts the tokens of a PackedSequence as its batch size",
    fix="counts the sequences",
    upstream_supports=lambda original: original(probe.packed()) == 2,
    silent="always",
)
def find_batch_size(original: Function, data: Any) -> Any:
    """Return B, the number of sequences; the original calls itself by its global name for what is nested.

    Raises:
        ValueError: as the original, or naming the key of a PackedSequence that is inconsistent.
    """
    if packing.is_packed(data):
        return packing.batch_size(data)
    try:
        return original(data)
    except ValueError:
        packing.check_batch(data)
        raise


@around(
    "accelerate.utils.operations:slice_tensors",
    parameters=("data", "tensor_slice"),
    problem="silently slices the rows of data, which belong to many sequences",
    fix="takes whole sequences",
    upstream_supports=lambda original: packing.lengths(original(probe.packed(), slice(1, 2))).tolist() == [2],
    silent="always",
)
def slice_tensors(original: Function, data: Any, tensor_slice: Any, *args: Any, **kwargs: Any) -> Any:
    """Take the sequences of a slice, in original order.

    Raises:
        TypeError: ``tensor_slice`` is not a slice.
        ValueError: two keys of a mapping differ in their numbers of rows.
    """
    if not isinstance(tensor_slice, slice):
        raise TypeError(
            f"a PackedSequence can be cut by a slice of its sequences, found {type(tensor_slice).__name__}"
        )
    if isinstance(data, Mapping):
        rows = packing.rows_of_keys(data, (packing.PackedSequence, torch.Tensor))
        if len(set(rows.values())) > 1:
            found = ", ".join(f"{key!r} has {count}" for key, count in rows.items())
            raise ValueError(
                f"a batch with packed sequences can be cut only if every key has one sequence or row for each row of "
                f"the batch, found: {found}. Batches are cut where one process loads the data for all: turn that off "
                f"with TrainingArguments(accelerator_config={{'dispatch_batches': False}}), or use a data set with a "
                f"length"
            )
    return packing.merge_packed(
        lambda packed: packing.take(packed, tensor_slice),
        data,
        lambda rest: original(rest, tensor_slice, *args, **kwargs),
    )


@around(
    "accelerate.utils.operations:concatenate",
    parameters=("data", "dim"),
    problem="silently concatenates the fields of PackedSequences one by one",
    fix="concatenates their sequences",
    upstream_supports=lambda original: packing.lengths(original([probe.packed()] * 2)).tolist() == [1, 2, 1, 2],
    silent="always",
)
def concatenate(original: Function, data: Any, dim: int = 0) -> Any:
    """Concatenate along the batch; the original calls itself by its global name for what is nested.

    Raises:
        TypeError: along another dimension, or with something that is not packed.
        ValueError: naming key and batch, the steps differ in shape, or a PackedSequence is inconsistent.
    """
    if not any(map(packing.is_packed, data)):
        try:
            return original(data, dim=dim)
        except ValueError:
            packing.check_alike(data)
            raise
    others = {type(item).__name__ for item in data if not packing.is_packed(item)}
    if others:
        raise TypeError(f"can only concatenate a PackedSequence with its like, found {', '.join(sorted(others))}")
    if dim != 0:
        raise TypeError(f"a PackedSequence can be concatenated along the batch (dim 0) alone, found dim {dim}")
    return packing.concatenate(data)


def _shares_indices(original: Function) -> bool:
    first, second = original([probe.packed(), probe.packed()], torch.device("meta"))
    return first.sorted_indices is second.sorted_indices


@on_leaf(
    "accelerate.utils.operations:send_to_device",
    parameters=("tensor",),
    problem="moves three tensors for every PackedSequence, one by one, and waits for each",
    fix="moves data; index tensors follow in one copy, the same one for all keys with the same lengths",
    upstream_supports=_shares_indices,
)
def send_to_device(original: Function, packed: PackedSequence, *args: Any, **kwargs: Any) -> PackedSequence:
    """Move ``data`` as the original moves a tensor."""
    return packing.with_data(packed, original(packed.data, *args, **kwargs))


@around(
    "accelerate.utils.operations:get_data_structure",
    parameters=("data",),
    problem="describes the fields of a PackedSequence one by one, in a PackedSequence that cannot hold descriptions",
    fix="describes the data, and keeps the other fields",
    upstream_supports=lambda original: not isinstance(getattr(original(probe.packed()), "data", None), torch.Tensor),
)
def get_data_structure(original: Function, data: Any) -> Any:
    """Describe the ``data`` of every PackedSequence; how it is packed is sent with the description, from the CPU.

    Upstream's ``initialize_tensors`` makes a PackedSequence of this in the other processes.
    """

    def describe(packed: PackedSequence) -> PackedSequence:
        others = [None if field is None else field.cpu() for field in packed[1:]]
        return type(packed)._make([original(packed.data), *others])

    return packing.merge_packed(describe, data, original)


@around(
    "accelerate.utils.operations:broadcast",
    parameters=("tensor", "from_process"),
    problem="sends batch_sizes, which must stay on the CPU, and fails on missing index tensors",
    fix="sends data, and all batch sizes and indices in one tensor",
)
def broadcast(original: Function, tensor: Any, from_process: int = 0) -> Any:
    """Send the data of every PackedSequence in its place, and how they are packed in one tensor after everything else.

    That tensor, int64 ``[T + B]`` for each PackedSequence, goes through the device of the data, since some backends
    send nothing else, and ``batch_sizes`` come back to the CPU. As with tensors, the receivers must hold
    PackedSequences of the same sizes.
    """
    indices: list[Tensor] = []

    def data_of(packed: PackedSequence) -> Tensor:
        indices.append(packed.batch_sizes.to(packed.data.device))
        if packed.sorted_indices is not None:
            indices.append(packed.sorted_indices.to(packed.data.device))
        return packed.data

    sent = original(packing.map_packed(data_of, tensor), from_process=from_process)
    sizes = [index.numel() for index in indices]
    received = iter(original(torch.cat(indices), from_process=from_process).split(sizes))

    def whole(leaf: Any, value: Any) -> Any:
        if not packing.is_packed(leaf):
            return value
        return type(leaf)(value, next(received).cpu(), None if leaf.sorted_indices is None else next(received))

    return packing.map_leaves(whole, tensor, sent)


@around(
    "accelerate.utils.operations:pad_across_processes",
    parameters=("tensor", "dim", "pad_index", "pad_first"),
    problem="pads the fields of a PackedSequence one by one",
    fix="pads its sequences, as wide as the longest one of all processes",
)
def pad_across_processes(
    original: Function, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False
) -> Any:
    """Pad every PackedSequence to ``[B, T, *]`` with ``pad_index``, before the original pads across processes.

    The evaluation loop calls this on labels, logits and inputs at the end of every step, whoever wrote the step: here
    PackedSequences become padded tensors.
    """
    if loop := evaluation.current():
        loop.packed = True

    def pad(packed: PackedSequence) -> Any:
        padded = packing.pad(packed, pad_index, promote=True)
        # The steps differ between processes, whatever dimension the caller cares about.
        return padded if dim == 1 else original(padded, dim=1, pad_index=pad_index, pad_first=pad_first)

    return original(packing.map_packed(pad, tensor), dim=dim, pad_index=pad_index, pad_first=pad_first)


@around(
    "accelerate.utils.operations:gather",
    when=lambda tensor: evaluation.is_packed() or holds_packed(tensor),
    parameters=("tensor",),
    problem="gathers the fields of PackedSequences one by one",
    fix="gathers padded tensors, padded with -100",
    uses=("pad_across_processes",),
)
def gather(original: Function, tensor: Any) -> Any:
    """Gather ``[B, T, *]`` of every process, T being the length of the longest sequence of all.

    Bytes padded with -100, which are int16, are sent as int32: neither gloo nor nccl sends int16.
    """
    # Imported here, as everywhere, for the function that the module has now: it is patched as well.
    from accelerate.utils.operations import pad_across_processes

    padded = packing.map_packed(lambda packed: pad_across_processes(packed, dim=1, pad_index=-100), tensor)
    sent = packing.map_leaves(lambda leaf: leaf.int() if _is_int16(leaf) else leaf, padded)
    return packing.map_leaves(lambda own, all_: all_.short() if _is_int16(own) else all_, padded, original(sent))


def _is_int16(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dtype == torch.int16


@around(
    "accelerate.utils.operations:get_shape",
    parameters=("data",),
    problem="describes the fields of a PackedSequence one by one, in a PackedSequence that cannot hold shapes "
    "(ACCELERATE_DEBUG_MODE)",
    fix="returns the shape of the padded tensor",
    upstream_supports=lambda original: not isinstance(original(probe.packed()), tuple),
)
def get_shape(original: Function, data: Any) -> Any:
    """Return the shape of the padded tensor, ``[B, T, *]``, for every PackedSequence."""

    def shape_of(packed: PackedSequence) -> list[int]:
        return [packing.batch_size(packed), packed.batch_sizes.numel(), *packed.data.shape[1:]]

    return packing.merge_packed(shape_of, data, original)
