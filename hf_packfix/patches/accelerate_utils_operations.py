"""``accelerate.utils.operations``: what is done to a batch between processes, and before it is gathered.

The data loader of an ``IterableDataset`` runs most of these, in a single process too: process 0 concatenates
batches, describes the result, broadcasts it, and every process slices its part out of it.

What communicates (``broadcast``, ``pad_across_processes``, ``gather``) has no probe: calling it creates
``PartialState``, which fixes for good whether and how this process is distributed. That is up to the Trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_packfix.patches import probe
from hf_packfix.patches.patch import Function, Patch, patch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hf_packfix.packed import PackedSequence

__all__ = ["PATCHES"]

#: What stands for a PackedSequence where the original handles the rest; it has nothing to do for an empty tuple.
_NOTHING = ()


def _lengths(packed: PackedSequence) -> Any:
    from hf_packfix.packed import lengths

    return lengths(packed).tolist()


@patch(
    "accelerate.utils.operations:find_batch_size",
    reason="silently takes the number of tokens for the number of sequences",
    parameters=("data",),
    handled=lambda original: original(probe.packed()) == 2,
)
def find_batch_size(original: Function, patch: Patch) -> Function:
    """Count the sequences; the original calls itself by its global name for what is nested."""
    from hf_packfix.nested import check_batch
    from hf_packfix.packed import PackedSequence, batch_size

    def find_batch_size(data: Any) -> Any:
        if isinstance(data, PackedSequence) and patch.active:
            return batch_size(data)
        try:
            return original(data)
        except ValueError:
            if patch.active:
                check_batch(data)
            raise

    return find_batch_size


@patch(
    "accelerate.utils.operations:slice_tensors",
    reason="silently slices the rows of data, which belong to many sequences; takes whole sequences",
    parameters=("data", "tensor_slice"),
    handled=lambda original: _lengths(original(probe.packed(), slice(1, 2))) == [2],
)
def slice_tensors(original: Function, patch: Patch) -> Function:
    """Take the sequences of a slice, in original order.

    Raises:
        TypeError: ``tensor_slice`` is not a slice.
        ValueError: two keys of a mapping differ in their numbers of sequences.
    """
    from hf_packfix import nested
    from hf_packfix.packed import take

    def slice_tensors(data: Any, tensor_slice: Any, *args: Any, **kwargs: Any) -> Any:
        if not (patch.active and nested.contains(data)):
            return original(data, tensor_slice, *args, **kwargs)
        if not isinstance(tensor_slice, slice):
            raise TypeError(
                f"a PackedSequence can be cut by a slice of its sequences, found {type(tensor_slice).__name__}"
            )

        sizes = nested.sequences_of_keys(data) if isinstance(data, Mapping) else {}
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{key!r} has {size}" for key, size in sizes.items())
            raise ValueError(
                f"a batch can be cut only if all its packed sequences have one sequence for each row, found: {found}. "
                f"Batches are cut where one process loads the data for all: turn that off with "
                f"TrainingArguments(accelerator_config={{'dispatch_batches': False}}), or use a data set with a length"
            )

        def part(packed: PackedSequence, _: Any) -> PackedSequence:
            return take(packed, tensor_slice)

        bare = nested.replace(lambda packed: _NOTHING, data)
        return nested.graft(part, data, original(bare, tensor_slice, *args, **kwargs))

    return slice_tensors


@patch(
    "accelerate.utils.operations:concatenate",
    reason="silently concatenates the fields of packs one by one; concatenates their sequences",
    parameters=("data", "dim"),
    handled=lambda original: _lengths(original([probe.packed(), probe.packed()])) == [1, 2, 1, 2],
)
def concatenate(original: Function, patch: Patch) -> Function:
    """Concatenate along the batch; the original calls itself by its global name for what is nested.

    Raises:
        TypeError: along another dimension, or with something that is not packed.
        ValueError: naming key and batch, the steps differ in shape, or a PackedSequence is inconsistent.
    """
    from hf_packfix import packed
    from hf_packfix.nested import check_alike
    from hf_packfix.packed import PackedSequence

    def concatenate(data: Any, dim: int = 0) -> Any:
        if not patch.active:
            return original(data, dim=dim)
        if not any(isinstance(item, PackedSequence) for item in data):
            try:
                return original(data, dim=dim)
            except ValueError:
                check_alike(data)
                raise
        others = {type(item).__name__ for item in data if not isinstance(item, PackedSequence)}
        if others:
            raise TypeError(f"can only concatenate a PackedSequence with its like, found {', '.join(sorted(others))}")
        if dim != 0:
            raise TypeError(f"a PackedSequence can be concatenated along the batch (dim 0) alone, found dim {dim}")
        return packed.concatenate(data)

    return concatenate


@dataclass(frozen=True)
class PackedInformation:
    """The shape of a PackedSequence, as ``TensorInformation`` is that of a tensor; it is sent to other processes.

    Attributes:
        shape: of ``data``, ``[N, *]``.
        dtype: of ``data``.
        steps: T, the length of ``batch_sizes``.
        sequences: B, the length of the index tensors.
        is_sorted: whether there are no index tensors.
    """

    shape: torch.Size
    dtype: torch.dtype
    steps: int
    sequences: int
    is_sorted: bool


@patch(
    "accelerate.utils.operations:get_data_structure",
    reason="describes the fields of a pack one by one, in a pack that cannot hold descriptions",
    parameters=("data",),
    handled=lambda original: not isinstance(original(probe.packed()), tuple),
)
def get_data_structure(original: Function, patch: Patch) -> Function:
    """Describe a pack as a :class:`PackedInformation`."""
    from hf_packfix import nested
    from hf_packfix.packed import batch_size

    def describe(packed: PackedSequence) -> PackedInformation:
        data = packed.data
        steps = packed.batch_sizes.numel()
        return PackedInformation(data.shape, data.dtype, steps, batch_size(packed), packed.sorted_indices is None)

    def get_data_structure(data: Any) -> Any:
        return original(nested.replace(describe, data) if patch.active and nested.contains(data) else data)

    return get_data_structure


@patch(
    "accelerate.utils.operations:initialize_tensors",
    reason="makes room for what get_data_structure described, which may be a pack",
    parameters=("data_structure",),
)
def initialize_tensors(original: Function, patch: Patch) -> Function:
    """Make a PackedSequence of the right sizes on the CPU, to be filled by ``broadcast``."""
    import torch
    from accelerate.utils.operations import TensorInformation, recursively_apply

    from hf_packfix import nested
    from hf_packfix.packed import PackedSequence

    described = {TensorInformation}

    def make(information: PackedInformation) -> PackedSequence:
        return PackedSequence(
            torch.empty(information.shape, dtype=information.dtype, device="cpu"),
            torch.ones(information.steps, dtype=torch.int64, device="cpu"),
            None if information.is_sorted else torch.arange(information.sequences, device="cpu"),
        )

    def initialize_tensors(data_structure: Any) -> Any:
        tensors = original(data_structure)
        if not (patch.active and nested.contains(data_structure, PackedInformation, described)):
            return tensors
        return recursively_apply(make, tensors, test_type=lambda item: isinstance(item, PackedInformation))

    return initialize_tensors


@patch(
    "accelerate.utils.operations:broadcast",
    reason="sends batch_sizes, which must be on the CPU, and fails on missing indices; sends data and one layout",
    parameters=("tensor", "from_process"),
)
def broadcast(original: Function, patch: Patch) -> Function:
    """Send the data of all packs where they stand, and their layouts in one tensor after everything else.

    The layout, int64 ``[T + B]`` for each pack, goes through the device of the data, since some backends send
    nothing else, and ``batch_sizes`` come back to the CPU. As with tensors, the receivers must hold packs of
    the same sizes.
    """
    import torch

    from hf_packfix import nested

    def broadcast(tensor: Any, from_process: int = 0) -> Any:
        if not (patch.active and nested.contains(tensor)):
            return original(tensor, from_process=from_process)
        layouts: list[Tensor] = []

        def data_of(packed: PackedSequence) -> Tensor:
            layouts.append(packed.batch_sizes.to(packed.data.device))
            if packed.sorted_indices is not None:
                layouts.append(packed.sorted_indices.to(packed.data.device))
            return packed.data

        bare = nested.replace(data_of, tensor)
        sizes = [layout.numel() for layout in layouts]
        sent = original(bare, from_process=from_process)
        fields = iter(original(torch.cat(layouts), from_process=from_process).split(sizes))

        def whole(packed: PackedSequence, data: Tensor) -> PackedSequence:
            batch_sizes = next(fields).cpu()
            return type(packed)(data, batch_sizes, None if packed.sorted_indices is None else next(fields))

        return nested.graft(whole, tensor, sent)

    return broadcast


@patch(
    "accelerate.utils.operations:pad_across_processes",
    reason="pads the fields of a pack one by one; gives its rectangle, as wide as the widest of all processes",
    parameters=("tensor", "dim", "pad_index", "pad_first"),
)
def pad_across_processes(original: Function, patch: Patch) -> Function:
    """Turn every PackedSequence into ``[B, T, *]``, padded with ``pad_index``, before the original pads.

    The evaluation loop calls this on labels, logits and inputs at the end of every step, whoever wrote the
    step: it is where packs become rectangles. They remember their lengths, so that the loop can keep them flat.
    """
    from hf_packfix import nested
    from hf_packfix.packed import lengths, pad
    from hf_packfix.ragged import note_packed, remember

    def pad_across_processes(tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        if not (patch.active and nested.contains(tensor)):
            return original(tensor, dim=dim, pad_index=pad_index, pad_first=pad_first)
        note_packed()

        def rectangle(packed: PackedSequence) -> Any:
            padded = pad(packed, pad_index, promote=True)
            # The steps differ between processes, whatever dimension the caller cares about.
            return padded if dim == 1 else original(padded, dim=1, pad_index=pad_index, pad_first=pad_first)

        def with_lengths(packed: PackedSequence, padded: Tensor) -> Tensor:
            return remember(padded, lengths(packed))

        padded = original(nested.replace(rectangle, tensor), dim=dim, pad_index=pad_index, pad_first=pad_first)
        as_in_the_loop = dim == 1 and pad_index == -100 and not pad_first
        return nested.graft(with_lengths, tensor, padded) if as_in_the_loop else padded

    return pad_across_processes


@patch(
    "accelerate.utils.operations:gather",
    reason="gathers the fields of packs one by one; gathers their rectangles, padded with -100",
    parameters=("tensor",),
)
def gather(original: Function, patch: Patch) -> Function:
    """Gather ``[B, T, *]`` of every process, T being that of the longest sequence of all.

    The lengths of rectangles that remember them are gathered, too, and the result remembers those of all. Rectangles
    of int16, which bytes become that are padded with -100, are sent as int32: neither gloo nor nccl sends int16.
    """
    import torch

    from hf_packfix import nested
    from hf_packfix.ragged import is_remembered, lengths_of, remember

    def is_short(leaf: Any) -> bool:
        return is_remembered(leaf) and leaf.dtype == torch.int16

    def whole(own: Tensor, gathered: Tensor) -> Tensor:
        gathered = gathered.to(own.dtype)
        known = lengths_of(own)
        # Every process sends, whether or not its rectangle was changed since: the others wait for it.
        sent = torch.full((len(own),), -1, device="cpu") if known is None else known
        everyone = original(sent.to(own.device)).cpu()
        return gathered if bool((everyone < 0).any()) else remember(gathered, everyone)

    def gather(tensor: Any) -> Any:
        if not patch.active:
            return original(tensor)
        if nested.contains(tensor):
            from accelerate.utils import operations

            # By its name in the module, where it gives rectangles; tensors beside packs are left as they are.
            tensor = nested.replace(
                lambda packed: operations.pad_across_processes(packed, dim=1, pad_index=-100), tensor
            )
        sent = nested.graft(lambda short, _: short.int(), tensor, tensor, is_short)
        gathered = original(sent)
        if gathered is sent:  # a single process: the same objects
            return tensor
        return nested.graft(whole, tensor, gathered, is_remembered)

    return gather


@patch(
    "accelerate.utils.operations:get_shape",
    reason="describes the fields of a pack one by one, in a pack that cannot hold shapes (ACCELERATE_DEBUG_MODE)",
    parameters=("data",),
    handled=lambda original: not isinstance(original(probe.packed()), tuple),
)
def get_shape(original: Function, patch: Patch) -> Function:
    """Give the shape of the rectangle: ``[B, T, *]`` as a list."""
    from hf_packfix import nested
    from hf_packfix.packed import batch_size

    def shape(packed: PackedSequence, _: Any) -> list[int]:
        return [batch_size(packed), packed.batch_sizes.numel(), *packed.data.shape[1:]]

    def get_shape(data: Any) -> Any:
        if not (patch.active and nested.contains(data)):
            return original(data)
        return nested.graft(shape, data, original(nested.replace(lambda packed: _NOTHING, data)))

    return get_shape


PATCHES = (
    find_batch_size,
    slice_tensors,
    concatenate,
    get_data_structure,
    initialize_tensors,
    broadcast,
    pad_across_processes,
    gather,
    get_shape,
)
