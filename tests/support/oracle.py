"""The oracle: the stock Trainer on the same rows padded and masked, next to the packed batch.

The models run a padded batch without packing it: a unidirectional GRU over the padded tensor, masked
afterwards. So the padded run shares no code with what is tested.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

import hf_packfix

#: Runs with every patch reverted.
stock = hf_packfix.disabled

VOCABULARY, CLASSES, HIDDEN = 17, 4, 8
Row = dict[str, Any]


def transformers_from(version: str) -> bool:
    """Tell whether the transformers under test is at least this version."""
    return Version(transformers.__version__) >= Version(version)


@functools.cache
def compiles() -> bool:
    """Return whether this torch compiles on this Python; 2.0 does not on 3.11."""
    try:
        torch.compile(lambda tensor: tensor + 1, backend="eager")(torch.ones(1))
    except RuntimeError:
        return False
    return True


# --- rows and collators ---------------------------------------------------------------------------------


def rows(
    count: int = 14, *, longest: int = 9, seed: int = 0, labels: str = "tokens", ignored: float = 0.2
) -> list[Row]:
    """Return rows of token ids ``[T]`` of lengths 1 to ``longest``, which the first two rows have.

    ``labels`` is "tokens" for one label a step, of which a share is ignored (-100), or "row" for one a row.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    lengths[:2] = torch.tensor([1, longest])[: len(lengths[:2])]
    result = []
    for length in lengths.tolist():
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
        if labels == "row":
            target = ids[-1] % CLASSES
        else:
            target = (ids + torch.arange(length)) % CLASSES
            target[torch.rand(length, generator=generator) < ignored] = -100
        result.append({"input_ids": ids, "labels": target})
    return result


def _collated(features: list[Row], join: Callable[[str, list[Tensor]], Any]) -> dict[str, Any]:
    """Stack numbers, and join what has steps."""
    batch: dict[str, Any] = {}
    for key in features[0]:
        values = [torch.as_tensor(feature[key]) for feature in features]
        batch[key] = join(key, values) if values[0].dim() else torch.stack(values)
    return batch


def padded_batch(features: list[Row]) -> dict[str, Any]:
    """Collate to right-padded tensors, with an attention mask and -100 behind the end of labels."""
    batch = _collated(features, lambda key, values: pad_sequence(values, True, -100 if "label" in key else 0))
    first = next(iter(features[0]))
    batch["attention_mask"] = pad_sequence([torch.ones(len(f[first])).long() for f in features], True)
    return batch


def packed_batch(features: list[Row]) -> dict[str, Any]:
    """Collate to PackedSequences in the order of the rows."""
    return _collated(features, lambda _, values: pack_sequence(values, enforce_sorted=False))


def by_length(collate: Callable[[list[Row]], Any]) -> Callable[[list[Row]], Any]:
    """Sort the rows of a batch from the longest down before collating them."""
    return lambda features: collate(sorted(features, key=lambda f: -len(f["input_ids"])))


def sorted_packed_batch(features: list[Row]) -> dict[str, Any]:
    """Collate rows that are sorted already: both index tensors are None."""
    return _collated(features, lambda _, values: pack_sequence(values))


# --- models ---------------------------------------------------------------------------------------------


class OracleConfig(PretrainedConfig):
    model_type = "hf-packfix-oracle"
    keys_to_ignore_at_inference: ClassVar[list[str]] = []


def _build(module: nn.Module) -> None:
    module.embedding = nn.Embedding(VOCABULARY, HIDDEN)
    module.gru = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
    module.head = nn.Linear(HIDDEN, CLASSES)


def _mean_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    total = cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    items = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(items).clamp(min=1)


def _tag(
    module: Any, input_ids: Any, labels: Any, num_items_in_batch: Any, attention_mask: Any = None
) -> dict[str, Any]:
    packed = isinstance(input_ids, PackedSequence)
    if packed:
        states = module.gru(hf_packfix.with_data(input_ids, module.embedding(input_ids.data)))[0]
        logits: Any = hf_packfix.with_data(states, module.head(states.data))
    else:
        states = module.gru(module.embedding(input_ids))[0]
        logits = module.head(states)
    result = {"logits": logits}
    if labels is not None:
        flat_logits = logits.data if packed else logits.flatten(0, 1)
        flat_labels = labels.data if packed else labels.flatten()
        result = {"loss": _mean_loss(flat_logits, flat_labels, num_items_in_batch), **result}
    if not packed and attention_mask is not None:
        # Masked: what stands behind the end of a row is what the Trainer fills rows with.
        behind = attention_mask.eq(0).unsqueeze(-1)
        result["logits"] = logits.masked_fill(behind, -100)
        states = states.masked_fill(behind, -100)
    return {**result, "states": states}


