"""``transformers.trainer``: moving a batch to the device, and counting what it holds."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hf_packfix.patches import probe
from hf_packfix.patches.declare import Declaration, around, hand_made
from hf_packfix.patches.lazily import packed, torch, trees
from hf_packfix.patches.patch import Function, Patch

if TYPE_CHECKING:
    from torch.nn.utils.rnn import PackedSequence

__all__ = [
    "_get_num_items_in_batch",
    "_get_train_sampler",
    "_prepare_input",
    "_track_num_input_tokens",
    "compute_loss",
    "floating_point_ops",
    "get_batch_samples",
]


def _moves(original: Function) -> bool:
    trainer = type("Trainer", (), {"_prepare_input": original})()
    trainer.args = SimpleNamespace(device=torch.device("meta"))
    trainer.is_deepspeed_enabled = False
    return probe.is_on_meta(trainer._prepare_input({"x": probe.packed()})["x"])


@hand_made(
    "transformers.trainer:Trainer._prepare_input",
    parameters=("self", "data"),
    problem="moves a batch to the device by rebuilding tuples from a generator, which a PackedSequence refuses",
    fix="moves data and index tensors",
    upstream_supports=_moves,
    issue="https://github.com/huggingface/transformers/issues/29068",
)
def _prepare_input(original: Function, patch: Patch) -> Function:
    """Move the fields that must move; ``data`` goes through the ``_prepare_input`` of a subclass that has its own.

    Other named tuples fail in the same line of the original, and are rebuilt from their fields.
    """
    from hf_packfix.patches import prepare_input

    return prepare_input.wrap(original, patch)


def _counts_operations(original: Function) -> bool:
    model = SimpleNamespace(
        main_input_name="x",
        num_parameters=lambda **_: 5,
        floating_point_ops=lambda inputs: 6 * inputs["x"].numel() * 5,
    )
    return bool(original(SimpleNamespace(model=model), {"x": probe.packed()}) == 6 * 3 * 5)


@around(
    "transformers.trainer:Trainer.floating_point_ops",
    parameters=("self", "inputs"),
    problem="asks the main input for numel(), which a PackedSequence does not have",
    fix="counts the real tokens",
    upstream_supports=_counts_operations,
)
def floating_point_ops(original: Function, self: Any, inputs: Any) -> Any:
    """Count as for a padded batch without its padding: ``data`` has just those elements."""
    if isinstance(inputs, Mapping):
        tensors = {key: value.data for key, value in inputs.items() if isinstance(value, packed.PackedSequence)}
        if tensors:
            inputs = {**inputs, **tensors}
    return original(self, inputs)


def _counts_tokens(original: Function) -> bool:
    trainer = SimpleNamespace(
        args=SimpleNamespace(include_num_input_tokens_seen="all", device=torch.device("cpu")),
        model=SimpleNamespace(main_input_name="x"),
        state=SimpleNamespace(num_input_tokens_seen=0),
        accelerator=SimpleNamespace(gather=lambda tensor: tensor),
    )
    original(trainer, {"x": probe.packed()})
    return bool(trainer.state.num_input_tokens_seen == 3)


@around(
    "transformers.trainer:Trainer._track_num_input_tokens",
    parameters=("self", "inputs"),
    problem="include_num_input_tokens_seen asks the main input for numel(), which a PackedSequence does not have",
    fix="counts the lengths of the sequences",
    upstream_supports=_counts_tokens,
    since="5.3",
)
def _track_num_input_tokens(original: Function, self: Any, inputs: Any) -> Any:
    """Let the original count one element for each token, all of them real, so that both modes give the same sum."""
    if _counts_input_tokens(self) and isinstance(inputs, Mapping):
        main = getattr(self.model, "main_input_name", "input_ids")
        main_input = inputs.get(main)
        if isinstance(main_input, packed.PackedSequence):
            real = torch.ones(main_input.data.shape[0], dtype=torch.int64, device="cpu")
            inputs = {**inputs, main: real, "attention_mask": real}
    return original(self, inputs)


def _counts_input_tokens(trainer: Any) -> bool:
    return getattr(trainer.args, "include_num_input_tokens_seen", False) not in (False, "no")


def _counts_items(original: Function) -> bool:
    trainer = SimpleNamespace(
        model_accepts_loss_kwargs=True,
        compute_loss_func=None,
        _loss_shifts_labels=False,
        args=SimpleNamespace(average_tokens_across_devices=False, n_gpu=1, world_size=1),
        accelerator=SimpleNamespace(parallelism_config=None),
        get_tp_size=lambda: 1,
        get_cp_size=lambda: 1,
        get_sp_size=lambda: 1,
    )
    return bool(original(trainer, [{"labels": probe.packed()}], torch.device("cpu")) == 3)


@around(
    "transformers.trainer:Trainer._get_num_items_in_batch",
    parameters=("self", "batch_samples", "device"),
    problem="silently gives up on packed labels, so that accumulated gradients come out N times too large",
    fix="counts the labels that the loss uses",
    upstream_supports=_counts_items,
    since="4.57",
)
def _get_num_items_in_batch(original: Function, self: Any, batch_samples: Any, *args: Any, **kwargs: Any) -> Any:
    """Let the original count tensors: it knows whose loss shifts labels, and across which devices to sum."""
    return original(self, [_with_countable_labels(self, batch) for batch in batch_samples], *args, **kwargs)


def _counts_elsewhere(original: Function) -> bool:
    # Not this method matters but which one counts: a method of its own, or this one and the loop around it.
    trainer = vars(sys.modules["transformers.trainer"])["Trainer"]
    return hasattr(trainer, "_get_num_items_in_batch") and hasattr(trainer, "_track_num_input_tokens")


@around(
    "transformers.trainer:Trainer.get_batch_samples",
    parameters=("self", "epoch_iterator", "num_batches"),
    problem="transformers <= 5.2 counts input tokens, and <= 4.56 label items, inside the training loop",
    fix="makes packed inputs and labels countable",
    upstream_supports=_counts_elsewhere,
    until="5.3",
)
def get_batch_samples(original: Function, self: Any, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
    """Let the original count the items of padded tensors, and the loop the tokens of packed ones with a ``numel()``.

    The batches that come back are those of the iterator. If the loop counts tokens, their main input is a
    :class:`~hf_packfix.patches.countable.CountablePackedSequence` until ``_prepare_input`` turns it back.
    """
    if hasattr(self, "_get_num_items_in_batch"):
        batches, items = original(self, epoch_iterator, *args, **kwargs)
    else:
        batches = []

        def countable(batch: Any) -> Any:
            batches.append(batch)
            return _with_countable_labels(self, batch)

        _, items = original(self, map(countable, epoch_iterator), *args, **kwargs)
    if _counts_input_tokens(self):
        batches = [_with_countable_input(self, batch) for batch in batches]
    return batches, items


def _with_countable_input(trainer: Any, batch: Any) -> Any:
    """Return ``batch`` with a main input, and a mask, that the training loop up to 5.2 can count."""
    main = getattr(trainer.model, "main_input_name", "input_ids")
    if not isinstance(batch, Mapping) or not isinstance(batch.get(main), packed.PackedSequence):
        return batch
    inputs = {key: batch[key] for key in (main, "attention_mask") if isinstance(batch.get(key), packed.PackedSequence)}
    # Imports torch, which this file must not when it is loaded.
    from hf_packfix.patches.countable import CountablePackedSequence

    counted = {key: CountablePackedSequence._make(value) for key, value in inputs.items()}
    return type(batch)({**batch, **counted})  # type: ignore[call-arg]


@around(
    "transformers.trainer:Trainer.compute_loss",
    parameters=("self", "model", "inputs"),
    problem="label smoothing compares the tokens of our language model with themselves and leaves our encoder-decoder "
    "without decoder inputs",
    fix="takes both from the model",
    issue="https://github.com/huggingface/transformers/issues/27161",
)
def compute_loss(original: Function, self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Pass labels that match the logits step by step, and ``decoder_input_ids``, for models that declare them.

    The original takes the labels out of the batch before it calls the model, and shifts them by one column if
    transformers lists the model's class as a causal language model.
    """
    if self.label_smoother is not None or self.compute_loss_func is not None:
        inputs = _without_need_of_labels(self, inputs)
    return original(self, model, inputs, *args, **kwargs)


