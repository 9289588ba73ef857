"""``transformers.trainer_pt_utils``: label smoothing, and what the evaluation loop does to a batch."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hf_packfix.engine import probe
from hf_packfix.engine.declare import always, around, holds_packed, on_leaf
from hf_packfix.engine.lazily import evaluation, packing, torch
from hf_packfix.engine.targets import Function

if TYPE_CHECKING:
    from torch.nn.utils.rnn import PackedSequence


def _smooths(original: Function) -> bool:
    labels = probe.packed()
    labels = packing.with_data(labels, labels.data % 2)
    logits = packing.with_data(labels, torch.eye(3, device="cpu")[:, :2])
    smoother = SimpleNamespace(epsilon=0.1, ignore_index=-100)
    loss = original(smoother, {"logits": logits}, labels)
    return bool(loss == original(smoother, {"logits": logits.data}, labels.data))


@around(
    "transformers.trainer_pt_utils:LabelSmoother.__call__",
    parameters=("self", "model_output", "labels"),
    problem="label smoothing takes packed logits and labels for tensors",
    fix="smooths over the real steps",
    uses=("LabelSmoother.ignore_index",),
    upstream_supports=_smooths,
)
def label_smoother_call(
    original: Function, self: Any, model_output: Any, labels: Any, shift_labels: bool = False, **kwargs: Any
) -> Any:
    """Smooth over the rows of ``data``, or over padded tensors if the loss needs to know the steps.

    Raises:
        ValueError: both are packed and a sequence has more logits than labels, or fewer.
    """
    if packing.is_packed(model_output):
        logits = model_output  # not a tuple of outputs, whose first would be its data
    else:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
    logits_are_packed, labels_are_packed = packing.is_packed(logits), packing.is_packed(labels)
    both = logits_are_packed and labels_are_packed
    if both and not shift_labels and packing.same_packing(logits, labels):
        return original(self, {"logits": logits.data}, labels.data, shift_labels, **kwargs)
    if both:
        of_logits, of_labels = packing.lengths(logits), packing.lengths(labels)
        if not torch.equal(of_logits, of_labels):
            raise ValueError(
                f"label smoothing needs one label a step of the logits: the packed logits have the lengths "
                f"{of_logits.tolist()}, the packed labels {of_labels.tolist()}"
            )
    if labels_are_packed:
        # A model may pad its logits to more steps than the longest sequence of labels has.
        steps = None if logits_are_packed else logits.shape[1]
        labels = packing.pad(labels, self.ignore_index, total_length=steps, promote=True)
    if logits_are_packed:
        # Logits at padding do not matter: their label is `ignore_index`.
        logits = packing.pad(logits, 0.0, total_length=labels.shape[1])
    return original(self, {"logits": logits}, labels, shift_labels, **kwargs)


@on_leaf(
    "transformers.trainer_pt_utils:nested_detach",
    rebuilds_named_tuples=True,
    parameters=("tensors",),
    problem="rebuilds tuples from a generator, which a PackedSequence refuses",
    fix="detaches the data and keeps the packing",
    upstream_supports=lambda original: packing.is_packed(original(probe.packed())),
)
def nested_detach(original: Function, packed: PackedSequence) -> PackedSequence:
    """Detach ``data``."""
    return packing.with_data(packed, packed.data.detach())


@around(
    "transformers.trainer_pt_utils:nested_concat",
    when=lambda tensors, new_tensors, *_, **__: isinstance(tensors, tuple) or isinstance(new_tensors, tuple),
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
    if packing.is_packed(tensors):
        tensors = packing.pad(tensors, padding_index, promote=True)
    if packing.is_packed(new_tensors):
        new_tensors = packing.pad(new_tensors, padding_index, promote=True)
        # The original gives this function every leaf, without its key.
        if tensors.shape[2:] != new_tensors.shape[2:]:
            raise ValueError(
                f"batches can be concatenated only if their steps have one shape: those of a batch have "
                f"{list(new_tensors.shape[2:])}, those before it {list(tensors.shape[2:])}"
            )
    # Upstream rebuilds a tuple from a generator, which no named tuple takes.
    if packing.is_namedtuple(tensors) and type(tensors) is type(new_tensors):
        pairs = zip(tensors, new_tensors, strict=True)
        return packing.rebuild(tensors, [nested_concat(original, *pair, padding_index) for pair in pairs])
    return original(tensors, new_tensors, padding_index=padding_index)


@on_leaf(
    "transformers.trainer_pt_utils:nested_numpify",
    rebuilds_named_tuples=True,
    parameters=("tensors",),
    problem="rebuilds tuples from a generator, which a PackedSequence refuses",
    fix="returns the padded array",
    upstream_supports=lambda original: original(probe.packed()).shape == (2, 2),
)
def nested_numpify(original: Function, packed: PackedSequence) -> Any:
    """Return ``[B, T, *]`` as an array, padded with -100 as the Trainer pads what it gathers."""
    return original(packing.pad(packed, -100, promote=True))


@on_leaf(
    "transformers.trainer_pt_utils:nested_truncate",
    rebuilds_named_tuples=True,
    parameters=("tensors", "limit"),
    problem="rebuilds tuples from a generator, which a PackedSequence refuses",
    fix="keeps the first sequences, whole",
    upstream_supports=lambda original: packing.is_packed(original(probe.packed(), 1)),
)
def nested_truncate(original: Function, packed: PackedSequence, limit: Any) -> PackedSequence:
    """Keep the first ``limit`` sequences in original order."""
    return packing.take(packed, slice(limit))


@around(
    "transformers.trainer_pt_utils:find_batch_size",
    when=always,
    parameters=("tensors",),
    problem="silently counts the tokens of a PackedSequence as its batch size",
    fix="counts the sequences",
    upstream_supports=lambda original: original(probe.packed()) == 2,
    silent="evaluation",
)
def find_batch_size(original: Function, tensors: Any) -> Any:
    """Return B, the number of sequences; name the key of a batch if its fields contradict each other."""
    if packing.is_packed(tensors):
        return packing.batch_size(tensors)
    if isinstance(tensors, (tuple, list)):
        # `prediction_step` checks mappings; upstream's own takes nothing else.
        packing.check_batch(tensors)
    try:
        return original(tensors)
    except ValueError:
        packing.check_batch(tensors)
        raise


@around(
    "transformers.trainer_pt_utils:EvalLoopContainer.add",
    when=lambda self, tensors: evaluation.is_packed() or holds_packed(tensors),
    parameters=("self", "tensors"),
    problem="copies all earlier batches, padding included, at every batch of an evaluation",
    fix="keeps the batches of a packed evaluation apart, and joins them once",
    uses=(
        "EvalLoopContainer.do_nested_concat",
        "EvalLoopContainer.padding_index",
        "EvalLoopContainer.tensors",
        "EvalLoopContainer.arrays",
        "EvalLoopContainer.get_arrays",
    ),
)
def add(original: Function, self: Any, tensors: Any) -> None:
    """Let a container of a packed evaluation keep a list of batches, as with ``eval_do_concat_batches=False``.

    Its own ``get_arrays`` joins them at the end: on the object, since what it holds must not depend on a ``disable()``
    in the meantime.
    """
    if tensors is None:  # `preprocess_logits_for_metrics` may drop the logits: nothing is kept
        return
    padding = self.padding_index
    tensors = packing.map_packed(lambda packed: packing.pad(packed, padding, promote=True), tensors)
    if not evaluation.is_packed():
        original(self, tensors)
        return
    if self.do_nested_concat:
        self.do_nested_concat = False
        self.tensors = None if self.tensors is None else [self.tensors]
        self.arrays = None if self.arrays is None else [self.arrays]
        self.get_arrays = partial(_joined_arrays, self)
    if "get_arrays" in vars(self):
        kept = [batches for batches in (self.arrays, self.tensors) if batches]
        if kept:
            evaluation.check_same_shapes(kept[0][0], tensors, number=sum(map(len, kept)))
        # A view would keep all of its memory, and a model may use the memory of its outputs again.
        tensors = packing.map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tensors)
    original(self, tensors)


def _joined_arrays(container: Any) -> Any:
    """Return what the container's ``get_arrays`` returns if it concatenates batches."""
    del container.get_arrays
    container.get_arrays()  # makes arrays of what is on the device
    container.do_nested_concat = True
    if container.arrays is not None:
        batches, container.arrays = container.arrays, None
        container.arrays = evaluation.join(batches, container.padding_index)
    return container.arrays
