"""``transformers.trainer``: moving a batch to the device, and counting what it holds."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from hf_packfix.patches import probe
from hf_packfix.patches.patch import Function, Patch, patch

__all__ = ["PATCHES"]


def _handles_move(original: Function) -> bool:
    import torch

    trainer = type("Trainer", (), {"_prepare_input": original})()
    trainer.args = SimpleNamespace(device=torch.device("meta"))
    trainer.is_deepspeed_enabled = False
    return probe.is_on_meta(trainer._prepare_input({"x": probe.packed()})["x"])


@patch(
    "transformers.trainer:Trainer._prepare_input",
    reason="moves a batch to the device by rebuilding tuples from a generator, which a PackedSequence refuses",
    parameters=("self", "data"),
    handled=_handles_move,
)
def prepare_input(original: Function, patch: Patch) -> Function:
    """Move the fields that must move; ``data`` goes through the ``_prepare_input`` of a subclass that has its own.

    Other named tuples stumble over the same line of the original, and are rebuilt from their fields.
    """
    from hf_packfix.patches import prepare_input

    return prepare_input.wrap(original, patch)


def _handles_floating_point_ops(original: Function) -> bool:
    model = SimpleNamespace(
        main_input_name="x",
        num_parameters=lambda **_: 5,
        floating_point_ops=lambda inputs: 6 * inputs["x"].numel() * 5,
    )
    return bool(original(SimpleNamespace(model=model), {"x": probe.packed()}) == 6 * 3 * 5)


@patch(
    "transformers.trainer:Trainer.floating_point_ops",
    reason="asks the main input for numel(), which a PackedSequence does not have; counts the real tokens",
    parameters=("self", "inputs"),
    handled=_handles_floating_point_ops,
)
def floating_point_ops(original: Function, patch: Patch) -> Function:
    """Count as for a padded batch without its padding: ``data`` has just those elements."""
    from hf_packfix.packed import PackedSequence

    def floating_point_ops(self: Any, inputs: Any) -> Any:
        if isinstance(inputs, Mapping) and patch.active:
            packed = {k: v.data for k, v in inputs.items() if isinstance(v, PackedSequence)}
            if packed:
                inputs = {**inputs, **packed}
        return original(self, inputs)

    return floating_point_ops


def _handles_token_count(original: Function) -> bool:
    import torch

    trainer = SimpleNamespace(
        args=SimpleNamespace(include_num_input_tokens_seen="all", device=torch.device("cpu")),
        model=SimpleNamespace(main_input_name="x"),
        state=SimpleNamespace(num_input_tokens_seen=0),
        accelerator=SimpleNamespace(gather=lambda tensor: tensor),
    )
    original(trainer, {"x": probe.packed()})
    return bool(trainer.state.num_input_tokens_seen == 3)


@patch(
    "transformers.trainer:Trainer._track_num_input_tokens",
    reason="include_num_input_tokens_seen asks the main input for numel(); counts the lengths of the sequences",
    parameters=("self", "inputs"),
    handled=_handles_token_count,
    since="5.3",
)
def track_num_input_tokens(original: Function, patch: Patch) -> Function:
    """Hand over one element a token, all of them real, so that both modes count the sum of the lengths."""
    import torch

    from hf_packfix.packed import PackedSequence

    one = torch.ones((), dtype=torch.int64, device="cpu")

    def _track_num_input_tokens(self: Any, inputs: Any) -> Any:
        if patch.active:
            main = getattr(self.model, "main_input_name", "input_ids")
            packed = inputs.get(main) if isinstance(inputs, Mapping) else None
            if isinstance(packed, PackedSequence):
                # Expanded, not filled: mostly nobody asked to count, which the original finds out.
                real = one.expand(packed.data.shape[0])
                inputs = {**inputs, main: real, "attention_mask": real}
        return original(self, inputs)

    return _track_num_input_tokens


def _handles_item_count(original: Function) -> bool:
    import torch

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


@patch(
    "transformers.trainer:Trainer._get_num_items_in_batch",
    reason="silently gives up on packed labels, so that accumulated gradients come out N times too large",
    parameters=("self", "batch_samples", "device"),
    handled=_handles_item_count,
    since="4.57",
)
def get_num_items_in_batch(original: Function, patch: Patch) -> Function:
    """Let the original count, in tensors: it knows whose loss shifts labels, and across which devices to sum."""
    with_countable_labels = _label_converter()

    def _get_num_items_in_batch(self: Any, batch_samples: Any, *args: Any, **kwargs: Any) -> Any:
        if patch.active:
            batch_samples = [with_countable_labels(self, batch) for batch in batch_samples]
        return original(self, batch_samples, *args, **kwargs)

    return _get_num_items_in_batch


def _labels_in_loss(trainer: Any) -> Function | None:
    """Return the method ``labels_in_loss`` of a Trainer's model; None for models without one.

    A model with this method says by it which labels its loss uses. ``labels_in_loss(inputs)`` returns them, a tensor
    or packed, with one label for each of the model's logits, and -100 if the loss ignores it. The models of
    ``hf_packfix.models`` have it: they ignore labels at padding, wherever it is, which upstream's count cannot know.
    """
    if getattr(trainer, "compute_loss_func", None) is not None:
        # The user's own loss: upstream's count is what it is written for.
        return None
    return getattr(getattr(trainer, "model", None), "labels_in_loss", None)


@patch(
    "transformers.trainer:Trainer.compute_loss",
    reason="label smoothing compares the tokens of our language model with themselves and leaves our encoder-decoder "
    "without decoder inputs; takes both from the model",
    parameters=("self", "model", "inputs"),
)
def compute_loss(original: Function, patch: Patch) -> Function:
    """Pass labels that match the logits step by step, and ``decoder_input_ids``, for models that declare them.

    The original takes the labels out of the batch before it calls the model, and shifts them by one column if
    transformers lists the model's class as a causal language model.
    """

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if (self.label_smoother is not None or self.compute_loss_func is not None) and patch.active:
            inputs = _without_need_of_labels(self, inputs)
        return original(self, model, inputs, *args, **kwargs)

    return compute_loss


def _without_need_of_labels(trainer: Any, inputs: Any) -> Any:
    """Return a batch for a Trainer that keeps the labels from the model and computes the loss itself."""
    # Other models are not asked: what upstream does for them is as it was.
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


def _label_converter() -> Function:
    """Return the function that puts tensors, in which the original can count, for packed labels of a Trainer's batch.

    Every training batch comes through it, still as the data loader gave it: here packs whose fields contradict each
    other are found, on which torch's recurrent layers may compute something.
    """
    import torch

    from hf_packfix.nested import check_batch
    from hf_packfix.packed import PackedSequence, dtype_with, pad

    def with_countable_labels(trainer: Any, batch: Any) -> Any:
        packed = check_batch(batch)
        labels_in_loss = _labels_in_loss(trainer)
        if labels_in_loss is not None and isinstance(batch, Mapping) and batch.get("labels") is not None:
            labels = labels_in_loss(batch)
            # Behind an ignored one, so that the count is the same whether the original leaves out the first or not.
            flat = torch.nn.functional.pad(torch.flatten(labels.data), (1, 0), value=-100)
            return {**{key: value for key, value in batch.items() if key != "shift_labels"}, "labels": flat}
        if not packed:
            return batch
        changed = {}
        if isinstance(batch.get("shift_labels"), PackedSequence):
            changed["shift_labels"] = countable(batch["shift_labels"].data)
        labels = batch.get("labels")
        if isinstance(labels, PackedSequence):
            # A column for the first steps is right in either case; where nothing is shifted, `data` alone will do.
            shifts = getattr(trainer, "_loss_shifts_labels", True)
            changed["labels"] = with_first_column(labels) if shifts else countable(labels.data)
        return {**batch, **changed} if changed else batch

    def countable(data: torch.Tensor) -> torch.Tensor:
        # In bytes -100 would be 156: padding that counts, and a label that does not.
        return data.to(dtype_with(data.dtype, -100))

    def with_first_column(labels: PackedSequence) -> torch.Tensor:
        """Return labels with each sequence's first in a column of its own: the original counts in ``[..., 1:]``."""
        data = countable(labels.data)
        rows = len(data)
        if data.dim() != 1 or not rows:
            return pad(labels, -100, promote=True)
        # No rectangle of the sequences: the B first steps stand before all others in `data`. So they are the first
        # column of [B, N / B, rounded up].
        sequences = int(labels.batch_sizes[0])
        return torch.nn.functional.pad(data, (0, -rows % sequences), value=-100).view(-1, sequences).T

    return with_countable_labels