def _classify(module: Any, input_ids: Any, labels: Any, attention_mask: Any) -> dict[str, Any]:
    if isinstance(input_ids, PackedSequence):
        last = module.gru(hf_packfix.with_data(input_ids, module.embedding(input_ids.data)))[1][-1]
    else:
        states = module.gru(module.embedding(input_ids))[0]
        last = states[torch.arange(len(states)), attention_mask.sum(1) - 1]
    logits = module.head(last)
    return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


class Tagger(PreTrainedModel):
    """One label a step; takes ``num_items_in_batch`` as transformers' own models do."""

    config_class = OracleConfig

    def __init__(self, config: OracleConfig) -> None:
        super().__init__(config)
        _build(self)
        self.post_init()

    def forward(
        self, input_ids: Any = None, labels: Any = None, attention_mask: Any = None, **loss_kwargs: Any
    ) -> TokenClassifierOutput:
        # By that name, since it is what 4.46 tells a model by that takes `num_items_in_batch`.
        result = _tag(self, input_ids, labels, loss_kwargs.get("num_items_in_batch"), attention_mask)
        states = result.pop("states")
        trees = (states, (states,)) if self.config.output_hidden_states else None
        return TokenClassifierOutput(**result, hidden_states=trees)


class Classifier(Tagger):
    """One label a row, from the state after the last real step."""

    def forward(
        self, input_ids: Any = None, labels: Any = None, attention_mask: Any = None
    ) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(**_classify(self, input_ids, labels, attention_mask))


class DropsIndices(Tagger):
    """Rebuilds its packed logits as one did before torch 1.1, when there were no index tensors."""

    def forward(self, input_ids: Any = None, labels: Any = None, attention_mask: Any = None, **options: Any) -> Any:
        result = super().forward(input_ids, labels, attention_mask, **options)
        if isinstance(result.logits, PackedSequence):
            result["logits"] = PackedSequence(result.logits.data, result.logits.batch_sizes)
        return result


class PlainTagger(nn.Module):
    """The tagger as a module that transformers knows nothing about; outputs are a plain dict."""

    def __init__(self) -> None:
        super().__init__()
        _build(self)

    def forward(self, input_ids: Any, labels: Any = None, attention_mask: Any = None) -> dict[str, Any]:
        result = _tag(self, input_ids, labels, None, attention_mask)
        del result["states"]
        return result


class TupleTagger(PlainTagger):
    """The tagger with its outputs in a plain tuple."""

    def forward(self, input_ids: Any, labels: Any = None, attention_mask: Any = None) -> Any:
        return tuple(super().forward(input_ids, labels, attention_mask).values())


class PlainClassifier(PlainTagger):
    def forward(self, input_ids: Any, labels: Any = None, attention_mask: Any = None) -> dict[str, Any]:
        return _classify(self, input_ids, labels, attention_mask)


