"""Configuration of the recurrent models."""

# `PretrainedConfig.__init_subclass__` is not typed.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from hf_packfix.models.upstream import CACHE_NAME

CELL_TYPES = ("rnn", "lstm", "gru")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

#: Stands in a saved ``config.json`` for readers whose transformers does not know the model type.
_REQUIRES = "import hf_packfix.models (pip install hf-packfix)"


class RecurrentConfig(PretrainedConfig):
    """The fields of a recurrent model; the network itself is ``torch.nn.RNN``, ``LSTM`` or ``GRU``.

    Args:
        cell_type: "rnn" (tanh), "lstm" or "gru".
        vocab_size: the number of token ids, for models that read ``input_ids``.
        input_size: D, for models that read features ``[T, D]`` as ``input_values``. Exactly one of
            ``vocab_size`` and ``input_size`` is given.
        embedding_size: the width of the token embeddings; ``hidden_size`` by default.
        hidden_size: H, the width of the state of one layer in one direction.
        num_hidden_layers: the number of stacked layers.
        bidirectional: whether a second network reads every sequence from its last real step to its first.
        dropout: the share of outputs zeroed between layers while training; as in torch, none follows the
            last layer.
        pad_token_id: the id that stands for padding; below ``vocab_size``, as are the next two.
        bos_token_id: the id that begins a sequence.
        eos_token_id: the id, or ids, that end a generated sequence.
        tie_word_embeddings: whether the language model's head is the embedding matrix.
        use_cache: whether models return their final state.
        **kwargs: what every ``PretrainedConfig`` takes, ``num_labels`` and ``problem_type`` among them.

    Raises:
        ValueError: a field is out of its range or contradicts another one.

    Example:
        >>> RecurrentConfig("lstm", vocab_size=1000, hidden_size=64, bidirectional=True).output_size
        128
    """

    model_type = "recurrent"
    keys_to_ignore_at_inference = [CACHE_NAME, "recurrent_state", "pooler_output"]  # noqa: RUF012
    # `RecurrentConfig()` is an error: transformers 4 must not build one to learn the default values (up to
    # 4.47 it looks at the second name).
    has_no_defaults_at_init = True
    is_composition = True

    def __init__(
        self,
        cell_type: str = "gru",
        vocab_size: int | None = None,
        input_size: int | None = None,
        embedding_size: int | None = None,
        hidden_size: int = 128,
        num_hidden_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("problem_type") is not None:
            # Before super(), which in some releases refuses it with an error of another type.
            _check_choice("problem_type", kwargs["problem_type"], PROBLEM_TYPES)
        kwargs.pop("requires", None)
        # trl reads `auto_map` of every model type that is not transformers' own.
        self.auto_map: dict[str, str] = kwargs.pop("auto_map", {})
        super().__init__(**kwargs)
        # After super(), which in transformers 4 sets the token ids and `tie_word_embeddings` to its own
        # defaults, and in transformers 5 does not know them.
        self.cell_type = cell_type
        self.vocab_size = vocab_size
        self.input_size = input_size
        self.embedding_size = hidden_size if embedding_size is None and vocab_size else embedding_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.bidirectional = bidirectional
        self.dropout = dropout
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.use_cache = use_cache
        self._check()

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the fields to save; ``tie_word_embeddings`` always, transformers' own default being True."""
        changed = {**super().to_diff_dict(), "tie_word_embeddings": self.tie_word_embeddings, "requires": _REQUIRES}
        return {name: value for name, value in changed.items() if name != "auto_map" or value}

    @property
    def num_directions(self) -> int:
        """2 if the model is bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    @property
    def step_size(self) -> int:
        """The width of what the first layer reads at a step: ``embedding_size`` or ``input_size``."""
        return self.embedding_size or self.input_size or 0

    @property
    def output_size(self) -> int:
        """The width of one step's output: ``hidden_size`` for every direction."""
        return self.num_directions * self.hidden_size

    def _check(self) -> None:
        _check_choice("cell_type", self.cell_type, CELL_TYPES)
        if (self.vocab_size is None) == (self.input_size is None):
            raise ValueError(
                f"expected exactly one of vocab_size (for input_ids) and input_size (for input_values), "
                f"found vocab_size={self.vocab_size} and input_size={self.input_size}"
            )
        if self.vocab_size is None and self.embedding_size is not None:
            raise ValueError(
                f"embedding_size={self.embedding_size} needs a vocab_size; features of input_size are not "
                f"embedded, leave embedding_size out"
            )
        optional = ("vocab_size", "input_size", "embedding_size")
        for name in ("hidden_size", "num_hidden_layers", *optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, found {value!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, found {self.dropout!r}")
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError(
                f"problem_type 'single_label_classification' needs num_labels of at least 2, found "
                f"{self.num_labels}: with one label there is nothing to learn"
            )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            self._check_token_id(name)
        if self.tie_word_embeddings and (self.bidirectional or self.embedding_size != self.hidden_size):
            raise ValueError(
                f"tie_word_embeddings needs a vocab_size, one direction, and an embedding_size equal to "
                f"hidden_size; found vocab_size={self.vocab_size}, bidirectional={self.bidirectional}, "
                f"embedding_size={self.embedding_size}, hidden_size={self.hidden_size}"
            )

    def _check_token_id(self, name: str) -> None:
        value = getattr(self, name)
        for token in value if isinstance(value, (list, tuple)) else [value]:
            if token is not None and self.vocab_size is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{name} must be at least 0 and below vocab_size={self.vocab_size}, found {token}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, found {value!r}")
