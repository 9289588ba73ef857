"""Small recurrent models, the same sequences in every layout they read, and a reference that computes step by step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers import Trainer

from hf_packfix.models import RecurrentEncoderDecoder

CELLS = ["rnn", "lstm", "gru"]
LAYOUTS = ["packed", "right", "left", "holes"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def new_model(kind: Any, cell: str = "gru", layers: int = 1, **changes: Any) -> Any:
    """Return a model that reads 13 tokens into 6 units, with weights that depend on the arguments alone."""
    torch.manual_seed(0)
    fields = {"vocab_size": 13, "embedding_size": 5, "hidden_size": 6, "num_hidden_layers": layers, "num_labels": 3}
    if kind is RecurrentEncoderDecoder:
        fields |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return kind(kind.config_class(cell, **{**fields, **changes}))


def tokens(lengths: Iterable[int] = (3, 7, 1, 7, 4), seed: int = 0, low: int = 0, high: int = 13) -> list[Tensor]:
    """Return token ids ``[T]`` from ``low`` on and below ``high``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (length,), generator=generator) for length in lengths]


def arrange(layout: str, sequences: list[Tensor], fill: float = 0) -> tuple[Any, Tensor | None]:
    """Return sequences ``[T, *]`` in a layout, and their attention mask if there is padding, which holds ``fill``.

    The layout is "packed", or where the padding stands: "right", "left", or "holes" for everywhere.
    """
    if layout == "packed":
        return pack_sequence(sequences, enforce_sorted=False), None
    width = 2 + max(map(len, sequences))
    mask = torch.zeros(len(sequences), width, dtype=torch.int64)
    padded = torch.full((*mask.shape, *sequences[0].shape[1:]), fill, dtype=sequences[0].dtype)
    for row, sequence in enumerate(sequences):
        for step, value in enumerate(sequence):
            place = {
                "right": step,
                "left": width - len(sequence) + step,
                "holes": width - 1 - (len(sequence) - 1 - step) * (width - 1) // max(1, len(sequence) - 1),
            }[layout]
            mask[row, place] = 1
            padded[row, place] = value
    return padded, mask


def sequences_of(result: Any, mask: Tensor | None) -> list[Tensor]:
    """Return the sequences ``[T, *]`` of a result in a layout, in original order."""
    if isinstance(result, PackedSequence):
        padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(result, batch_first=True)
        return [row[:length] for row, length in zip(padded, lengths, strict=True)]
    assert mask is not None
    return [row[real.bool()] for row, real in zip(result, mask, strict=True)]


def run(
    rnn: torch.nn.RNNBase, steps: Tensor, start: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor, Tensor]:
    """Run one sequence ``[T, D]`` through the weights of a network, cell by cell, without dropout.

    ``start`` is the hidden and the cell state of every layer and direction before it, ``[L, H]``; zeros by default.
    Returns the last layer's outputs ``[T, O]``, and the hidden state of every layer and direction at its end.
    """
    finals = []
    for layer in range(rnn.num_layers):
        outputs = []
        for suffix in ["", "_reverse"][: 1 + rnn.bidirectional]:
            weights = [
                getattr(rnn, f"{name}_l{layer}{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
            hidden = cell = steps.new_zeros(1, rnn.hidden_size)
            if start is not None:
                hidden, cell = (None if state is None else state[len(finals)][None] for state in start)
            states = []
            for step in steps.flip(0) if suffix else steps:
                if rnn.mode == "LSTM":
                    hidden, cell = torch.lstm_cell(step[None], (hidden, cell), *weights)
                else:
                    function = torch.gru_cell if rnn.mode == "GRU" else torch.rnn_tanh_cell
                    hidden = function(step[None], hidden, *weights)
                states.append(hidden)
            outputs.append(torch.cat(states[::-1] if suffix else states))
            finals.append(hidden)
        steps = torch.cat(outputs, dim=1)
    return steps, torch.cat(finals)


def assert_same_step(model: nn.Module, output: Any, mask: Tensor | None, logits: list[Tensor], loss: Tensor) -> None:
    """Compare the logits, the loss and every gradient of a model's output with those of a loop over steps."""
    gradients = []
    for each in (output.loss, loss):
        each.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    found = output.logits if logits[0].dim() == 1 else sequences_of(output.logits, mask)
    torch.testing.assert_close([*found], logits, **CLOSE)
    torch.testing.assert_close(output.loss, loss, **CLOSE)
    torch.testing.assert_close(*gradients, **CLOSE)


def smoothed(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """Return the loss with label smoothing over logits ``[N, V]`` and targets ``[N]``."""
    scores, targets = -logits.log_softmax(-1)[targets != -100], targets[targets != -100]
    nll = scores[torch.arange(len(targets)), targets]
    return ((1 - epsilon) * nll + epsilon * scores.mean(-1)).mean()


def assert_first_step(trainer: Trainer, model: nn.Module, loss: Tensor) -> None:
    """Compare the loss and the gradient norm that a Trainer logged first with a loss that ``model`` led to."""
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    step = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
    torch.testing.assert_close([step["loss"], float(step["grad_norm"])], [loss.item(), norm.item()], rtol=1e-4, atol=0)