def new_model(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """Return a model with weights that depend on the seed alone."""
    torch.manual_seed(seed)
    return kind(OracleConfig()) if issubclass(kind, PreTrainedModel) else kind()


# --- running --------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a training run reported: of every optimizer step, and at the end."""

    losses: list[float]
    grad_norms: list[float]
    state: Any
    weights: dict[str, Tensor]
    trainer: Trainer = field(repr=False)


def arguments(directory: Path | str, trainer: type[Trainer] = Trainer, **changes: Any) -> TrainingArguments:
    """Return arguments for a short, silent CPU run that logs every step."""
    values: dict[str, Any] = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 3,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    kind = Seq2SeqTrainingArguments if issubclass(trainer, Seq2SeqTrainer) else TrainingArguments
    return kind(**{**values, **changes})


def new_trainer(
    directory: Path,
    model: nn.Module | type[nn.Module],
    data: Any,
    collate: Callable[[list[Row]], Any],
    *,
    trainer: type[Trainer] = Trainer,
    options: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Trainer:
    """Return a Trainer that trains and evaluates a model, or a new one of a class, on ``data``.

    ``options`` are further arguments of the Trainer, ``changes`` are those that differ from :func:`arguments`.
    """
    return trainer(
        model=new_model(model) if isinstance(model, type) else model,
        args=arguments(directory, trainer, **changes),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        **(options or {}),
    )


def count_real_tokens(trainer: Trainer) -> None:
    """Let ``num_input_tokens_seen`` of a Trainer on padded batches leave out the padding.

    That is what "non_padding" is for, which transformers did not always know: before, it counts all of a tensor.
    """
    if "non_padding" in inspect.getsource(transformers.training_args):
        return
    step = trainer.training_step

    def training_step(model: nn.Module, inputs: Any, *args: Any) -> Any:
        padding = trainer.accelerator.gather(inputs["attention_mask"].eq(0).sum()).sum()
        trainer.state.num_input_tokens_seen -= int(padding)
        return step(model, inputs, *args)

    trainer.training_step = training_step  # type: ignore[method-assign]


def count_items(trainer: Trainer, batches: list[Any]) -> Any:
    """Return ``num_items_in_batch`` as the training loop gets it for these batches."""
    device = [torch.device("cpu")] if transformers_from("4.50") else []
    return trainer.get_batch_samples(iter(batches), len(batches), *device)[1]


@contextlib.contextmanager
def counted_samples() -> Iterator[list[int]]:
    """Yield a list that gets the number of samples of every evaluation inside.

    The metrics have it only divided by a time, of a clock that may be set back.
    """
    counted: list[int] = []

    def speed_metrics(*args: Any, num_samples: int, **kwargs: Any) -> Any:
        counted.append(num_samples)
        return original(*args, num_samples=num_samples, **kwargs)

    module = transformers.trainer
    original = module.speed_metrics
    module.speed_metrics = speed_metrics
    try:
        yield counted
    finally:
        module.speed_metrics = original


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the share of real steps with the right class, as ``compute_metrics`` does."""
    real = prediction.label_ids != -100
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids)[real].mean())}


def logged(trainer: Trainer) -> list[dict[str, float]]:
    """Return the losses, gradient norms and accuracies that a Trainer logged, in order."""
    kept = ("loss", "grad_norm", "eval_loss", "eval_accuracy")
    return [{key: float(entry[key]) for key in kept if key in entry} for entry in trainer.state.log_history]


def train(*args: Any, resume: Any = None, **kwargs: Any) -> Run:
    """Train as :func:`new_trainer` says and return what was reported."""
    trainer = new_trainer(*args, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return Run(
        losses=[entry["loss"] for entry in steps],
        grad_norms=[float(entry["grad_norm"]) for entry in steps],
        state=trainer.state,
        weights={name: value.detach().clone() for name, value in trainer.model.state_dict().items()},
        trainer=trainer,
    )


def assert_same_run(packed: Run, padded: Run, tolerance: float = 2e-5) -> None:
    """Compare losses and gradient norms of every step, and the weights at the end."""
    assert len(packed.losses) == len(padded.losses) > 0
    torch.testing.assert_close(packed.losses, padded.losses, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(packed.grad_norms, padded.grad_norms, rtol=10 * tolerance, atol=tolerance)
    torch.testing.assert_close(packed.weights, padded.weights, rtol=10 * tolerance, atol=tolerance)


def assert_training_equals_padded(
    directory: Path,
    model: Callable[[], nn.Module],
    data: Any,
    packed: Callable[[list[Row]], Any] = packed_batch,
    padded: Callable[[list[Row]], Any] = padded_batch,
    *,
    tolerance: float = 2e-5,
    only_packed: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Run, Run]:
    """Assert that packed batches train under the plugin as padded ones train without it; return both runs.

    ``model`` is a class or a function that builds one. ``options`` are those of :func:`train`, in both runs;
    ``only_packed`` those of the run under the plugin alone.
    """

    def new() -> Any:
        return model if isinstance(model, type) else model()

    found = train(directory, new(), data, packed, **{**options, **(only_packed or {})})
    with stock():
        expected = train(directory, new(), data, padded, **options)
    assert_same_run(found, expected, tolerance)
    return found, expected
