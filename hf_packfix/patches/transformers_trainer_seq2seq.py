"""``transformers.trainer_seq2seq``: evaluation by generating."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from hf_packfix.engine.declare import around, with_our_models
from hf_packfix.engine.lazily import packing, torch
from hf_packfix.engine.targets import Function

_TRAINER = "transformers.trainer:Trainer"


@around(
    "transformers.trainer_seq2seq:Seq2SeqTrainer.prediction_step",
    when=with_our_models,
    parameters=("self", "model", "inputs", "prediction_loss_only"),
    problem="predict_with_generate asks packed labels and inputs for their shape",
    fix="generates from padded inputs",
    uses=(
        f"{_TRAINER}.args",
        f"{_TRAINER}.model",
        f"{_TRAINER}.label_smoother",
        f"{_TRAINER}._prepare_inputs",
        "Seq2SeqTrainer.predict_with_generate",
        "transformers.modeling_utils:PreTrainedModel.main_input_name",
        "transformers.modeling_utils:PreTrainedModel.config",
        "transformers.configuration_utils:PretrainedConfig.is_encoder_decoder",
        "Seq2SeqTrainer.pad_token_id",
    ),
)
def prediction_step(
    original: Function, self: Any, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
) -> Any:
    """Generate from padded tensors, compute the loss from the packed batch.

    The original calls ``self.model.generate`` once with the inputs, ``model`` once with the same inputs for the loss,
    and pads the labels like the generated tokens. It gets padded tensors, and a ``model`` that is called with the
    packed batch instead. It smooths the labels as they are in the batch, without the shift of a language model: for
    models that declare ``labels_in_loss`` (see ``transformers_trainer.py``), it smooths over these.
    """
    if prediction_loss_only or not self.args.predict_with_generate:
        return original(self, model, inputs, prediction_loss_only, *args, **kwargs)
    with _smoothing_over_labels_in_loss(self, inputs):
        if not packing.contains(inputs):
            return original(self, model, inputs, prediction_loss_only, *args, **kwargs)

        def model_on_packed(**_: Any) -> Any:
            return model(**self._prepare_inputs(inputs))

        padded = _for_generation(self.model, inputs)
        return original(self, model_on_packed, padded, prediction_loss_only, *args, **kwargs)


@contextlib.contextmanager
def _smoothing_over_labels_in_loss(trainer: Any, inputs: Any) -> Iterator[None]:
    """Let the Trainer's smoother compare logits with the labels that the model declares for them, if it does."""
    smoother = trainer.label_smoother
    labels_in_loss = getattr(trainer.model, "labels_in_loss", None)
    if smoother is None or labels_in_loss is None or inputs.get("labels") is None:
        yield
        return
    trainer.label_smoother = lambda outputs, labels: smoother(outputs, labels_in_loss(trainer._prepare_inputs(inputs)))
    try:
        yield
    finally:
        trainer.label_smoother = smoother


def _for_generation(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``inputs`` with padded tensors, and an ``attention_mask`` ``[B, T]`` if the main input was packed.

    A decoder-only model continues its prompt, so padding goes on the left; for an encoder it goes on the right. Labels
    are padded with -100 on the right.
    """
    config = getattr(model, "config", None)
    pad = packing.pad if getattr(config, "is_encoder_decoder", False) else packing.pad_left
    token = getattr(config, "pad_token_id", None) or 0
    main: Any = inputs.get(getattr(model, "main_input_name", "input_ids"))

    padded: dict[str, Any] = {}
    for key, value in inputs.items():
        if not packing.is_packed(value):
            padded[key] = value
        elif key == "labels":
            padded[key] = packing.pad(value, -100, promote=True)
        else:
            padded[key] = pad(value, token if key.endswith("input_ids") else 0)
    if packing.is_packed(main) and "attention_mask" not in padded:
        real = torch.ones(packing.num_tokens(main), dtype=torch.int64, device=main.data.device)
        padded["attention_mask"] = pad(packing.with_data(main, real), 0)
    return padded
