"""What ``generate()`` needs of a recurrent model: its state as the cache."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from hf_packfix.models.upstream import CACHE_NAME, STATE_NAMES, given_state
from hf_packfix.packing.packed import PackedSequence, pad_left, with_data


@dataclass
class RecurrentCache:
    """The state of a recurrent network after the steps it has read; its size does not grow with them.

    Models return a new one instead of changing the one they are given, so that several continuations can
    start from the same state. The methods are those that ``transformers.generation`` asks of a cache.

    Attributes:
        hidden_state: ``[L, B, H]``, L being the layers times the directions, rows in original order.
        cell_state: the same for an LSTM; None for other cells.
        seen_steps: the number of columns read so far, padding included, as transformers counts.
    """

    hidden_state: Tensor
    cell_state: Tensor | None = None
    seen_steps: int = 0

    is_compileable: ClassVar[bool] = False
    is_croppable: ClassVar[bool] = False
    # One entry a layer upstream, True for linear attention, whose prompts generate() does not cut by the steps seen.
    is_linear: ClassVar[tuple[bool, ...]] = (False,)

    @classmethod
    def from_state(cls, state: Tensor | tuple[Tensor, Tensor], seen_steps: int) -> RecurrentCache:
        """Return the cache of a state as ``torch.nn.RNN``, ``GRU`` or ``LSTM`` returns it."""
        return cls(*state, seen_steps=seen_steps) if isinstance(state, tuple) else cls(state, None, seen_steps)

    @property
    def state(self) -> Tensor | tuple[Tensor, Tensor]:
        """The state as ``torch.nn.RNN``, ``GRU`` or ``LSTM`` takes it."""
        return self.hidden_state if self.cell_state is None else (self.hidden_state, self.cell_state)

    # Not a sequence, though it has `__getitem__`: without this, Python would iterate over it without end.
    __iter__ = None

    def __getitem__(self, layer_idx: int) -> tuple[Tensor]:
        """Return one empty tensor ``[0, 0, seen_steps]``.

        For transformers up to 4.54, whose ``GenerationMixin._get_initial_cache_position`` reads the number of steps
        from the third dimension of ``cache[0][0]`` in what is no ``Cache`` of its own.
        """
        return (torch.empty(0, 0, self.seen_steps, device="meta"),)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns read so far, the same for every layer."""
        return self.seen_steps

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i the former row ``beam_idx[i]``, in place: the beams that survived."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` of the batch, in place."""
        self._replace(lambda state: state.index_select(1, indices.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch, in place, as ``num_beams`` and ``num_return_sequences`` ask."""
        self._replace(lambda state: state.repeat_interleave(repeats, dim=1))

    def _replace(self, function: Any) -> None:
        self.hidden_state = function(self.hidden_state)
        self.cell_state = None if self.cell_state is None else function(self.cell_state)


with contextlib.suppress(ImportError, AttributeError):  # torch < 2.3 has no such function
    from torch.export import register_dataclass

    register_dataclass(RecurrentCache, serialized_type_name="hf_packfix.models.RecurrentCache")


class RecurrentGenerationMixin(GenerationMixin):
    """``generate()`` with the recurrent state as the cache; prompts may be packed."""

    config: Any
    lm_head: nn.Linear
    # A state cannot be rolled back: transformers refuses assisted generation by this mark.
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # Keeps transformers from handing over a cache of keys and values; the model makes its own.
        return False

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as ``GenerationMixin.generate`` does, from prompts in any layout.

        Padded prompts ``[B, T]`` have an ``attention_mask`` ``[B, T]`` that is zero at padding, which may stand
        anywhere: each prompt is continued as if it was alone. Without a mask, ``pad_token_id`` is padding, unless it
        is an end token. The new tokens follow after column T, and the prompts come back as they were given. A packed
        prompt comes back padded on the left.

        A state to continue from is ``cache`` or ``past_key_values``, with any release of transformers.

        Raises:
            ValueError: ``decoder_attention_mask`` of an encoder-decoder ends with padding.
        """
        state = given_state(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in STATE_NAMES}
        if state is not None:
            kwargs[CACHE_NAME] = state
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if isinstance(input_ids, PackedSequence):
            real = with_data(input_ids, torch.ones_like(input_ids.data))
            kwargs["attention_mask"] = pad_left(real)
            input_ids = pad_left(input_ids, self.config.pad_token_id or 0)
        if self.config.is_encoder_decoder:
            # The source may be padded anywhere, the encoder returns its state after the last real step.
            mask = kwargs.get("decoder_attention_mask")
            rows = [] if mask is None else (mask[:, -1] == 0).nonzero().flatten().tolist()
            if rows:
                raise ValueError(
                    f"decoder_attention_mask ends with padding in row {rows[0]}: a target is continued at its last "
                    f"column, pad decoder_input_ids on the left"
                )
            return super().generate(input_ids, *args, **kwargs)
        mask = kwargs.get("attention_mask")
        if mask is None and isinstance(input_ids, Tensor):
            mask = self._mask_of_padding(input_ids, args[0] if args else kwargs.get("generation_config"), kwargs)
        if not isinstance(input_ids, Tensor) or not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
            return super().generate(input_ids, *args, **kwargs)
        # transformers continues a prompt at its last column, and its processors of logits look at the columns before.
        order = _real_steps_last(mask.to(input_ids.device), begin=getattr(kwargs.get(CACHE_NAME), "seen_steps", 0))
        kwargs["attention_mask"] = mask.gather(1, order.to(mask.device))
        output = super().generate(input_ids.gather(1, order), *args, **kwargs)
        sequences = output if isinstance(output, Tensor) else output.sequences
        prompts = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0)
        sequences[:, : prompts.shape[1]] = prompts.to(sequences.device)
        return output

    def _mask_of_padding(self, input_ids: Tensor, config: Any, words: dict[str, Any]) -> Tensor | None:
        """Return the mask ``[B, T]`` that transformers infers from the tokens of prompts without one; None if none.

        ``config`` is the ``generation_config`` that ``generate()`` was given, ``words`` are the keyword arguments.
        """

        def setting(name: str) -> Any:
            given = words.get(name), getattr(config, name, None), getattr(self.generation_config, name, None)
            return next((value for value in given if value is not None), None)

        padding, end = setting("pad_token_id"), setting("eos_token_id")
        ends = [] if end is None else torch.as_tensor(end, device="cpu").flatten().tolist()
        if padding is None or int(padding) in ends:
            return None
        return (input_ids != int(padding)).to(torch.int64)


def _real_steps_last(mask: Tensor, begin: int) -> Tensor:
    """Return the columns ``[B, T]`` in the order that puts padding before the real steps of each row.

    Args:
        mask: ``[B, T]``, zero at padding.
        begin: the number of columns that keep their places, those that a given state has read.
    """
    unread = mask[:, begin:].bool().to(torch.int64).sort(dim=1, stable=True).indices + begin
    read = torch.arange(min(begin, mask.shape[1]), device=mask.device).expand(len(mask), -1)
    return torch.cat([read, unread], dim=1)