def _without_need_of_labels(trainer: Any, inputs: Any) -> Any:
    """Return a batch for a Trainer that keeps the labels from the model and computes the loss itself."""
    # Only for models with `labels_in_loss`: what upstream does for others stays as it is.
    declared = getattr(trainer.model, "labels_in_loss", None)
    if declared is None or not isinstance(inputs, Mapping) or inputs.get("labels") is None:
        return inputs
    changed = {}
    labels_in_loss = _labels_in_loss(trainer)
    if labels_in_loss is not None:
        changed["labels"] = labels_in_loss(inputs)
    prepare = getattr(trainer.model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None and inputs.get("decoder_input_ids") is None:
        changed["decoder_input_ids"] = prepare(labels=inputs["labels"])
    return {**inputs, **changed}


def _labels_in_loss(trainer: Any) -> Function | None:
    """Return the method ``labels_in_loss`` of a Trainer's model; None for models without one.

    A model with this method declares which labels its loss uses. ``labels_in_loss(inputs)`` returns them, a tensor or
    packed, with one label for each of the model's logits, and -100 if the loss ignores it. The models of
    ``hf_packfix.models`` have it: they ignore labels at padding, wherever it is, which upstream's count cannot know.
    """
    if getattr(trainer, "compute_loss_func", None) is not None:
        # The user's own loss: upstream's count is what it is written for.
        return None
    return getattr(getattr(trainer, "model", None), "labels_in_loss", None)


def _with_countable_labels(trainer: Any, batch: Any) -> Any:
    """Replace packed labels of a Trainer's batch with plain tensors, so that the original can count them.

    Every training batch comes through here, as the data loader returned it: an inconsistent PackedSequence, on which
    torch's recurrent layers may compute something, is found here.
    """
    has_packed = trees.check_batch(batch)
    shifts = getattr(trainer, "_loss_shifts_labels", True)
    labels_in_loss = _labels_in_loss(trainer)
    if labels_in_loss is not None and isinstance(batch, Mapping) and batch.get("labels") is not None:
        flat = labels_in_loss(batch).data.flatten()
        if shifts:
            # The original leaves out the first: an ignored one in front, and all of these count.
            flat = torch.nn.functional.pad(flat, (1, 0), value=-100)
        return {**{key: value for key, value in batch.items() if key != "shift_labels"}, "labels": flat}
    if not has_packed:
        return batch
    changed = {}
    if isinstance(batch.get("shift_labels"), packed.PackedSequence):
        changed["shift_labels"] = _countable(batch["shift_labels"].data)
    labels = batch.get("labels")
    if isinstance(labels, packed.PackedSequence):
        # With a column for the first steps the count is right in either case; if nothing is shifted, `data` suffices.
        changed["labels"] = _with_first_column(labels) if shifts else _countable(labels.data)
    return {**batch, **changed} if changed else batch


def _countable(data: torch.Tensor) -> torch.Tensor:
    # In bytes -100 would be 156: padding that counts, and a label that does not.
    return data.to(packed.dtype_with(data.dtype, -100))


def _with_first_column(labels: PackedSequence) -> torch.Tensor:
    """Return labels with each sequence's first in a column of its own: the original counts in ``[..., 1:]``."""
    data = _countable(labels.data)
    rows = len(data)
    if data.dim() != 1 or not rows:
        return packed.pad(labels, -100, promote=True)
    # Not padded by sequence: the B first steps stand before all others in `data`. So they are the first column of
    # [B, N / B, rounded up].
    sequences = int(labels.batch_sizes[0])
    return torch.nn.functional.pad(data, (0, -rows % sequences), value=-100).view(-1, sequences).T


_SAMPLERS: Declaration = {
    "parameters": ("self",),
    "problem": "groups rows by length only if their key is input_ids or a column of lengths is left",
    "fix": "groups them by the main input of the model",
}


@around("transformers.trainer:Trainer._get_eval_sampler", **_SAMPLERS)
@around("transformers.trainer:Trainer._get_train_sampler", **_SAMPLERS)
def _get_train_sampler(original: Function, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the sampler; if upstream finds no lengths, as if the main input was that of a processing class."""
    try:
        return original(self, *args, **kwargs)
    except ValueError as error:
        name = getattr(self.model, "main_input_name", "input_ids")
        if name == "input_ids":
            raise
        own, self.processing_class = self.processing_class, SimpleNamespace(model_input_names=[name])
        try:
            return original(self, *args, **kwargs)
        except ValueError:
            raise error from None
        finally:
            self.processing_class = own
