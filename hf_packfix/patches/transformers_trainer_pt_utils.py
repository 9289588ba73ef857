"""``transformers.trainer_pt_utils``: label smoothing, and what the evaluation loop does to a batch."""

from __future__ import annotations

from typing import Any

from hf_packfix.patches import probe
from hf_packfix.patches.patch import Function, Patch, patch

__all__ = ["PATCHES"]


def _handles_smoothing(original: Function) -> bool:
    from types import SimpleNamespace

    import torch

    labels = probe.packed()
    labels = labels._replace(data=labels.data % 2)
    logits = labels._replace(data=torch.eye(3, device="cpu")[:, :2])
    smoother = SimpleNamespace(epsilon=0.1, ignore_index=-100)
    loss = original(smoother, {"logits": logits}, labels)
    return bool(loss == original(smoother, {"logits": logits.data}, labels.data))


@patch(
    "transformers.trainer_pt_utils:LabelSmoother.__call__",
    reason="label smoothing treats packed logits and labels as tensors; smooths over the real tokens",
    parameters=("self", "model_output", "labels"),
    handled=_handles_smoothing,
)
def smooth_labels(original: Function, patch: Patch) -> Function:
    """Smooth over the rows of ``data``, or over rectangles where the loss needs to know the steps."""
    from hf_packfix.packed import PackedSequence, same_packing

    def __call__(  # noqa: N807
        self: Any, model_output: Any, labels: Any, shift_labels: bool = False, **kwargs: Any
    ) -> Any:
        if patch.active:
            if isinstance(model_output, PackedSequence):
                logits: Any = model_output  # not a tuple of outputs, whose first would be its data
            else:
                logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
            if isinstance(logits, PackedSequence) or isinstance(labels, PackedSequence):
                if (
                    not shift_labels
                    and isinstance(logits, PackedSequence)
                    and isinstance(labels, PackedSequence)
                    and same_packing(logits, labels)
                ):
                    logits, labels = logits.data, labels.data
                else:
                    logits, labels = _rectangles(logits, labels, self.ignore_index)
                model_output = {"logits": logits}
        return original(self, model_output, labels, shift_labels, **kwargs)

    return __call__


def _rectangles(logits: Any, labels: Any, ignore_index: int) -> tuple[Any, Any]:
    """Return logits ``[B, T, C]`` and labels ``[B, T]``, one of them packed, over the same steps.

    Raises:
        ValueError: both are packed and a sequence has more logits than labels, or fewer.
    """
    import torch

    from hf_packfix.packed import PackedSequence, lengths, pad

    if isinstance(logits, PackedSequence) and isinstance(labels, PackedSequence):
        of_logits, of_labels = lengths(logits), lengths(labels)
        if not torch.equal(of_logits, of_labels):
            raise ValueError(
                f"label smoothing needs one label a step of the logits: the packed logits have the lengths "
                f"{of_logits.tolist()}, the packed labels {of_labels.tolist()}"
            )
    if isinstance(labels, PackedSequence):
        # A model may pad its logits to more steps than the longest sequence of labels has.
        steps = None if isinstance(logits, PackedSequence) else logits.shape[1]
        labels = pad(labels, ignore_index, total_length=steps, promote=True)
    if isinstance(logits, PackedSequence):
        # What stands behind the end of a sequence does not matter: its label is `ignore_index`.
        logits = pad(logits, 0.0, total_length=labels.shape[1])
    return logits, labels


# The functions below call themselves by their global name, so the wrapper meets every leaf of a nested
# argument and has to look at none but its own. The same holds for the named tuples that they rebuild from a
# generator, as they do tuples: rebuilt here, item by item.


@patch(
    "transformers.trainer_pt_utils:nested_detach",
    reason="rebuilds tuples from a generator; detaches the data and keeps the packing",
    parameters=("tensors",),
    handled=lambda original: _is_packed(original(probe.packed())),
)
def nested_detach(original: Function, patch: Patch) -> Function:
    """Detach ``data``; what comes back is packed as before."""
    from hf_packfix.nested import is_namedtuple, rebuild
    from hf_packfix.packed import PackedSequence, with_data

    def nested_detach(tensors: Any) -> Any:
        if isinstance(tensors, tuple) and patch.active:
            if isinstance(tensors, PackedSequence):
                return with_data(tensors, tensors.data.detach())
            if is_namedtuple(tensors):
                return rebuild(tensors, list(map(nested_detach, tensors)))
        return original(tensors)

    return nested_detach


