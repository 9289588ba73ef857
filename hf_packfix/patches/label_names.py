"""Which key of a batch is the target, if ``TrainingArguments.label_names`` does not name it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from hf_packfix._warnings import warn_once

__all__ = ["warn_of_uncovered_labels"]

#: What target names contain, and names that are targets. Upstream's `find_labels` knows "label" and the positions.
_TARGET_WORDS = ("label", "target")
_TARGETS = ("y", "start_positions", "end_positions")

#: Ends of the names of inputs that a model may go without.
_INPUTS = ("_mask", "_ids", "_embeds", "_values", "_features", "lengths")


def warn_of_uncovered_labels(trainer: Any, inputs: Mapping[str, Any]) -> None:
    """Warn if the Trainer computes no loss for a batch, since ``label_names`` covers no target in it."""
    names = list(trainer.label_names)
    there = [name for name in names if inputs.get(name) is not None]
    if names and there == names:
        return
    returns_loss = inputs.get("return_loss")
    # As in `Trainer.prediction_step`: a model that returns a loss without labels, as CLIP does.
    if not names and (getattr(trainer, "can_return_loss", False) if returns_loss is None else returns_loss):
        return
    found, sure = (there, True) if there else _targets(trainer.model, inputs)
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


def _targets(model: Any, inputs: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Return the keys of a batch that are targets of the model, and whether that is sure enough to advise them.

    In this order: keys with the name of a target; keys that ``forward`` does not take, which a Trainer's own
    ``compute_loss`` takes out before; keys of parameters that ``forward`` can do without, and what is left beside the
    main input.
    """
    parameters = _parameters(model)
    main = getattr(model, "main_input_name", "input_ids")
    if main not in inputs:
        main = next((name for name in [*parameters, *inputs] if name in inputs), None)
    keys = [key for key, value in inputs.items() if key not in (main, "return_loss") and value is not None]
    named = [key for key in keys if key in _TARGETS or any(word in key.lower() for word in _TARGET_WORDS)]
    if named:
        return named, True
    keys = [key for key in keys if not key.endswith(_INPUTS)]
    takes_any = not parameters or any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
    )
    unknown = [] if takes_any else [key for key in keys if key not in parameters]
    if unknown:
        return unknown, len(unknown) == 1
    optional = [key for key in keys if key in parameters and parameters[key].default is None]
    return (optional, len(optional) == 1) if optional else (keys, False)


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(model.forward).parameters
    except (AttributeError, TypeError, ValueError):
        return {}
