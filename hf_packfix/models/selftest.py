"""Tiny recurrent models, tried on the installed transformers: what ``hf-packfix doctor`` and the drift check run.

Each check compares a model with itself in another layout, another order of reading, or after a round trip, so that
it finds wrong numbers, not only errors.

    python -m hf_packfix.models.selftest    # one JSON object: each check, and what went wrong
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence

from hf_packfix import models
from hf_packfix._warnings import in_a_line
from hf_packfix.models.upstream import CACHE_NAME, CACHE_NAMES

CELLS = ("rnn", "lstm", "gru")

_VOCABULARY, _PAD, _START, _END = 11, 0, 1, 2
_AUTO = {
    models.RecurrentModel: transformers.AutoModel,
    models.RecurrentForCausalLM: transformers.AutoModelForCausalLM,
    models.RecurrentForSequenceClassification: transformers.AutoModelForSequenceClassification,
    models.RecurrentForTokenClassification: transformers.AutoModelForTokenClassification,
    models.RecurrentEncoderDecoder: transformers.AutoModelForSeq2SeqLM,
}


def selftest(cells: Sequence[str] = CELLS) -> dict[str, str]:
    """Run every check for each cell.

    Returns:
        For each check an empty string, or what went wrong, in a line. Nothing is raised.
    """
    results = {}
    generator, quiet = torch.get_rng_state(), io.StringIO()
    try:
        for name, check in CHECKS.items():
            failures = {}
            for cell in cells:
                torch.manual_seed(0)
                try:
                    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                        check(cell)
                except Exception as error:
                    failures[cell] = in_a_line(error)
            results[name] = "; ".join(f"{cell}: {failure}" for cell, failure in failures.items())
    finally:
        torch.set_rng_state(generator)
    return results


def _model(kind: type[Any], cell: str) -> Any:
    words: dict[str, Any] = {"vocab_size": _VOCABULARY, "hidden_size": 6, "pad_token_id": _PAD, "eos_token_id": _END}
    if kind is models.RecurrentEncoderDecoder:
        config: Any = models.RecurrentEncoderDecoderConfig(cell, bos_token_id=_START, **words)
    else:
        config = models.RecurrentConfig(cell, num_hidden_layers=2, num_labels=_VOCABULARY, **words)
    return _of_kind(kind, _AUTO[kind].from_config(config))


def _of_kind(kind: type[Any], model: Any) -> Any:
    _require(type(model) is kind, f"expected {kind.__name__} from AutoModel, found {type(model).__name__}")
    return model


def _sequences(*lengths: int) -> list[Tensor]:
    return [(torch.arange(length) * (length + 2)) % (_VOCABULARY - 3) + 3 for length in lengths]


def _padded(sequences: list[Tensor], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return ids ``[B, T]`` and their mask, both int64."""
    turned = [ids.flip(0) for ids in sequences] if left else sequences
    ids = pad_sequence(turned, batch_first=True, padding_value=_PAD)
    mask = pad_sequence([torch.ones_like(row) for row in turned], batch_first=True)
    return (ids.flip(1), mask.flip(1)) if left else (ids, mask)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}")


def _labels(kind: type[Any], sequences: list[Tensor]) -> tuple[Any, Any]:
    """Return labels for a padded batch, and for the same batch packed."""
    if kind is models.RecurrentForSequenceClassification:
        labels = torch.tensor([len(ids) % 3 for ids in sequences])
        return labels, labels
    padded = pad_sequence(sequences, batch_first=True, padding_value=-100)
    return padded, pack_sequence(sequences, enforce_sorted=False)


# --- the checks ------------------------------------------------------------------------------------------


def save_and_load(cell: str) -> None:
    """A saved and loaded model has the same weights, bit for bit, and returns the same output."""
    ids, mask = _padded(_sequences(4, 2))
    for kind, auto in _AUTO.items():
        model = _model(kind, cell).eval()
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            loaded = _of_kind(kind, auto.from_pretrained(directory)).eval()
        for name, weight in model.state_dict().items():
            _require(torch.equal(weight, loaded.state_dict()[name]), f"{kind.__name__}: {name} differs after loading")
        given = {"labels": ids} if kind is models.RecurrentEncoderDecoder else {}
        output = "last_hidden_state" if kind is models.RecurrentModel else "logits"
        before, after = (found(ids, mask, **given)[output] for found in (model, loaded))
        # Not bit for bit: matrix products differ in their last bits by where in memory the weights lie.
        _close(after, before, f"{kind.__name__}: output after loading")


