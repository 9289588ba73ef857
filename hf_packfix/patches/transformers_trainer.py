"""``transformers.trainer``: moving a batch to the device, counting what it holds, and checking it in evaluation.

What else the evaluation loop does to a packed batch is done by functions of ``transformers.trainer_pt_utils`` and
``accelerate.utils.operations``, and patched there.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hf_packfix._warnings import warn_once
from hf_packfix.engine import probe
from hf_packfix.engine.declare import Declaration, always, around, hand_made, is_active, with_our_models
from hf_packfix.engine.lazily import evaluation, packing, torch
from hf_packfix.engine.patch import Patch, raise_if_unsafe, unsafe
from hf_packfix.engine.targets import Function

if TYPE_CHECKING:
    from torch.nn.utils.rnn import PackedSequence

_ARGUMENTS = "transformers.training_args:TrainingArguments"
_MAIN_INPUT_NAME = "transformers.modeling_utils:PreTrainedModel.main_input_name"


# --- moving a batch --------------------------------------------------------------------------------------

# The types that most batches consist of, from the first wrapper on; none is a named tuple. A lookup of the type is
# faster than `isinstance`, and a global faster than a variable of an enclosing function, which each call copies.
_ordinary: Collection[type] = ()

# Raised here, before the first forward: `DataParallel.scatter` would split the fields of a PackedSequence one by one
# and fail on `batch_sizes` with a message that names neither the cause nor a way out (pytorch #31422).
_DATA_PARALLEL = (
    "nn.DataParallel, which the Trainer uses for {0} GPUs without a launcher, cannot split a PackedSequence. Start a "
    "process for each GPU, with `torchrun --nproc-per-node {0} SCRIPT` or `accelerate launch --num_processes {0} "
    "SCRIPT`, or let the Trainer see one GPU alone (CUDA_VISIBLE_DEVICES=0)."
)


def _moves(original: Function) -> bool:
    trainer = type("Trainer", (), {"_prepare_input": original})()
    trainer.args = SimpleNamespace(device=torch.device("meta"), _n_gpu=1)
    trainer.is_deepspeed_enabled = False
    return probe.is_on_meta(trainer._prepare_input({"x": probe.packed()})["x"])


@hand_made(
    "transformers.trainer:Trainer._prepare_input",
    parameters=("self", "data"),
    problem="moves a batch to the device by rebuilding tuples from a generator, which a PackedSequence refuses",
    fix="moves data and index tensors",
    uses=("Trainer.args", "Trainer.is_deepspeed_enabled", f"{_ARGUMENTS}.device", f"{_ARGUMENTS}._n_gpu"),
    upstream_supports=_moves,
    issue="https://github.com/huggingface/transformers/issues/29068",
)
def _prepare_input(original: Function, patch: Patch) -> Function:
    """Return a ``_prepare_input`` that handles named tuples, and dataclasses that hold a PackedSequence.

    Upstream rebuilds other named tuples in the same line that fails on a PackedSequence, and leaves dataclasses on the
    CPU. ``data`` goes through the ``_prepare_input`` of a subclass that has its own.

    Hand-made, since it is called for every leaf of every batch: every instruction shows. Of ordinary values only the
    type is looked at.

    Args:
        original: ``_prepare_input``, which calls itself through the Trainer for what is nested.
        patch: the patch that the wrapper belongs to.
    """
    global _ordinary
    _ordinary = packing.LEAVES | {dict, list, tuple}
    # True if upstream's own function is wrapped directly; for a tensor it only calls `.to(device)`, and casts for
    # DeepSpeed.
    upstream = getattr(original, "__globals__", None) is vars(sys.modules[patch.module])
    packed_sequence, with_data = packing.PackedSequence, packing.with_data

    def _prepare_input(self: Any, data: Any) -> Any:
        return original(self, data) if type(data) in _ordinary else prepare_other(self, data)

    def prepare_other(trainer: Any, data: Any) -> Any:
        if patch.active:
            if isinstance(data, packed_sequence):
                return prepare_packed(trainer, data)
            if isinstance(data, tuple):
                if packing.is_namedtuple(data):
                    return packing.rebuild(data, [trainer._prepare_input(item) for item in data])
            elif hasattr(data, "__dataclass_fields__"):
                return prepare_dataclass(trainer, data)
        return original(trainer, data)

    def prepare_dataclass(trainer: Any, data: Any) -> Any:
        # A `ModelOutput` is a mapping, which the original rebuilds. Others, and classes, it returns as they are.
        fields = () if isinstance(data, (Mapping, type)) else dataclasses.fields(data)
        held = {field.name: getattr(data, field.name) for field in fields if hasattr(data, field.name)}
        if not packing.contains(held):
            return original(trainer, data)
        moved = copy.copy(data)
        for name, value in held.items():
            # Past the `__setattr__` of a frozen one.
            object.__setattr__(moved, name, trainer._prepare_input(value))
        return moved

    def prepare_packed(trainer: Any, data: Any) -> PackedSequence:
        if unsafe:
            raise_if_unsafe(evaluates=evaluation.current() is not None)
        packed = data if type(data) is packed_sequence else packed_sequence._make(data)
        arguments, prepare = trainer.args, trainer._prepare_input
        # The property `n_gpu` returns this, but takes longer than the rest for a tensor that need not move.
        if arguments._n_gpu > 1:
            raise ValueError(_DATA_PARALLEL.format(arguments._n_gpu))
        direct = upstream and getattr(prepare, "__func__", None) is _prepare_input
        if not direct or trainer.is_deepspeed_enabled:
            return with_data(packed, prepare(packed.data))
        tensor, device = packed.data, arguments.device
        return with_data(packed, tensor if tensor.device == device else tensor.to(device))

    return _prepare_input


# --- counting what a batch holds -------------------------------------------------------------------------


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
    return original(self, packing.map_packed(lambda packed: packed.data, inputs))


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
    uses=("Trainer.args", "Trainer.model", f"{_ARGUMENTS}.include_num_input_tokens_seen", _MAIN_INPUT_NAME),
    upstream_supports=_counts_tokens,
    since="5.3",
)
def _track_num_input_tokens(original: Function, self: Any, inputs: Any) -> Any:
    """Let the original count one element for each token, all of them real, so that both modes give the same sum."""
    main = _main_input_name(self)
    if _counts_input_tokens(self) and isinstance(inputs, Mapping) and packing.is_packed(inputs.get(main)):
        real = torch.ones(packing.num_tokens(inputs[main]), dtype=torch.int64, device="cpu")
        inputs = {**inputs, main: real, "attention_mask": real}
    return original(self, inputs)


def _counts_input_tokens(trainer: Any) -> bool:
    return trainer.args.include_num_input_tokens_seen not in (False, "no")


def _main_input_name(trainer: Any) -> str:
    return getattr(trainer.model, "main_input_name", "input_ids")


def _counts_items(original: Function) -> bool:
    trainer = SimpleNamespace(
        model_accepts_loss_kwargs=True,
        compute_loss_func=None,
        _loss_shifts_labels=False,
        model=None,
        args=SimpleNamespace(average_tokens_across_devices=False, n_gpu=1, world_size=1),
        accelerator=SimpleNamespace(parallelism_config=None),
        get_tp_size=lambda: 1,
        get_cp_size=lambda: 1,
        get_sp_size=lambda: 1,
    )
    return bool(original(trainer, [{"labels": probe.packed()}], torch.device("cpu")) == 3)


@around(
    "transformers.trainer:Trainer._get_num_items_in_batch",
    when=with_our_models,
    parameters=("self", "batch_samples", "device"),
    problem="silently gives up on packed labels, so that accumulated gradients come out N times too large",
    fix="counts the labels that the loss uses",
    uses=("Trainer.model", "Trainer.compute_loss_func"),
    upstream_supports=_counts_items,
    silent="training",
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
    when=always,
    parameters=("self", "epoch_iterator", "num_batches"),
    problem="transformers <= 5.2 counts input tokens, and <= 4.56 label items, inside the training loop",
    fix="makes packed inputs and labels countable",
    uses=(
        "Trainer.args",
        "Trainer.model",
        "Trainer.compute_loss_func",
        f"{_ARGUMENTS}.include_num_input_tokens_seen",
        _MAIN_INPUT_NAME,
    ),
    upstream_supports=_counts_elsewhere,
    silent="training",
    until="5.3",
)
def get_batch_samples(original: Function, self: Any, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
    """Let the original count the items of padded tensors, and the loop the tokens of packed ones with a ``numel()``.

    The batches that come back are those of the iterator. If the loop counts tokens, their main input is countable
    until ``_prepare_input`` turns it back.
    """
    if is_active("transformers.trainer:Trainer._get_num_items_in_batch"):
        batches, items = original(self, epoch_iterator, *args, **kwargs)
    else:
        batches = []

        def countable(batch: Any) -> Any:
            batches.append(batch)
            return _with_countable_labels(self, batch) if with_our_models(batch) else batch

        _, items = original(self, map(countable, epoch_iterator), *args, **kwargs)
    if packing.contains(batches) and _counts_input_tokens(self):
        batches = [_with_countable_input(self, batch) for batch in batches]
    return batches, items


def _with_countable_input(trainer: Any, batch: Any) -> Any:
    """Return ``batch`` with a main input, and a mask, that the training loop up to 5.2 can count."""
    main = _main_input_name(trainer)
    if not isinstance(batch, Mapping) or not packing.is_packed(batch.get(main)):
        return batch
    kind = _countable_packed_sequence()
    counted = {key: kind._make(batch[key]) for key in (main, "attention_mask") if packing.is_packed(batch.get(key))}
    return type(batch)({**batch, **counted})  # type: ignore[call-arg]


@cache
def _countable_packed_sequence() -> Any:
    class CountablePackedSequence(packing.PackedSequence):
        """A PackedSequence that can be counted as the training loop up to transformers 5.2 counts an input or a mask.

        The loop calls ``input.numel()``, ``mask.sum()`` or, under "non_padding" with a tokenizer,
        ``(input != pad_token_id).sum()``, in the middle of ``Trainer._inner_training_loop``. Each is the number of
        real tokens N.
        """

        def numel(self) -> int:
            return packing.num_tokens(self)

        def sum(self) -> torch.Tensor:
            return torch.tensor(packing.num_tokens(self), device="cpu")

        def __ne__(self, other: object) -> Any:
            # A PackedSequence holds no padding, so no step of it is the padding token.
            if not isinstance(other, int):
                return super().__ne__(other)
            return torch.ones(packing.num_tokens(self), dtype=torch.bool, device="cpu")

        def __reduce__(self) -> Any:  # pickle does not find this class by its name
            return packing.PackedSequence, tuple(self)

    return CountablePackedSequence


@around(
    "transformers.trainer:Trainer.compute_loss",
    when=with_our_models,
    parameters=("self", "model", "inputs"),
    problem="label smoothing and compute_loss_func keep the labels from the model: smoothing then compares each token "
    "that our language model reads with itself, and our encoder-decoder has nothing to decode",
    fix="takes the labels that the loss uses, and decoder_input_ids, from the model",
    uses=("Trainer.label_smoother", "Trainer.compute_loss_func", "Trainer.model"),
    issue="https://github.com/huggingface/transformers/issues/27161",
)
def compute_loss(original: Function, self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Pass labels that match the logits step by step, and ``decoder_input_ids``, for models that declare them.

    The original takes the labels out of the batch before it calls the model, and shifts them by one column if
    transformers lists the model's class as a causal language model.
    """
    if self.label_smoother is None and self.compute_loss_func is None:
        return original(self, model, inputs, *args, **kwargs)
    # Only for models with `labels_in_loss`: what upstream does for others stays as it is.
    labels_in_loss = getattr(self.model, "labels_in_loss", None)
    if labels_in_loss is not None and _has_labels(inputs):
        labels = inputs["labels"]
        if self.compute_loss_func is None:
            inputs = {**inputs, "labels": labels_in_loss(inputs)}
        prepare = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if prepare is not None and inputs.get("decoder_input_ids") is None:
            inputs = {**inputs, "decoder_input_ids": prepare(labels=labels)}
    return original(self, model, inputs, *args, **kwargs)


