"""``transformers.trainer``: evaluation that stock does silently, on inconsistent packed sequences or without labels.

What the evaluation loop does to a packed batch is done by functions of ``transformers.trainer_pt_utils`` and
``accelerate.utils.operations``, and patched there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from hf_packfix._warnings import warn_once
from hf_packfix.patches.declare import around
from hf_packfix.patches.label_names import warn_of_uncovered_labels
from hf_packfix.patches.lazily import evaluation, packed, torch, trees
from hf_packfix.patches.patch import Function

__all__ = ["evaluation_loop", "prediction_step"]

# `predict` on rows without labels is nothing to warn of, and only the loop knows which of the two it is.
_evaluating: ContextVar[bool] = ContextVar("hf_packfix_evaluating", default=False)


@around(
    "transformers.trainer:Trainer.evaluation_loop",
    parameters=("self", "dataloader", "description"),
    problem="calls the same functions for evaluate() and predict()",
    fix="notes which of them runs, for the warning about labels under another name",
)
def evaluation_loop(
    original: Function, self: Any, dataloader: Any, description: Any, *args: Any, **kwargs: Any
) -> Any:
    """Note that a loop begins, and whether it evaluates."""
    token = _evaluating.set(description == "Evaluation")
    try:
        with evaluation.evaluation_loop():
            return original(self, dataloader, description, *args, **kwargs)
    finally:
        _evaluating.reset(token)


@around(
    "transformers.trainer:Trainer.prediction_step",
    parameters=("self", "model", "inputs"),
    problem="evaluates silently on inconsistent packed sequences, or when no label name covers the target; cuts a "
    "bare PackedSequence from compute_loss like a tuple",
    fix="raises, or warns, and names the keys; predicts what the PackedSequence holds",
)
def prediction_step(original: Function, self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Check a packed batch and what the model returns for it, and warn of what would be wrong silently.

    Raises:
        ValueError: the fields of a PackedSequence contradict each other.
    """
    if not trees.check_batch(inputs):
        return original(self, model, inputs, *args, **kwargs)
    if _evaluating.get():
        warn_of_uncovered_labels(self, inputs)
        _warn_of_several_batch_sizes(inputs)
    with _bare_outputs_in_a_tuple(self) as outputs:
        result = original(self, model, inputs, *args, **kwargs)
    evaluation.note_outputs(inputs, result[1], outputs[0] if outputs else None)
    _warn_of_dropped_indices(inputs, result)
    return result


@contextmanager
def _bare_outputs_in_a_tuple(trainer: Any) -> Iterator[list[Any]]:
    """Turn a bare PackedSequence that ``compute_loss`` returns as outputs into ``(loss, outputs)``; yield the outputs.

    Upstream takes outputs that are no dict for a tuple that begins with the loss: ``outputs[1:]`` would be the fields
    of the PackedSequence without its data.
    """
    outputs: list[Any] = []
    compute_loss, own = trainer.compute_loss, vars(trainer).get("compute_loss")

    def with_outputs_in_a_tuple(*args: Any, **kwargs: Any) -> Any:
        result = compute_loss(*args, **kwargs)
        if isinstance(result, tuple) and len(result) == 2:
            outputs.append(result[1])
            if isinstance(result[1], packed.PackedSequence):
                return result[0], result
        return result

    trainer.compute_loss = with_outputs_in_a_tuple
    try:
        yield outputs
    finally:
        if own is None:
            del trainer.compute_loss
        else:
            trainer.compute_loss = own


def _warn_of_several_batch_sizes(inputs: Mapping[str, Any]) -> None:
    """Warn if the sequences of one key are not the rows of the batch: the first key counts, as upstream has it."""
    sizes = trees.sequences_of_keys(inputs)
    first = next(iter(inputs))
    if len(set(sizes.values())) > 1 and isinstance(inputs[first], packed.PackedSequence):
        others = ", ".join(f"{key!r} has {size}" for key, size in sizes.items() if size != sizes[first])
        warn_once(
            f"the packed sequences of a batch differ in number: {first!r} has {sizes[first]} sequences, {others}. "
            f"Samples are counted, and losses weighted, by the first key of the batch, {first!r}: let the collator "
            f"put the key first whose sequences are the rows of the data set",
            cause=f"several batch sizes: {list(sizes)}",
        )


def _warn_of_dropped_indices(inputs: Mapping[str, Any], result: Any) -> None:
    """Warn if the model returned the packing of an input without its index tensors: its rows would be out of order."""
    packed_inputs = {key: value for key, value in inputs.items() if isinstance(value, packed.PackedSequence)}
    for output in trees.packed_in(result[1] if isinstance(result, tuple) and len(result) > 1 else None):
        for key, value in packed_inputs.items():
            if (
                (value.sorted_indices is None) != (output.sorted_indices is None)
                and torch.equal(value.batch_sizes, output.batch_sizes)
                and not packed.same_packing(value, output)
            ):
                without, with_them = ("output", key) if output.sorted_indices is None else (key, "output")
                warn_once(
                    f"the model's output has the lengths of {key!r}, but only one of them has index tensors: the "
                    f"{with_them} is in the order of the data set, the {without} sorted by length, and metrics would "
                    f"compare one sequence with another. Keep the index tensors: "
                    f"x._replace(data=...), or PackedSequence(data, x.batch_sizes, x.sorted_indices, "
                    f"x.unsorted_indices); or let the collator sort the rows and pack with enforce_sorted=True"
                )
