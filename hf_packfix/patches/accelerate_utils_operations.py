"""``accelerate.utils.operations``: what is done to a batch between processes, and before it is gathered.

The data loader of an ``IterableDataset`` runs most of these, in a single process too: process 0 concatenates batches,
describes the result, broadcasts it, and every process slices its part out of it.

Functions that communicate (``broadcast``, ``pad_across_processes``, ``gather``) have no ``upstream_supports``: calling
one creates ``PartialState``, which fixes for good whether and how this process is distributed. That is up to the
Trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_packfix.patches import probe
from hf_packfix.patches.declare import around, on_every_packed, on_leaf
from hf_packfix.patches.lazily import evaluation, jagged, packed, torch, trees
from hf_packfix.patches.patch import Function

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn.utils.rnn import PackedSequence

__all__ = [
    "PackedInformation",
    "broadcast",
    "concatenate",
    "find_batch_size",
    "gather",
    "get_data_structure",
    "get_shape",
    "initialize_tensors",
    "pad_across_processes",
    "send_to_device",
    "slice_tensors",
]


def _lengths(sequences: PackedSequence) -> Any:
    return packed.lengths(sequences).tolist()


@around(
    "accelerate.utils.operations:find_batch_size",
    parameters=("data",),
    problem="silently counts the tokens of a PackedSequence as its batch size",
    fix="counts the sequences",
    upstream_supports=lambda original: original(probe.packed()) == 2,
)
def find_batch_size(original: Function, data: Any) -> Any:
    """Return B, the number of sequences; the original calls itself by its global name for what is nested.

    Raises:
        ValueError: as the original, or naming the key of a PackedSequence that is inconsistent.
    """
    if isinstance(data, packed.PackedSequence):
        return packed.batch_size(data)
    try:
        return original(data)
    except ValueError:
        trees.check_batch(data)
        raise


@around(
    "accelerate.utils.operations:slice_tensors",
    parameters=("data", "tensor_slice"),
    problem="silently slices the rows of data, which belong to many sequences",
    fix="takes whole sequences",
    upstream_supports=lambda original: _lengths(original(probe.packed(), slice(1, 2))) == [2],
)
def slice_tensors(original: Function, data: Any, tensor_slice: Any, *args: Any, **kwargs: Any) -> Any:
    """Take the sequences of a slice, in original order.

    Raises:
        TypeError: ``tensor_slice`` is not a slice.
        ValueError: two keys of a mapping differ in their numbers of sequences.
    """
    if not trees.contains(data):
        return original(data, tensor_slice, *args, **kwargs)
    if not isinstance(tensor_slice, slice):
        raise TypeError(
            f"a PackedSequence can be cut by a slice of its sequences, found {type(tensor_slice).__name__}"
        )
    _check_numbers_of_sequences(data)
    rest = original(trees.map_packed(lambda leaf: (), data), tensor_slice, *args, **kwargs)
    return trees.merge_packed(lambda leaf, _: jagged.take(leaf, tensor_slice), data, rest)


def _check_numbers_of_sequences(batch: Any) -> None:
    sizes = trees.sequences_of_keys(batch) if isinstance(batch, Mapping) else {}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{key!r} has {size}" for key, size in sizes.items())
        raise ValueError(
            f"a batch can be cut only if all its packed sequences have one sequence for each row, found: {found}. "
            f"Batches are cut where one process loads the data for all: turn that off with "
            f"TrainingArguments(accelerator_config={{'dispatch_batches': False}}), or use a data set with a length"
        )


@around(
    "accelerate.utils.operations:concatenate",
    parameters=("data", "dim"),
    problem="silently concatenates the fields of PackedSequences one by one",
    fix="concatenates their sequences",
    upstream_supports=lambda original: _lengths(original([probe.packed(), probe.packed()])) == [1, 2, 1, 2],
)
def concatenate(original: Function, data: Any, dim: int = 0) -> Any:
    """Concatenate along the batch; the original calls itself by its global name for what is nested.

    Raises:
        TypeError: along another dimension, or with something that is not packed.
        ValueError: naming key and batch, the steps differ in shape, or a PackedSequence is inconsistent.
    """
    if not any(isinstance(item, packed.PackedSequence) for item in data):
        try:
            return original(data, dim=dim)
        except ValueError:
            trees.check_alike(data)
            raise
    others = {type(item).__name__ for item in data if not isinstance(item, packed.PackedSequence)}
    if others:
        raise TypeError(f"can only concatenate a PackedSequence with its like, found {', '.join(sorted(others))}")
    if dim != 0:
        raise TypeError(f"a PackedSequence can be concatenated along the batch (dim 0) alone, found dim {dim}")
    return jagged.concatenate(data)


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
def send_to_device(original: Function, leaf: PackedSequence, *args: Any, **kwargs: Any) -> PackedSequence:
    """Move ``data`` as the original moves a tensor."""
    return packed.with_data(leaf, original(leaf.data, *args, **kwargs))


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


@on_every_packed(
    "accelerate.utils.operations:get_data_structure",
    parameters=("data",),
    problem="describes the fields of a PackedSequence one by one, in a PackedSequence that cannot hold descriptions",
    fix="describes its sizes",
    upstream_supports=lambda original: not isinstance(original(probe.packed()), tuple),
)
def get_data_structure(original: Function, leaf: PackedSequence) -> PackedInformation:
    """Return the sizes of the sequences as a :class:`PackedInformation`."""
    data, steps = leaf.data, leaf.batch_sizes.numel()
    return PackedInformation(data.shape, data.dtype, steps, packed.batch_size(leaf), leaf.sorted_indices is None)


@around(
    "accelerate.utils.operations:initialize_tensors",
    parameters=("data_structure",),
    problem="makes room only for tensors",
    fix="makes room for a PackedSequence as well",
)
def initialize_tensors(original: Function, data_structure: Any) -> Any:
    """Make a PackedSequence of the right sizes on the CPU, to be filled by ``broadcast``."""
    from accelerate.utils.operations import TensorInformation, recursively_apply

    tensors = original(data_structure)
    if not trees.contains(data_structure, PackedInformation, {TensorInformation}):
        return tensors
    return recursively_apply(_new_packed, tensors, test_type=lambda item: isinstance(item, PackedInformation))


def _new_packed(information: PackedInformation) -> PackedSequence:
    return packed.PackedSequence(
        torch.empty(information.shape, dtype=information.dtype, device="cpu"),
        torch.ones(information.steps, dtype=torch.int64, device="cpu"),
        None if information.is_sorted else torch.arange(information.sequences, device="cpu"),
    )


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
    if not trees.contains(tensor):
        return original(tensor, from_process=from_process)
    indices: list[Tensor] = []

    def data_of(leaf: PackedSequence) -> Tensor:
        indices.append(leaf.batch_sizes.to(leaf.data.device))
        if leaf.sorted_indices is not None:
            indices.append(leaf.sorted_indices.to(leaf.data.device))
        return leaf.data

    sent = original(trees.map_packed(data_of, tensor), from_process=from_process)
    sizes = [index.numel() for index in indices]
    received = iter(original(torch.cat(indices), from_process=from_process).split(sizes))

    def whole(leaf: PackedSequence, data: Tensor) -> PackedSequence:
        batch_sizes = next(received).cpu()
        return type(leaf)(data, batch_sizes, None if leaf.sorted_indices is None else next(received))

    return trees.merge_packed(whole, tensor, sent)


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
    PackedSequences become padded tensors. These remember their lengths, so the loop can keep them without padding.
    """
    if not trees.contains(tensor):
        return original(tensor, dim=dim, pad_index=pad_index, pad_first=pad_first)
    evaluation.note_packed()

    def pad(leaf: PackedSequence) -> Any:
        padded = packed.pad(leaf, pad_index, promote=True)
        # The steps differ between processes, whatever dimension the caller cares about.
        return padded if dim == 1 else original(padded, dim=1, pad_index=pad_index, pad_first=pad_first)

    padded = original(trees.map_packed(pad, tensor), dim=dim, pad_index=pad_index, pad_first=pad_first)
    as_in_the_loop = dim == 1 and pad_index == -100 and not pad_first
    if not as_in_the_loop:
        return padded
    return trees.merge_packed(lambda leaf, value: evaluation.with_lengths(value, packed.lengths(leaf)), tensor, padded)