def _has_labels(inputs: Any) -> bool:
    return isinstance(inputs, Mapping) and inputs.get("labels") is not None


def _with_countable_labels(trainer: Any, batch: Any) -> Any:
    """Replace packed labels of a Trainer's batch with plain tensors, so that the original can count them.

    Every packed batch of a training comes through here, as the data loader returned it: an inconsistent
    PackedSequence, on which torch's recurrent layers may compute something, is found here.

    A model with a method ``labels_in_loss`` declares which labels its loss uses. ``labels_in_loss(inputs)`` returns
    them, a tensor or packed, with one label for each of the model's logits, and -100 if the loss ignores it. The
    models of ``hf_packfix.models`` have it: they ignore labels at padding, wherever it is, which upstream's count
    cannot know.
    """
    has_packed = packing.check_batch(batch)
    labels_in_loss = getattr(trainer.model, "labels_in_loss", None)
    # With the user's own loss, upstream's count is what it is written for.
    if labels_in_loss is not None and trainer.compute_loss_func is None and _has_labels(batch):
        # The original may leave out the first: an ignored one in front, and all of these count.
        flat = torch.nn.functional.pad(labels_in_loss(batch).data.flatten(), (1, 0), value=-100)
        return {**{key: value for key, value in batch.items() if key != "shift_labels"}, "labels": flat}
    if not has_packed:
        return batch
    changed = {}
    if packing.is_packed(batch.get("shift_labels")):
        changed["shift_labels"] = _countable(batch["shift_labels"].data)
    if packing.is_packed(batch.get("labels")):
        changed["labels"] = _with_first_column(batch["labels"])
    return {**batch, **changed} if changed else batch


