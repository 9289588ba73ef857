"""Recurrent models as transformers models, on ``torch.nn.RNN``, ``LSTM`` and ``GRU``.

Shapes: B sequences, T steps in the longest one, N steps in all, D features, V token ids, C labels, and
O = ``config.output_size`` (the hidden size of every direction). Inputs are padded, ``[B, T]`` token ids or
``[B, T, D]`` features with an optional ``attention_mask``, or packed, with ``data`` ``[N]`` or ``[N, D]``.
Outputs a step come back in the layout of the inputs: padded ones ``[B, T, *]``, packed ones in the very
same packing. What a model computes does not depend on the layout, nor on where the padding stands.
"""

# transformers types its own models in part: calls of its untyped methods, and modules that `nn.Module` hands
# out as Any, are no news here.
# mypy: disable-error-code="no-untyped-call,no-any-return"

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import ModelOutput

from hf_packfix.models.configuration_recurrent import RecurrentConfig
from hf_packfix.models.generation import RecurrentCache, RecurrentGenerationMixin
from hf_packfix.models.loss import next_labels, sequence_loss, step_labels, step_loss
from hf_packfix.models.steps import Steps, is_exporting, is_tracing, map_steps, real_steps
from hf_packfix.models.traced import run_exported, run_traced
from hf_packfix.models.upstream import CACHE_NAME, given_state
from hf_packfix.packing.jagged import from_jagged, to_jagged
from hf_packfix.packing.packed import PackedSequence, with_data
from hf_packfix.rnn import call

Output = TypeVar("Output", bound=ModelOutput)

_CELLS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


@dataclass
class RecurrentModelOutput(ModelOutput):
    """What :class:`RecurrentModel` returns.

    Attributes:
        last_hidden_state: the last layer's output at every step, ``[B, T, O]`` (zero at padding) or packed.
        pooler_output: ``[B, O]``, the last layer's state after the last real step; the reverse direction,
            which starts there, after the first.
        recurrent_state: the final state of every layer; None with ``use_cache=False``. Also readable as ``cache`` and
            ``past_key_values``, as the outputs of transformers' own models call theirs.
    """

    last_hidden_state: Steps | None = None
    pooler_output: Tensor | None = None
    recurrent_state: RecurrentCache | None = None

    @property
    def cache(self) -> RecurrentCache | None:
        """The recurrent state."""
        return self.recurrent_state

    past_key_values = cache


class RecurrentPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization of the recurrent models."""

    config_class: type[RecurrentConfig] = RecurrentConfig
    base_model_prefix = "recurrent"
    supports_gradient_checkpointing = False
    config: RecurrentConfig

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        if config.input_size is not None:
            self.main_input_name = "input_values"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # torch's own initialization, which suits recurrent networks: uniform within 1/sqrt(hidden_size).
        if isinstance(module, (nn.RNNBase, nn.Linear, nn.Embedding)):
            module.reset_parameters()
        if isinstance(module, nn.Embedding) and self.config.tie_word_embeddings:
            # As a head, torch's unit normal would start with logits of the size of sqrt(hidden_size).
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)


class RecurrentModel(RecurrentPreTrainedModel):
    """The bare network: token embeddings, unless it reads features, and the stacked layers.

    Example:
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> model = RecurrentModel(RecurrentConfig("gru", input_size=3, hidden_size=8))
        >>> x = pack_sequence([torch.randn(2, 3), torch.randn(5, 3)], enforce_sorted=False)
        >>> model(input_values=x).last_hidden_state.data.shape  # the states at all real steps
        torch.Size([7, 8])
    """

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        self.embeddings: nn.Embedding | None = None
        if config.vocab_size is not None:
            self.embeddings = nn.Embedding(config.vocab_size, config.step_size)
        self.rnn = _CELLS[config.cell_type](
            config.step_size,
            config.hidden_size,
            config.num_hidden_layers,
            batch_first=True,
            dropout=config.dropout,
            bidirectional=config.bidirectional,
        )
        self.post_init()

    def get_input_embeddings(self) -> Any:
        """Return the token embeddings; None for a model that reads features."""
        return self.embeddings

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embeddings."""
        self.embeddings = value

    def forward(
        self,
        input_ids: Steps | None = None,
        attention_mask: Steps | None = None,
        input_values: Steps | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        cache: RecurrentCache | None = None,
        **kwargs: Any,
    ) -> RecurrentModelOutput | tuple[Any, ...]:
        """Read the sequences.

        Args:
            input_ids: int64 ``[B, T]`` or packed ``[N]``, for a model with a ``vocab_size``.
            attention_mask: ``[B, T]``, zero at padding, which may stand anywhere; with a state also
                ``[B, seen + T]``. Packed inputs have none, or a packed one, which changes nothing.
            input_values: float ``[B, T, D]`` or packed ``[N, D]``, for a model with an ``input_size``; cast
                to the dtype of the weights.
            past_key_values: the state to start from; zeros by default.
            use_cache: whether to return the final state; ``config.use_cache`` by default.
            return_dict: False for a plain tuple; ``config.return_dict`` by default.
            cache: the same as ``past_key_values``, by its name from transformers 5.24 on.
            **kwargs: ignored; transformers passes more than a recurrent model has.

        Raises:
            ValueError: the inputs are missing, of the other kind or of another shape; a mask does not fit
                or has a row without a real step; a bidirectional model is given a state, or a model is given two.
        """
        inputs = self._check_inputs(input_ids, input_values)
        begun = given_state({**kwargs, "past_key_values": past_key_values, "cache": cache})
        if begun is not None and self.config.bidirectional:
            raise ValueError(
                "a bidirectional model cannot continue from a recurrent state (cache, past_key_values): its reverse "
                "direction starts at the last step; leave the state out"
            )
        start = None if begun is None else begun.state
        real = real_steps(attention_mask, inputs, continues=begun is not None)
        if isinstance(inputs, Tensor) and is_exporting():
            steps, state = run_exported(self.rnn, self._embed(inputs), real, start)
        elif real is None:
            steps, state = call(self.rnn, map_steps(self._embed, inputs), start)
        elif is_tracing():
            assert isinstance(inputs, Tensor)
            steps, state = run_traced(self.rnn, self._embed(inputs), real, start)
        else:
            assert isinstance(inputs, Tensor)
            packed = from_jagged(inputs[real], real.sum(1).cpu())
            packed, state = call(self.rnn, with_data(packed, self._embed(packed.data)), start)
            values, _ = to_jagged(packed)
            steps = values.new_zeros((*real.shape, values.shape[1]))
            steps[real] = values
        width = inputs.batch_sizes.numel() if isinstance(inputs, PackedSequence) else inputs.shape[1]
        final = RecurrentCache.from_state(state, width + (0 if begun is None else begun.seen_steps))
        keep_state = self.config.use_cache if use_cache is None else use_cache
        output = RecurrentModelOutput(
            last_hidden_state=steps,
            pooler_output=final.hidden_state[-self.config.num_directions :].transpose(0, 1).flatten(1),
            recurrent_state=final if keep_state else None,
        )
        return returned(output, self.config, return_dict)

    def _embed(self, inputs: Tensor) -> Tensor:
        if self.embeddings is None:
            return inputs.to(self.dtype)
        return self.embeddings(inputs)

    def _check_inputs(self, input_ids: Steps | None, input_values: Steps | None) -> Steps:
        features = self.config.input_size
        name, inputs = ("input_ids", input_ids) if features is None else ("input_values", input_values)
        given = {"input_ids": input_ids, "input_values": input_values}
        found = [key for key, value in given.items() if value is not None]
        if inputs is None or found != [name]:
            raise ValueError(f"this model reads {name} alone, found {' and '.join(found) or 'neither'}")
        packed = isinstance(inputs, PackedSequence)
        expected = [*(["N"] if packed else ["B", "T"]), *([] if features is None else [features])]
        # `torch.export` cannot trace `data` of a tensor that is a slice of another one.
        shape = list(inputs.data.shape if isinstance(inputs, PackedSequence) else inputs.shape)
        if len(shape) != len(expected) or (features is not None and shape[-1] != features):
            raise ValueError(
                f"{name} must be {'packed with data' if packed else 'a tensor'} of shape "
                f"[{', '.join(map(str, expected))}], found {shape}"
            )
        return inputs