def _counts_elsewhere(original: Function) -> bool:
    # What matters is not this method but who counts: a helper of its own, or the method and the loop around it.
    trainer = vars(sys.modules["transformers.trainer"])["Trainer"]
    return hasattr(trainer, "_get_num_items_in_batch") and hasattr(trainer, "_track_num_input_tokens")


@patch(
    "transformers.trainer:Trainer.get_batch_samples",
    reason="up to 5.2 items (up to 4.56) and input tokens are counted inline, around here; answers for a pack",
    parameters=("self", "epoch_iterator", "num_batches"),
    handled=_counts_elsewhere,
    until="5.3",
)
def get_batch_samples(original: Function, patch: Patch) -> Function:
    """Let the original count the items of rectangles, and the loop the tokens of packs that answer ``numel()``.

    What comes back are the batches of the iterator. Where the loop counts tokens, their main input is a
    :class:`~hf_packfix.packed.Countable` until ``_prepare_input`` turns it back.
    """
    with_countable_labels = _label_converter()

    def get_batch_samples(self: Any, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        if not patch.active:
            return original(self, epoch_iterator, *args, **kwargs)
        if hasattr(self, "_get_num_items_in_batch"):
            batches, items = original(self, epoch_iterator, *args, **kwargs)
        else:
            taken = []

            def countable(batch: Any) -> Any:
                taken.append(batch)
                return with_countable_labels(self, batch)

            _, items = original(self, map(countable, epoch_iterator), *args, **kwargs)
            batches = taken
        if getattr(self.args, "include_num_input_tokens_seen", False) not in (False, "no"):
            batches = [_with_countable_input(self, batch) for batch in batches]
        return batches, items

    return get_batch_samples


def _with_countable_input(trainer: Any, batch: Any) -> Any:
    """Return ``batch`` with a main input, and a mask, that the training loop up to 5.2 can count."""
    from hf_packfix.packed import Countable, PackedSequence

    main = getattr(trainer.model, "main_input_name", "input_ids")
    if not isinstance(batch, Mapping) or not isinstance(batch.get(main), PackedSequence):
        return batch
    packed = {key: batch[key] for key in (main, "attention_mask") if isinstance(batch.get(key), PackedSequence)}
    return type(batch)({**batch, **{key: Countable._make(value) for key, value in packed.items()}})  # type: ignore[call-arg]


PATCHES = (
    prepare_input,
    floating_point_ops,
    track_num_input_tokens,
    get_num_items_in_batch,
    get_batch_samples,
    compute_loss,
)
