"""Configuration of the recurrent encoder-decoder."""

# `PretrainedConfig.__init_subclass__` is not typed.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

from hf_packfix.models.configuration_recurrent import RecurrentConfig
from hf_packfix.models.upstream import CACHE_NAME, PretrainedConfig

__all__ = ["RecurrentEncoderDecoderConfig"]


class RecurrentEncoderDecoderConfig(PretrainedConfig):
    """What a recurrent encoder-decoder is made of; source and target share one vocabulary of ids.

    Args:
        cell_type: "rnn" (tanh), "lstm" or "gru", of both sides.
        vocab_size: the number of token ids.
        embedding_size: the width of the token embeddings, each side having its own; ``hidden_size`` by
            default.
        hidden_size: H, the width of the state of one layer in one direction.
        num_hidden_layers: the number of stacked layers on each side.
        bidirectional: whether the encoder also reads backwards; the decoder never does.
        dropout: the share of outputs zeroed between layers while training.
        pad_token_id: the id that stands for padding; required, since labels of -100 become it.
        bos_token_id: the id that begins a sequence.
        eos_token_id: the id, or ids, that end a generated sequence.
        decoder_start_token_id: the first id the decoder reads; by default ``bos_token_id``, or else
            ``pad_token_id``.
        use_cache: whether the decoder returns its state.
        **kwargs: what every ``PretrainedConfig`` takes.

    Raises:
        ValueError: a field is out of its range or contradicts another one.
    """

    model_type = "recurrent-encoder-decoder"
    keys_to_ignore_at_inference = [CACHE_NAME, "encoder_last_hidden_state"]  # noqa: RUF012
    # As in RecurrentConfig.
    has_no_defaults_at_init = True
    is_composition = True

    def __init__(
        self,
        cell_type: str = "gru",
        vocab_size: int | None = None,
        embedding_size: int | None = None,
        hidden_size: int = 128,
        num_hidden_layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        decoder_start_token_id: int | None = None,
        use_cache: bool = True,
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
        super().__init__(is_encoder_decoder=True, **{"tie_word_embeddings": False, **kwargs})
        # After super(), for the reason given in RecurrentConfig.
        self.cell_type = cell_type
        self.vocab_size = vocab_size
        self.embedding_size = hidden_size if embedding_size is None else embedding_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.bidirectional = bidirectional
        self.dropout = dropout
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        start = pad_token_id if bos_token_id is None else bos_token_id
        self.decoder_start_token_id = start if decoder_start_token_id is None else decoder_start_token_id
        self.use_cache = use_cache
        self._check()

    def get_text_config(self, *args: Any, **kwargs: Any) -> RecurrentEncoderDecoderConfig:
        """Return this configuration: both sides have the same fields, nothing is to be renamed for one."""
        return self

    def side(self, *, bidirectional: bool) -> RecurrentConfig:
        """Return the configuration of one side: the encoder's, or with one direction the decoder's."""
        return RecurrentConfig(
            cell_type=self.cell_type,
            vocab_size=self.vocab_size,
            embedding_size=self.embedding_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            bidirectional=bidirectional,
            dropout=self.dropout,
            pad_token_id=self.pad_token_id,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
        )

    def _check(self) -> None:
        self.side(bidirectional=self.bidirectional)
        if not 0 <= self.decoder_start_token_id < self.vocab_size:
            raise ValueError(
                f"decoder_start_token_id must be at least 0 and below vocab_size={self.vocab_size}, found "
                f"{self.decoder_start_token_id}"
            )
