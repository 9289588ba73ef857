"""Configuration of the recurrent encoder-decoder."""

# `PretrainedConfig.__init_subclass__` is not typed.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

from hf_packfix.models.configuration_recurrent import RecurrentConfig
from hf_packfix.models.upstream import CACHE_NAME

_OF_BOTH_SIDES = (
    *("cell_type", "vocab_size", "embedding_size", "hidden_size", "num_hidden_layers", "dropout"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)


class RecurrentEncoderDecoderConfig(RecurrentConfig):
    """The fields of a recurrent encoder-decoder; source and target share one vocabulary of ids.

    Args:
        cell_type: "rnn" (tanh), "lstm" or "gru", of both sides.
        vocab_size: the number of token ids.
        bidirectional: whether the encoder also reads backwards; the decoder never does.
        pad_token_id: the id that stands for padding; required, since labels of -100 become it.
        decoder_start_token_id: the first id the decoder reads; by default ``bos_token_id``, or else
            ``pad_token_id``.
        **kwargs: further fields of :class:`RecurrentConfig`, the same for both sides, each of which has embeddings and
            layers of its own; but ``input_size`` and ``tie_word_embeddings``.

    Raises:
        ValueError: a field is out of its range or contradicts another one.
    """

    model_type = "recurrent-encoder-decoder"
    keys_to_ignore_at_inference = [CACHE_NAME, "encoder_last_hidden_state"]  # noqa: RUF012

    def __init__(
        self,
        cell_type: str = "gru",
        vocab_size: int | None = None,
        *,
        bidirectional: bool = True,
        pad_token_id: int | None = None,
        decoder_start_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.pop("tie_word_embeddings", False):
            raise ValueError("tie_word_embeddings must be False: the encoder-decoder's head has its own weights")
        if not kwargs.pop("is_encoder_decoder", True):
            raise ValueError("is_encoder_decoder must be True; for a decoder alone, use RecurrentForCausalLM")
        if vocab_size is None:
            raise ValueError("vocab_size is missing: expected the number of token ids of source and target")
        if pad_token_id is None:
            raise ValueError("pad_token_id is missing: the decoder reads it where a label is -100")
        super().__init__(
            cell_type,
            vocab_size,
            bidirectional=bidirectional,
            pad_token_id=pad_token_id,
            is_encoder_decoder=True,
            **kwargs,
        )
        start = pad_token_id if self.bos_token_id is None else self.bos_token_id
        self.decoder_start_token_id = start if decoder_start_token_id is None else decoder_start_token_id
        self._check_token_id("decoder_start_token_id")

    def get_text_config(self, *args: Any, **kwargs: Any) -> RecurrentEncoderDecoderConfig:
        """Return this configuration: both sides have the same fields, nothing is to be renamed for one."""
        return self

    def side(self, *, bidirectional: bool) -> RecurrentConfig:
        """Return the configuration of one side: the encoder's, or with one direction the decoder's."""
        return RecurrentConfig(bidirectional=bidirectional, **{name: getattr(self, name) for name in _OF_BOTH_SIDES})