@patch(
    "transformers.trainer_pt_utils:nested_concat",
    reason="concatenates the fields of two packs one by one; concatenates their sequences, as rectangles",
    parameters=("tensors", "new_tensors", "padding_index"),
    handled=lambda original: original(probe.packed(), probe.packed()).shape == (4, 2),
)
def nested_concat(original: Function, patch: Patch) -> Function:
    """Concatenate ``[B, T, *]`` and ``[B', T', *]`` to ``[B + B', max(T, T'), *]``, in original order.

    Raises:
        ValueError: the trailing dimensions ``*`` differ; the original would repeat a dimension of size one.
    """
    from hf_packfix.nested import is_namedtuple, rebuild
    from hf_packfix.packed import PackedSequence, pad

    def nested_concat(tensors: Any, new_tensors: Any, padding_index: Any = -100) -> Any:
        if patch.active:
            if isinstance(tensors, PackedSequence):
                tensors = pad(tensors, padding_index, promote=True)
            if isinstance(new_tensors, PackedSequence):
                new_tensors = pad(new_tensors, padding_index, promote=True)
                # The original gives the wrapper every leaf, without its key.
                if tensors.shape[2:] != new_tensors.shape[2:]:
                    raise ValueError(
                        f"batches can be concatenated only if their steps have one shape: those of a batch have "
                        f"{list(new_tensors.shape[2:])}, those before it {list(tensors.shape[2:])}"
                    )
            if isinstance(tensors, tuple) and is_namedtuple(tensors) and type(tensors) is type(new_tensors):
                pairs = zip(tensors, new_tensors, strict=True)
                return rebuild(tensors, [nested_concat(old, new, padding_index) for old, new in pairs])
        return original(tensors, new_tensors, padding_index=padding_index)

    return nested_concat


@patch(
    "transformers.trainer_pt_utils:nested_numpify",
    reason="rebuilds tuples from a generator; gives the rectangle of a pack, padded with -100",
    parameters=("tensors",),
    handled=lambda original: original(probe.packed()).shape == (2, 2),
)
def nested_numpify(original: Function, patch: Patch) -> Function:
    """Give ``[B, T, *]`` as an array, padded with -100 as the Trainer pads what it gathers."""
    from hf_packfix.nested import is_namedtuple, rebuild
    from hf_packfix.packed import PackedSequence, pad

    def nested_numpify(tensors: Any) -> Any:
        if isinstance(tensors, tuple) and patch.active:
            if isinstance(tensors, PackedSequence):
                tensors = pad(tensors, -100, promote=True)
            elif is_namedtuple(tensors):
                return rebuild(tensors, list(map(nested_numpify, tensors)))
        return original(tensors)

    return nested_numpify


@patch(
    "transformers.trainer_pt_utils:nested_truncate",
    reason="rebuilds tuples from a generator; keeps the first sequences, whole",
    parameters=("tensors", "limit"),
    handled=lambda original: _is_packed(original(probe.packed(), 1)),
)
def nested_truncate(original: Function, patch: Patch) -> Function:
    """Keep the first ``limit`` sequences in original order."""
    from hf_packfix.nested import is_namedtuple, rebuild
    from hf_packfix.packed import PackedSequence, take

    def nested_truncate(tensors: Any, limit: Any) -> Any:
        if isinstance(tensors, tuple) and patch.active:
            if isinstance(tensors, PackedSequence):
                return take(tensors, slice(limit))
            if is_namedtuple(tensors):
                return rebuild(tensors, [nested_truncate(item, limit) for item in tensors])
        return original(tensors, limit)

    return nested_truncate