@around(
    "accelerate.utils.operations:gather",
    parameters=("tensor",),
    problem="gathers the fields of PackedSequences one by one",
    fix="gathers padded tensors, padded with -100",
)
def gather(original: Function, tensor: Any) -> Any:
    """Gather ``[B, T, *]`` of every process, T being the length of the longest sequence of all.

    If padded tensors remember their lengths, these are gathered as well, and the result remembers those of all. Bytes
    padded with -100, which are int16, are sent as int32: neither gloo nor nccl sends int16.
    """
    if trees.contains(tensor):
        # Imported here, as everywhere, for the function that the module has now: it is patched, too.
        from accelerate.utils import operations

        tensor = trees.map_packed(lambda leaf: operations.pad_across_processes(leaf, dim=1, pad_index=-100), tensor)
    if not trees.any_leaf(tensor, evaluation.has_lengths):
        return original(tensor)
    sent = trees.merge_packed(lambda short, _: short.int(), tensor, tensor, _is_padded_int16)
    gathered = original(sent)
    if gathered is sent:  # a single process: the same objects
        return tensor

    def with_lengths(own: Tensor, all_of_them: Tensor) -> Tensor:
        all_of_them = all_of_them.to(own.dtype)
        known = evaluation.lengths_of(own)
        # Every process sends, whether or not its tensor was changed since: the others wait for it.
        lengths = torch.full((len(own),), -1, device="cpu") if known is None else known
        everyone = original(lengths.to(own.device)).cpu()
        return all_of_them if bool((everyone < 0).any()) else evaluation.with_lengths(all_of_them, everyone)

    return trees.merge_packed(with_lengths, tensor, gathered, evaluation.has_lengths)


def _is_padded_int16(leaf: Any) -> bool:
    return evaluation.has_lengths(leaf) and leaf.dtype == torch.int16


@on_every_packed(
    "accelerate.utils.operations:get_shape",
    parameters=("data",),
    problem="describes the fields of a PackedSequence one by one, in a PackedSequence that cannot hold shapes "
    "(ACCELERATE_DEBUG_MODE)",
    fix="returns the shape of the padded tensor",
    upstream_supports=lambda original: not isinstance(original(probe.packed()), tuple),
)
def get_shape(original: Function, leaf: PackedSequence) -> list[int]:
    """Return the shape of the padded tensor, ``[B, T, *]``."""
    return [packed.batch_size(leaf), leaf.batch_sizes.numel(), *leaf.data.shape[1:]]