def _countable(data: torch.Tensor) -> torch.Tensor:
    # In bytes -100 would be 156: padding that counts, and a label that does not.
    return data.to(packing.dtype_with(data.dtype, -100))


def _with_first_column(labels: PackedSequence) -> torch.Tensor:
    """Return labels with each sequence's first in a column of its own.

    The original counts in ``[..., 1:]`` if the loss shifts labels, and in all columns if it does not.
    """
    data = _countable(labels.data)
    if data.dim() != 1 or not len(data):
        return packing.pad(labels, -100, promote=True)
    # Not padded by sequence: the B first steps stand before all others in `data`. So they are the first column of
    # [B, N / B, rounded up].
    sequences = int(labels.batch_sizes[0])
    return torch.nn.functional.pad(data, (0, -len(data) % sequences), value=-100).view(-1, sequences).T


# --- checking a batch in evaluation ----------------------------------------------------------------------


@around(
    "transformers.trainer:Trainer.evaluation_loop",
    when=always,
    parameters=("self", "dataloader", "description"),
    problem="calls the same functions for evaluate() and predict(), and for packed and padded batches",
    fix="notes which of them runs and whether a batch was packed",
)
def evaluation_loop(
    original: Function, self: Any, dataloader: Any, description: Any, *args: Any, **kwargs: Any
) -> Any:
    """Note that a loop begins, and whether it evaluates: ``predict`` on rows without labels is nothing to warn of."""
    with evaluation.running(evaluation.Loop(evaluates=description == "Evaluation")):
        return original(self, dataloader, description, *args, **kwargs)