@patch(
    "transformers.trainer_pt_utils:find_batch_size",
    reason="silently takes the number of tokens for the number of sequences",
    parameters=("tensors",),
    handled=lambda original: original(probe.packed()) == 2,
)
def find_batch_size(original: Function, patch: Patch) -> Function:
    """Count the sequences; name the key of a batch if its fields contradict each other."""
    from hf_packfix.nested import check_batch
    from hf_packfix.packed import PackedSequence, batch_size

    def find_batch_size(tensors: Any) -> Any:
        if isinstance(tensors, (tuple, list)) and patch.active:
            if isinstance(tensors, PackedSequence):
                return batch_size(tensors)
            # `prediction_step` checks mappings; upstream's own takes nothing else.
            check_batch(tensors)
        try:
            return original(tensors)
        except ValueError:
            if patch.active:
                check_batch(tensors)
            raise

    return find_batch_size


# The three below share the attribute that holds what was added; a container without it is the original's alone.
_PIECES = "_hf_packfix_pieces"
_METHODS = ("add", "to_cpu_and_numpy", "get_arrays")


@patch(
    "transformers.trainer_pt_utils:EvalLoopContainer.add",
    reason="copies everything it has at every batch; keeps the batches of a packed evaluation apart instead",
    parameters=("self", "tensors"),
)
def container_add(original: Function, patch: Patch) -> Function:
    """Keep batches apart once the loop has met a packed one, and what came from packs without its padding."""
    from hf_packfix import nested
    from hf_packfix.packed import pad
    from hf_packfix.ragged import Pieces, any_remembered, loop_is_packed

    def add(self: Any, tensors: Any) -> None:
        pieces = getattr(self, _PIECES, None)
        if pieces is None:
            if tensors is None:  # `preprocess_logits_for_metrics` may drop the logits: the original keeps nothing
                original(self, tensors)
                return
            if patch.active and nested.contains(tensors):  # nobody has asked for a rectangle so far
                tensors = nested.replace(lambda packed: pad(packed, self.padding_index, promote=True), tensors)
            apart = any_remembered(tensors) or loop_is_packed()
            if self.arrays is not None or not (patch.active and self.do_nested_concat and apart):
                original(self, tensors)
                return
            pieces = Pieces(self.padding_index)
            if self.tensors is not None:  # of batches before the first packed one
                pieces.add(self.tensors)
                self.tensors = None
            setattr(self, _PIECES, pieces)
            # On the container itself until it gives its arrays: a `disable()` meanwhile would lose what it holds.
            for name in _METHODS:
                setattr(self, name, getattr(self, name))
        pieces.add(tensors)

    return add


@patch(
    "transformers.trainer_pt_utils:EvalLoopContainer.to_cpu_and_numpy",
    reason="moves what was added to the CPU, and concatenates all of it; moves what was kept flat",
    parameters=("self",),
)
def container_to_cpu_and_numpy(original: Function, patch: Patch) -> Function:
    """Move what was kept flat."""

    def to_cpu_and_numpy(self: Any) -> None:
        pieces = getattr(self, _PIECES, None)
        if pieces is None:
            original(self)
        else:
            pieces.to_cpu()

    return to_cpu_and_numpy


@patch(
    "transformers.trainer_pt_utils:EvalLoopContainer.get_arrays",
    reason="returns what was concatenated so far; builds the rectangle of what was kept flat, once",
    parameters=("self",),
)
def container_get_arrays(original: Function, patch: Patch) -> Function:
    """Build the rectangles, and let the original turn them into arrays."""

    def get_arrays(self: Any) -> Any:
        pieces = getattr(self, _PIECES, None)
        if pieces is not None:
            for name in (_PIECES, *_METHODS):
                delattr(self, name)
            self.tensors = pieces.merge()
        return original(self)

    return get_arrays


def _is_packed(value: Any) -> bool:
    from hf_packfix.packed import PackedSequence

    return isinstance(value, PackedSequence)


PATCHES = (
    smooth_labels,
    nested_detach,
    nested_concat,
    nested_numpify,
    nested_truncate,
    find_batch_size,
    container_add,
    container_to_cpu_and_numpy,
    container_get_arrays,
)