def padded_equals_packed(cell: str) -> None:
    """The same rows, padded and packed, give the same loss, logits and gradients."""
    sequences = _sequences(3, 5, 1)
    ids, mask = _padded(sequences)
    packed = pack_sequence(sequences, enforce_sorted=False)
    for kind in _AUTO.keys() - {models.RecurrentModel}:
        model = _model(kind, cell)
        padded_labels, packed_labels = _labels(kind, sequences)
        outputs, gradients = [], []
        for output in (model(ids, mask, labels=padded_labels), model(packed, labels=packed_labels)):
            gradients.append(torch.autograd.grad(output.loss, list(model.parameters())))
            outputs.append(output)
        _close(outputs[1].loss, outputs[0].loss, f"{kind.__name__}: loss")
        expected, logits = outputs[0].logits, outputs[1].logits
        if isinstance(logits, PackedSequence):
            logits, expected = pad_packed_sequence(logits, batch_first=True)[0][mask.bool()], expected[mask.bool()]
        _close(logits, expected, f"{kind.__name__}: logits")
        for (name, _), first, second in zip(model.named_parameters(), *gradients, strict=True):
            _close(second, first, f"{kind.__name__}: gradient of {name}")


def generate(cell: str) -> None:
    """Padded prompts generate what each does alone, by greedy and beam search; sampling returns its rows."""
    prompts = _sequences(4, 1, 3)
    model = _model(models.RecurrentForCausalLM, cell).eval()
    words: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4}
    for beams, left in ((1, True), (3, True), (1, False)):
        ids, mask = _padded(prompts, left=left)
        found = model.generate(ids, attention_mask=mask, num_beams=beams, do_sample=False, **words)
        for row, prompt in zip(found, prompts, strict=True):
            one = {"attention_mask": torch.ones_like(prompt)[None], "num_beams": beams, "use_cache": False}
            alone = model.generate(prompt[None], do_sample=False, **one, **words)[0]
            _require(
                row[ids.shape[1] :].tolist() == alone[len(prompt) :].tolist(),
                f"generate() with {beams} beams depends on the batch, or on the state it carries along",
            )
    sampled = model.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=2, **words)
    _require(sampled.shape == (6, 8), f"expected 6 rows of 8 tokens from sampling, found {list(sampled.shape)}")
    translator = _model(models.RecurrentEncoderDecoder, cell).eval()
    found = translator.generate(ids, attention_mask=mask, do_sample=False, **words)
    recomputed = translator.generate(ids, attention_mask=mask, do_sample=False, use_cache=False, **words)
    _require(found.tolist() == recomputed.tolist(), "the encoder-decoder generates other tokens without its state")


def continue_from_the_state(cell: str) -> None:
    """Reading a sequence in two parts, with the returned state, equals reading it at once."""
    (ids,) = _sequences(6)
    model = _model(models.RecurrentForCausalLM, cell).eval()
    at_once = model(ids[None]).logits[:, 4:]
    state = model(ids[None, :4], use_cache=True)[CACHE_NAME]
    for name in CACHE_NAMES:
        _close(model(ids[None, 4:], **{name: state}).logits, at_once, f"logits with {name}=")


def trainer_step(cell: str) -> None:
    """A step of the Trainer on a packed batch has the loss of the same rows padded."""
    rows: Any = [{"input_ids": ids} for ids in _sequences(3, 5, 1)]

    def padded(batch: list[Any]) -> dict[str, Tensor]:
        sequences = [row["input_ids"] for row in batch]
        ids, mask = _padded(sequences)
        return {"input_ids": ids, "attention_mask": mask, "labels": _labels(models.RecurrentForCausalLM, sequences)[0]}

    def packed(batch: list[Any]) -> dict[str, PackedSequence]:
        ids = pack_sequence([row["input_ids"] for row in batch], enforce_sorted=False)
        return {"input_ids": ids, "labels": ids}

    losses = []
    for collate in (padded, packed):
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as directory:
            arguments = transformers.TrainingArguments(
                directory, max_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True
            )
            trainer = transformers.Trainer(_model(models.RecurrentForCausalLM, cell), arguments, collate, rows)
            losses.append(torch.tensor(trainer.train().training_loss))
    _close(losses[1], losses[0], "training loss")


#: Each check, by the words under which its result is reported.
CHECKS: dict[str, Callable[[str], None]] = {
    "save and load": save_and_load,
    "padded equals packed": padded_equals_packed,
    "generate": generate,
    "continue from the state": continue_from_the_state,
    "a step of the Trainer": trainer_step,
}


if __name__ == "__main__":
    found = selftest()
    print(json.dumps(found))
    sys.exit(1 if any(found.values()) else 0)