@around(
    "transformers.trainer:Trainer.prediction_step",
    parameters=("self", "model", "inputs"),
    problem="evaluates silently on inconsistent packed sequences, or when no label name covers the target; cuts a "
    "bare PackedSequence from compute_loss like a tuple",
    fix="raises, or warns, and names the keys; predicts what the PackedSequence holds",
    uses=("Trainer.compute_loss", "Trainer.label_names", "Trainer.can_return_loss", "Trainer.model", _MAIN_INPUT_NAME),
    silent="evaluation",
)
def prediction_step(original: Function, self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Check a packed batch and what the model returns for it, and warn of what would be wrong silently.

    Raises:
        ValueError: the fields of a PackedSequence contradict each other.
    """
    if not packing.check_batch(inputs):
        return original(self, model, inputs, *args, **kwargs)
    loop = evaluation.current()
    if loop is not None and loop.evaluates:
        _warn_of_uncovered_labels(self, inputs)
        _warn_of_several_batch_sizes(inputs)
    with _bare_outputs_in_a_tuple(self) as outputs:
        result = original(self, model, inputs, *args, **kwargs)
    if loop is not None:
        loop.note_outputs(inputs, result[1], outputs[0] if outputs else None)
    _warn_of_dropped_indices(inputs, result[1])
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
            if packing.is_packed(result[1]):
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
    sizes = packing.rows_of_keys(inputs)
    first = next(iter(inputs))
    if len(set(sizes.values())) > 1 and packing.is_packed(inputs[first]):
        others = ", ".join(f"{key!r} has {size}" for key, size in sizes.items() if size != sizes[first])
        warn_once(
            f"the packed sequences of a batch differ in number: {first!r} has {sizes[first]} sequences, {others}. "
            f"Samples are counted, and losses weighted, by the first key of the batch, {first!r}: let the collator "
            f"put the key first whose sequences are the rows of the data set",
            cause=f"several batch sizes: {list(sizes)}",
        )


def _warn_of_dropped_indices(inputs: Mapping[str, Any], outputs: Any) -> None:
    """Warn if the model returned the packing of an input without its index tensors: its rows would be out of order."""
    for output in packing.packed_in(outputs):
        for key, value in inputs.items():
            if (
                packing.is_packed(value)
                and (value.sorted_indices is None) != (output.sorted_indices is None)
                and torch.equal(value.batch_sizes, output.batch_sizes)
                and not packing.same_packing(value, output)
            ):
                without, with_them = ("output", key) if output.sorted_indices is None else (key, "output")
                warn_once(
                    f"the model's output has the lengths of {key!r}, but only one of them has index tensors: the "
                    f"{with_them} is in the order of the data set, the {without} sorted by length, and metrics would "
                    f"compare one sequence with another. Keep the index tensors: hf_packfix.with_data(x, data), or "
                    f"PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices); or let the collator "
                    f"sort the rows and pack with enforce_sorted=True"
                )


#: What target names contain, and names that are targets. Upstream's `find_labels` knows "label" and the positions.
_TARGET_WORDS = ("label", "target")
_TARGETS = ("y", "start_positions", "end_positions")

#: Ends of the names of inputs that a model may go without.
_INPUTS = ("_mask", "_ids", "_embeds", "_values", "_features", "lengths")


def _warn_of_uncovered_labels(trainer: Any, inputs: Mapping[str, Any]) -> None:
    """Warn if the Trainer computes no loss for a batch, since ``label_names`` covers no target in it."""
    names = list(trainer.label_names)
    there = [name for name in names if inputs.get(name) is not None]
    if names and there == names:
        return
    returns_loss = inputs.get("return_loss")
    # As in `Trainer.prediction_step`: a model that returns a loss without labels, as CLIP does.
    if not names and (trainer.can_return_loss if returns_loss is None else returns_loss):
        return
    found, sure = (there, True) if there else _targets(trainer, inputs)
    if sure:
        cure = f"name the target: TrainingArguments(label_names={found})"
    elif found:
        either = " or ".join(map(repr, found))
        cure = f"if {either} is the target, name it: TrainingArguments(label_names=[{found[-1]!r}])"
    else:
        cure = (
            "none of them looks like a target: let the collator return it, and name it in TrainingArguments("
            "label_names=[...]). A model whose loss needs no labels is evaluated with its loss if its forward has "
            "the parameter return_loss=True"
        )
    warn_once(
        f"the Trainer computes no eval_loss and does not call compute_metrics, since it found no labels in the "
        f"batch: label_names is {names}, the batch has the keys {list(inputs)}; {cure}"
    )


def _targets(trainer: Any, inputs: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Return the keys of a batch that are targets of the model, and whether that is sure enough to advise them.

    In this order: keys with the name of a target; keys that ``forward`` does not take, which a Trainer's own
    ``compute_loss`` takes out before; keys of parameters that ``forward`` can do without, and what is left beside the
    main input.
    """
    parameters: Mapping[str, inspect.Parameter] = {}
    with suppress(AttributeError, TypeError, ValueError):
        model = trainer.model
        parameters = inspect.signature(model.forward).parameters
    main = _main_input_name(trainer)
    if main not in inputs:
        main = next((name for name in [*parameters, *inputs] if name in inputs), main)
    keys = [key for key, value in inputs.items() if key not in (main, "return_loss") and value is not None]
    named = [key for key in keys if key in _TARGETS or any(word in key.lower() for word in _TARGET_WORDS)]
    if named:
        return named, True
    keys = [key for key in keys if not key.endswith(_INPUTS)]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [] if takes_any or not parameters else [key for key in keys if key not in parameters]
    if unknown:
        return unknown, len(unknown) == 1
    optional = [key for key in keys if key in parameters and parameters[key].default is None]
    return (optional, len(optional) == 1) if optional else (keys, False)


# --- grouping rows by length -----------------------------------------------------------------------------

_SAMPLERS: Declaration = {
    "parameters": ("self",),
    "problem": "groups rows by length only if their key is input_ids or a column of lengths is left",
    "fix": "groups them by the main input of the model",
    "uses": ("Trainer.model", "Trainer.processing_class", "Trainer.model_input_names", _MAIN_INPUT_NAME),
}


@around("transformers.trainer:Trainer._get_eval_sampler", when=always, **_SAMPLERS)
@around("transformers.trainer:Trainer._get_train_sampler", when=always, **_SAMPLERS)
def _get_train_sampler(original: Function, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the sampler; if upstream finds no lengths, as if the main input was that of a processing class."""
    try:
        return original(self, *args, **kwargs)
    except ValueError as error:
        name = _main_input_name(self)
        if name == "input_ids":
            raise
        own, self.processing_class = self.processing_class, SimpleNamespace(model_input_names=[name])
        try:
            return original(self, *args, **kwargs)
        except ValueError:
            raise error from None
        finally:
            self.processing_class = own
