"""A recurrent encoder-decoder: the decoder starts from a projection of the encoder's final state.

Shapes: B pairs, S steps in the longest source, T in the longest target, V token ids. Source and target may
each be padded, ``[B, S]`` and ``[B, T]``, or packed.
"""

# transformers types its own models in part: calls of its untyped methods, and modules that `nn.Module` hands
# out as Any, are no news here.
# mypy: disable-error-code="no-untyped-call,no-any-return"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from transformers.modeling_outputs import Seq2SeqLMOutput

from hf_packfix.models.configuration_recurrent_encoder_decoder import RecurrentEncoderDecoderConfig
from hf_packfix.models.generation import RecurrentCache, RecurrentGenerationMixin
from hf_packfix.models.loss import shift_right, step_labels, step_loss
from hf_packfix.models.modeling_recurrent import (
    RecurrentModel,
    RecurrentModelOutput,
    RecurrentPreTrainedModel,
    returned,
)
from hf_packfix.models.steps import Steps, map_steps
from hf_packfix.models.upstream import CACHE_NAME, given_state


class RecurrentEncoderDecoder(RecurrentGenerationMixin, RecurrentPreTrainedModel):
    """Sequence to sequence, for ``Seq2SeqTrainer`` and ``generate()``.

    Example:
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> import torch
        >>> tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
        >>> config = RecurrentEncoderDecoderConfig(vocab_size=6, **tokens)
        >>> ids = pack_sequence([torch.tensor([1, 2]), torch.tensor([3, 4, 5])], enforce_sorted=False)
        >>> RecurrentEncoderDecoder(config)(ids, labels=ids).logits.data.shape
        torch.Size([5, 6])
    """

    config_class = RecurrentEncoderDecoderConfig
    config: RecurrentEncoderDecoderConfig

    def __init__(self, config: RecurrentEncoderDecoderConfig) -> None:
        super().__init__(config)
        self.encoder = RecurrentModel(config.side(bidirectional=config.bidirectional))
        self.decoder = RecurrentModel(config.side(bidirectional=False))
        # One vector of width H for every layer of the decoder, two for an LSTM (hidden and cell state).
        states = config.num_hidden_layers * (2 if config.cell_type == "lstm" else 1)
        self.bridge = nn.Linear(self.encoder.config.output_size, states * config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, cast(int, config.vocab_size), bias=False)
        self.post_init()

    def get_encoder(self, *args: Any, **kwargs: Any) -> RecurrentModel:
        """Return the encoder."""
        return self.encoder

    def get_decoder(self, *args: Any, **kwargs: Any) -> RecurrentModel:
        """Return the decoder."""
        return self.decoder

    def get_input_embeddings(self) -> Any:
        """Return the encoder's token embeddings."""
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the encoder's token embeddings."""
        self.encoder.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the head and the embeddings of both sides, as ``PreTrainedModel`` does those of one."""
        self.decoder.resize_token_embeddings(*args, **kwargs)
        resized = super().resize_token_embeddings(*args, **kwargs)
        self.encoder.config.vocab_size = self.config.vocab_size
        return resized

    def forward(
        self,
        input_ids: Steps | None = None,
        attention_mask: Steps | None = None,
        decoder_input_ids: Steps | None = None,
        decoder_attention_mask: Steps | None = None,
        encoder_outputs: RecurrentModelOutput | None = None,
        past_key_values: RecurrentCache | None = None,
        labels: Steps | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache: RecurrentCache | None = None,
        **loss_kwargs: Any,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """Return ``logits`` ``[B, T, V]``, or packed, and, with labels, the loss over the target.

        Args:
            input_ids: int64 ``[B, S]``, or packed: the source.
            attention_mask: ``[B, S]``, zero at padding, which may stand anywhere.
            decoder_input_ids: int64 ``[B, T]``, or packed; by default the labels, shifted right.
            decoder_attention_mask: ``[B, T]``, zero at padding.
            encoder_outputs: what the encoder returned for the source, instead of ``input_ids``.
            past_key_values: the decoder's state, instead of a source.
            labels: int64 ``[B, T]`` padded with -100 on the right, or packed: the target.
            use_cache: whether to return the decoder's state.
            return_dict, num_items_in_batch, cache: see :meth:`RecurrentForCausalLM.forward`.
            **loss_kwargs: ignored. From this name, transformers 4.46 knows that we take ``num_items_in_batch``.

        Raises:
            ValueError: there is neither a source nor a state, neither target nor labels, or the labels do
                not fit ``decoder_input_ids``.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError(
                    "expected decoder_input_ids or labels, found neither: the decoder reads one of them. A Trainer "
                    "with label smoothing or compute_loss_func keeps the labels from the model: turn hf_packfix on, "
                    "or add decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels) to the batch"
                )
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        begun = given_state({**loss_kwargs, "past_key_values": past_key_values, "cache": cache})
        if begun is None:
            if encoder_outputs is None:
                encoder_outputs = self.encoder(input_ids, attention_mask, use_cache=False, return_dict=True)
            begun = self._decoder_start(encoder_outputs)
        output = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            cache=begun,
            use_cache=self.config.use_cache if use_cache is None else use_cache,
            return_dict=True,
        )
        logits: Any = map_steps(self.lm_head, output.last_hidden_state)
        loss = None
        if labels is not None:
            loss = step_loss(logits, step_labels(labels, logits, decoder_attention_mask), num_items_in_batch)
        result = Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            encoder_last_hidden_state=getattr(encoder_outputs, "last_hidden_state", None),
            **{CACHE_NAME: output.recurrent_state},
        )
        return returned(result, self.config, return_dict)

    def prepare_decoder_input_ids_from_labels(self, labels: Steps) -> Steps:
        """Return what the decoder reads to predict ``labels``: the start token, then each label but the last.

        ``DataCollatorForSeq2Seq(tokenizer, model=model)`` calls it, as does a Trainer that computes the loss itself.

        Args:
            labels: int64 ``[B, T]`` padded with -100 on the right, or packed. A label of -100 becomes padding.

        Returns:
            int64 in the layout of the labels.
        """
        return shift_right(labels, self.config.decoder_start_token_id, cast(int, self.config.pad_token_id))

    def labels_in_loss(self, inputs: Mapping[str, Any]) -> Steps:
        """Return the labels as the loss uses them, as ``RecurrentForCausalLM.labels_in_loss`` does."""
        labels = inputs["labels"]
        return step_labels(labels, inputs.get("decoder_input_ids", labels), inputs.get("decoder_attention_mask"))

    def _decoder_start(self, encoder_outputs: RecurrentModelOutput) -> RecurrentCache:
        """Return the state in which the decoder begins, from the encoder's final one ``[B, O]``."""
        layers = self.config.num_hidden_layers
        states = self.bridge(encoder_outputs.pooler_output).tanh().unflatten(1, (-1, self.config.hidden_size))
        hidden, *cell = (part.contiguous() for part in states.transpose(0, 1).split(layers))
        return RecurrentCache(hidden, *cell)
