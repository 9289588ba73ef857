"""``transformers.trainer_pt_utils``: label smoothing, and what the evaluation loop does to a batch."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from hf_packfix.patches import probe
from hf_packfix.patches.declare import around, on_leaf
from hf_packfix.patches.lazily import evaluation, jagged, packed, torch, trees
from hf_packfix.patches.patch import Function

if TYPE_CHECKING:
    from torch.nn.utils.rnn import PackedSequence

__all__ = [
    "add",
    "find_batch_size",
    "label_smoother_call",
    "nested_concat",
    "nested_detach",
    "nested_numpify",
    "nested_truncate",
]


def _smooths(original: Function) -> bool:
    labels = probe.packed()
    labels = labels._replace(data=labels.data % 2)
    logits = labels._replace(data=torch.eye(3, device="cpu")[:, :2])
    smoother = SimpleNamespace(epsilon=0.1, ignore_index=-100)
    loss = original(smoother, {"logits": logits}, labels)
    return bool(loss == original(smoother, {"logits": logits.data}, labels.data))


@around(
    "transformers.trainer_pt_utils:LabelSmoother.__call__",
    parameters=("self", "model_output", "labels"),
    problem="label smoothing takes packed logits and labels for tensors",
    fix="smooths over the real steps",
    upstream_supports=_smooths,
)
def label_smoother_call(
    original: Function, self: Any, model_output: Any, labels: Any, shift_labels: bool = False, **kwargs: Any
) -> Any:
    """Smooth over the rows of ``data``, or over padded tensors if the loss needs to know the steps."""
    if isinstance(model_output, packed.PackedSequence):
        logits: Any = model_output  # not a tuple of outputs, whose first would be its data
    else:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
    logits_are_packed, labels_are_packed = (isinstance(x, packed.PackedSequence) for x in (logits, labels))
    if logits_are_packed or labels_are_packed:
        both = logits_are_packed and labels_are_packed
        if both and not shift_labels and packed.same_packing(logits, labels):
            logits, labels = logits.data, labels.data
        else:
            logits, labels = _padded(logits, labels, self.ignore_index)
        model_output = {"logits": logits}
    return original(self, model_output, labels, shift_labels, **kwargs)


def _padded(logits: Any, labels: Any, ignore_index: int) -> tuple[Any, Any]:
    """Return logits ``[B, T, C]`` and labels ``[B, T]``, one of them packed, over the same steps.

    Raises:
        ValueError: both are packed and a sequence has more logits than labels, or fewer.
    """
    if isinstance(logits, packed.PackedSequence) and isinstance(labels, packed.PackedSequence):
        of_logits, of_labels = packed.lengths(logits), packed.lengths(labels)
        if not torch.equal(of_logits, of_labels):
            raise ValueError(
                f"label smoothing needs one label a step of the logits: the packed logits have the lengths "
                f"{of_logits.tolist()}, the packed labels {of_labels.tolist()}"
            )
    if isinstance(labels, packed.PackedSequence):
        # A model may pad its logits to more steps than the longest sequence of labels has.
        steps = None if isinstance(logits, packed.PackedSequence) else logits.shape[1]
        labels = packed.pad(labels, ignore_index, total_length=steps, promote=True)
    if isinstance(logits, packed.PackedSequence):
        # Logits at padding do not matter: their label is `ignore_index`.
        logits = packed.pad(logits, 0.0, total_length=labels.shape[1])
    return logits, labels


@on_leaf(
    "transformers.trainer_pt_utils:nested_detach",
    rebuilds_named_tuples=True,
    parameters=("tensors",),
    problem="rebuilds tuples from a generator, which a PackedSequence refuses",
    fix="detaches the data and keeps the packing",
    upstream_supports=lambda original: _is_packed(original(probe.packed())),
)
def nested_detach(original: Function, leaf: PackedSequence) -> PackedSequence:
    """Detach ``data``."""
    return packed.with_data(leaf, leaf.data.detach())


@around(
    "transformers.trainer_pt_utils:nested_concat",
    parameters=("tensors", "new_tensors", "padding_index"),
    problem="concatenates the fields of two PackedSequences one by one",
    fix="concatenates their sequences, padded",
    upstream_supports=lambda original: original(probe.packed(), probe.packed()).shape == (4, 2),
)
def nested_concat(original: Function, tensors: Any, new_tensors: Any, padding_index: Any = -100) -> Any:
    """Concatenate ``[B, T, *]`` and ``[B', T', *]`` to ``[B + B', max(T, T'), *]``, in original order.

    Raises:
        ValueError: the trailing dimensions ``*`` differ; the original would repeat a dimension of size one.
    """
    if isinstance(tensors, packed.PackedSequence):
        tensors = packed.pad(tensors, padding_index, promote=True)
    if isinstance(new_tensors, packed.PackedSequence):
        new_tensors = packed.pad(new_tensors, padding_index, promote=True)
        # The original gives this function every leaf, without its key.
        if tensors.shape[2:] != new_tensors.shape[2:]:
            raise ValueError(
                f"batches can be concatenated only if their steps have one shape: those of a batch have "
                f"{list(new_tensors.shape[2:])}, those before it {list(tensors.shape[2:])}"
            )
    # Upstream rebuilds a tuple from a generator, which no named tuple takes.
    if isinstance(tensors, tuple) and trees.is_namedtuple(tensors) and type(tensors) is type(new_tensors):
        pairs = zip(tensors, new_tensors, strict=True)
        return trees.rebuild(tensors, [nested_concat(original, *pair, padding_index) for pair in pairs])
    return original(tensors, new_tensors, padding_index=padding_index)


@on_leaf(
    "transformers.trainer_pt_utils:nested_numpify",
    rebuilds_named_tuples=True,
    parameters=("tensors",),
    problem="rebuilds tuples from a generator, which a PackedSequence refuses",
    fix="returns the padded array",
    upstream_supports=lambda original: original(probe.packed()).shape == (2, 2),
)
def nested_numpify(original: Function, leaf: PackedSequence) -> Any:
    """Return ``[B, T, *]`` as an array, padded with -100 as the Trainer pads what it gathers."""
    return original(packed.pad(leaf, -100, promote=True))


@on_leaf(
    "transformers.trainer_pt_utils:nested_truncate",
    rebuilds_named_tuples=True,
    parameters=("tensors", "limit"),
    problem="rebuilds tuples from a generator, which a PackedSequence refuses",
    fix="keeps the first sequences, whole",
    upstream_supports=lambda original: _is_packed(original(probe.packed(), 1)),
)
def nested_truncate(original: Function, leaf: PackedSequence, limit: Any) -> PackedSequence:
    """Keep the first ``limit`` sequences in original order."""
    return jagged.take(leaf, slice(limit))


@around(
    "transformers.trainer_pt_utils:find_batch_size",
    parameters=("tensors",),
    problem="silently counts the tokens of a PackedSequence as its batch size",
    fix="counts the sequences",
    upstream_supports=lambda original: original(probe.packed()) == 2,
)
def find_batch_size(original: Function, tensors: Any) -> Any:
    """Return B, the number of sequences; name the key of a batch if its fields contradict each other."""
    if isinstance(tensors, packed.PackedSequence):
        return packed.batch_size(tensors)
    if isinstance(tensors, (tuple, list)):
        # `prediction_step` checks mappings; upstream's own takes nothing else.
        trees.check_batch(tensors)
    try:
        return original(tensors)
    except ValueError:
        trees.check_batch(tensors)
        raise


@around(
    "transformers.trainer_pt_utils:EvalLoopContainer.add",
    parameters=("self", "tensors"),
    problem="copies all earlier batches, padding included, at every batch of an evaluation",
    fix="keeps the batches of a packed evaluation apart, and joins them once",
)
def add(original: Function, self: Any, tensors: Any) -> None:
    """Keep batches apart once the loop has met a packed one, and what came from packed sequences without padding."""
    if tensors is None:  # `preprocess_logits_for_metrics` may drop the logits: the original keeps nothing
        original(self, tensors)
        return
    if trees.contains(tensors):  # nothing has asked for a padded tensor so far
        tensors = trees.map_packed(lambda leaf: packed.pad(leaf, self.padding_index, promote=True), tensors)
    apart = evaluation.any_has_lengths(tensors) or evaluation.loop_is_packed()
    if self.arrays is not None or not (self.do_nested_concat and apart):
        original(self, tensors)
        return
    self.__class__ = _keeping_batches_apart(cast("Hashable", type(self)))
    if self.tensors is not None:  # of batches before the first packed one
        earlier, self.tensors = self.tensors, None
        self.add(earlier)
    self.add(tensors)


@cache
def _keeping_batches_apart(container: Any) -> type:
    """Return the class of a container of the evaluation loop while it keeps batches apart.

    The class, not three patches: what a container holds must not depend on a ``disable()`` in the meantime.
    """

    class KeepingBatchesApart(container):  # type: ignore[misc]
        def add(self, tensors: Any) -> None:
            self._buffer().add(tensors)

        def to_cpu_and_numpy(self) -> None:
            self._buffer().to_cpu()

        def get_arrays(self) -> Any:
            self.tensors = self.__dict__.pop("_hf_packfix_buffer").merge()
            self.__class__ = container
            return self.get_arrays()

        def _buffer(self) -> evaluation.EvaluationBuffer:
            if "_hf_packfix_buffer" not in vars(self):
                self._hf_packfix_buffer = evaluation.EvaluationBuffer(self.padding_index)
            found: evaluation.EvaluationBuffer = self._hf_packfix_buffer
            return found

    return KeepingBatchesApart


def _is_packed(value: Any) -> bool:
    return isinstance(value, packed.PackedSequence)