class _Classifier(RecurrentPreTrainedModel):
    """The network and a linear layer on top, to the logits of the labels."""

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.recurrent = RecurrentModel(config)
        self.classifier = nn.Linear(config.output_size, cast(int, config.num_labels))
        self.post_init()

    def forward(
        self,
        input_ids: Steps | None = None,
        attention_mask: Steps | None = None,
        input_values: Steps | None = None,
        labels: Steps | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **loss_kwargs: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Return ``logits`` and, with labels, the loss.

        Args:
            input_ids, attention_mask, input_values, return_dict: see :meth:`RecurrentModel.forward`.
            labels: see the class.
            num_items_in_batch: what the summed loss is divided by.
            **loss_kwargs: ignored. From this name, transformers 4.46 knows that we take ``num_items_in_batch``.

        Raises:
            ValueError: see :meth:`RecurrentModel.forward`; or the labels do not fit the inputs.
        """
        output = self.recurrent(input_ids, attention_mask, input_values, use_cache=False, return_dict=True)
        result = self._classify(output, labels, attention_mask, num_items_in_batch)
        return returned(result, self.config, return_dict)

    def _classify(self, output: Any, labels: Any, attention_mask: Steps | None, items: Any) -> ModelOutput:
        raise NotImplementedError


class RecurrentForSequenceClassification(_Classifier):
    """One prediction for each sequence, from the state after the last real step: ``logits`` are ``[B, C]``.

    ``forward`` takes ``input_ids``, ``attention_mask`` and ``input_values`` as :class:`RecurrentModel` does, and
    ``labels``: int64 ``[B]`` for single-label classification, ``[B, C]`` for multi-label, float ``[B, C]`` (``[B]``
    if C is 1) for regression. If ``config.problem_type`` is None, it is set from the first labels.

    Example:
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> config = RecurrentConfig("lstm", vocab_size=6, num_labels=3)
        >>> ids = pack_sequence([torch.tensor([1, 2]), torch.tensor([3, 4, 5])], enforce_sorted=False)
        >>> RecurrentForSequenceClassification(config)(ids, labels=torch.tensor([0, 2])).logits.shape
        torch.Size([2, 3])
    """

    def _classify(self, output: Any, labels: Any, attention_mask: Steps | None, items: Any) -> ModelOutput:
        logits = self.classifier(output.pooler_output)
        loss = None if labels is None else sequence_loss(logits, labels, self.config, items)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class RecurrentForTokenClassification(_Classifier):
    """One prediction for each step: ``logits`` are ``[B, T, C]``, or packed.

    ``forward`` takes ``input_ids``, ``attention_mask`` and ``input_values`` as :class:`RecurrentModel` does, and
    ``labels``: int64 ``[B, T]``, or packed if the inputs are; -100 is ignored, and so is padding.

    Example:
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> config = RecurrentConfig("lstm", vocab_size=6, num_labels=3, bidirectional=True)
        >>> ids = pack_sequence([torch.tensor([1, 2]), torch.tensor([3, 4, 5])], enforce_sorted=False)
        >>> RecurrentForTokenClassification(config)(ids).logits.data.shape
        torch.Size([5, 3])
    """

    def _classify(self, output: Any, labels: Any, attention_mask: Steps | None, items: Any) -> ModelOutput:
        logits: Any = map_steps(self.classifier, output.last_hidden_state)
        loss = None if labels is None else step_loss(logits, step_labels(labels, logits, attention_mask), items)
        return TokenClassifierOutput(loss=loss, logits=logits)

    def labels_in_loss(self, inputs: Mapping[str, Any]) -> Steps:
        """Return the labels as the loss uses them, as :meth:`RecurrentForCausalLM.labels_in_loss` does."""
        labels = inputs["labels"]
        return step_labels(labels, inputs.get(self.main_input_name, labels), inputs.get("attention_mask"))


class RecurrentForCausalLM(RecurrentGenerationMixin, RecurrentPreTrainedModel):
    """A language model: at every step, the next token.

    Example:
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> model = RecurrentForCausalLM(RecurrentConfig("gru", vocab_size=6, pad_token_id=0, eos_token_id=0))
        >>> ids = pack_sequence([torch.tensor([1, 2]), torch.tensor([3, 4, 5])], enforce_sorted=False)
        >>> model(ids, labels=ids).logits.data.shape
        torch.Size([5, 6])
        >>> model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, min_new_tokens=3).shape
        torch.Size([1, 5])
    """

    # transformers 5 reads the pairs, transformers 4 only the names.
    _tied_weights_keys = {"lm_head.weight": "recurrent.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: RecurrentConfig) -> None:
        if config.vocab_size is None or config.bidirectional:
            raise ValueError(
                f"a causal language model needs a vocab_size and bidirectional=False, found "
                f"vocab_size={config.vocab_size} and bidirectional={config.bidirectional}"
            )
        super().__init__(config)
        self.recurrent = RecurrentModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Steps | None = None,
        attention_mask: Steps | None = None,
        past_key_values: RecurrentCache | None = None,
        labels: Steps | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        cache: RecurrentCache | None = None,
        **loss_kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return ``logits`` ``[B, T, V]``, or packed, and, with labels, the loss of predicting the next one.

        Args:
            input_ids, attention_mask, past_key_values: see :meth:`RecurrentModel.forward`.
            labels: int64 in the layout of ``input_ids``, usually equal to them. They are shifted here,
                within each sequence: its first label is never predicted, whatever padding stands before it.
            use_cache, return_dict: see :meth:`RecurrentModel.forward`.
            logits_to_keep: compute the logits of the last so many columns of a padded batch; 0 for all.
            num_items_in_batch: what the summed loss is divided by.
            cache: the same as ``past_key_values``, by its name from transformers 5.24 on.
            **loss_kwargs: ignored. From this name, transformers 4.46 knows that we take ``num_items_in_batch``.

        Raises:
            ValueError: see :meth:`RecurrentModel.forward`; or the labels do not fit the inputs, or
                ``logits_to_keep`` comes with labels or with packed inputs.
        """
        output = self.recurrent(
            input_ids,
            attention_mask,
            cache=given_state({**loss_kwargs, "past_key_values": past_key_values, "cache": cache}),
            use_cache=use_cache,
            return_dict=True,
        )
        steps = output.last_hidden_state
        if logits_to_keep:
            if isinstance(steps, PackedSequence) or labels is not None:
                raise ValueError("logits_to_keep serves generation: leave it out with labels and packed inputs")
            steps = steps[:, -logits_to_keep:]
        logits: Any = map_steps(self.lm_head, steps)
        loss = None
        if labels is not None:
            targets = next_labels(step_labels(labels, logits, attention_mask), attention_mask)
            loss = step_loss(logits, targets, num_items_in_batch)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: output.recurrent_state})
        return returned(result, self.config, return_dict)

    def labels_in_loss(self, inputs: Mapping[str, Any]) -> Steps:
        """Return for every step the label that its logits predict: the next real step's, or -100.

        The Trainer counts these labels, and with label smoothing it computes the loss from them. Its own rule, to
        leave out the first column, is not enough: padding may stand before a sequence, and labels at padding do not
        count whatever they are.

        Args:
            inputs: a batch with labels, by the keywords of :meth:`forward`.

        Returns:
            int64 ``[B, T]``, or packed.

        Raises:
            ValueError: the labels do not fit the inputs, as in :meth:`forward`.
        """
        labels, mask = inputs["labels"], inputs.get("attention_mask")
        return next_labels(step_labels(labels, inputs.get("input_ids", labels), mask), mask)


def returned(output: Output, config: PretrainedConfig, return_dict: bool | None) -> Output | tuple[Any, ...]:
    """Return the output, or its values in a tuple if ``return_dict``, or else the configuration, is False."""
    as_dict = config.return_dict if return_dict is None else return_dict
    return output if as_dict else output.to_tuple()
