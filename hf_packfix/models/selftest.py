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
from hf_packfix.models.configuration_recurrent import CELL_TYPES
from hf_packfix.models.upstream import CACHE_NAME, CACHE_NAMES

_VOCABULARY, _PAD, _START, _END = 11, 0, 1, 2


def selftest(cells: Sequence[str] = CELL_TYPES) -> dict[str, str]:
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
    return _of_kind(kind, models.AUTO_CLASSES[kind].from_config(config))


def _of_kind(kind: type[Any], model: Any) -> Any:
    if type(model) is not kind:
        raise AssertionError(f"expected {kind.__name__} from AutoModel, found {type(model).__name__}")
    return model


def _sequences(*lengths: int) -> list[Tensor]:
    return [(torch.arange(length) * (length + 2)) % (_VOCABULARY - 3) + 3 for length in lengths]


def _padded(sequences: list[Tensor], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return ids ``[B, T]`` and their mask, both int64."""
    rows = [ids.flip(0) if left else ids for ids in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=_PAD)
    ids = ids.flip(1) if left else ids
    return ids, (ids != _PAD).to(torch.int64)


def _batches(kind: type[Any], sequences: list[Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a batch with labels for a model, padded and packed."""
    ids, mask = _padded(sequences)
    packed = pack_sequence(sequences, enforce_sorted=False)
    if kind is models.RecurrentForSequenceClassification:
        labels: Any = [torch.tensor([len(ids) % 3 for ids in sequences])] * 2
    else:
        labels = [ids.masked_fill(mask == 0, -100), packed]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels[0]}, {"input_ids": packed, "labels": labels[1]}


def _close(found: Any, expected: Any, what: str, *, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


# --- the checks ------------------------------------------------------------------------------------------


def save_and_load(cell: str) -> None:
    """A saved and loaded model has the same weights, bit for bit, and returns the same output."""
    ids, mask = _padded(_sequences(4, 2))
    for kind, auto in models.AUTO_CLASSES.items():
        model = _model(kind, cell).eval()
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            loaded = _of_kind(kind, auto.from_pretrained(directory)).eval()
        _close(loaded.state_dict(), model.state_dict(), f"{kind.__name__}: weights after loading", rtol=0, atol=0)
        given = {"labels": ids} if kind is models.RecurrentEncoderDecoder else {}
        output = "last_hidden_state" if kind is models.RecurrentModel else "logits"
        before, after = (found(ids, mask, **given)[output] for found in (model, loaded))
        # Not bit for bit: matrix products differ in their last bits by where in memory the weights lie.
        _close(after, before, f"{kind.__name__}: output after loading")


def padded_equals_packed(cell: str) -> None:
    """The same rows, padded and packed, give the same loss, logits and gradients."""
    for kind in models.AUTO_CLASSES.keys() - {models.RecurrentModel}:
        model = _model(kind, cell)
        padded, packed = _batches(kind, _sequences(3, 5, 1))
        results = []
        for batch in (padded, packed):
            output = model(**batch)
            gradients = torch.autograd.grad(output.loss, list(model.parameters()))
            logits = output.logits
            if isinstance(logits, PackedSequence):
                logits, _ = pad_packed_sequence(logits, batch_first=True)
            if logits.dim() == 3:
                logits = logits[padded["attention_mask"].bool()]
            names = (f"gradient of {name}" for name, _ in model.named_parameters())
            results.append({"loss": output.loss, "logits": logits, **dict(zip(names, gradients, strict=True))})
        _close(results[1], results[0], kind.__name__)


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
            what = f"generate() with {beams} beams depends on the batch, or on the state it carries along"
            _close(row[ids.shape[1] :], alone[len(prompt) :], what)
    sampled = model.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=2, **words)
    if sampled.shape != (6, 8):
        raise AssertionError(f"expected 6 rows of 8 tokens from sampling, found {list(sampled.shape)}")
    translator = _model(models.RecurrentEncoderDecoder, cell).eval()
    found = translator.generate(ids, attention_mask=mask, do_sample=False, **words)
    recomputed = translator.generate(ids, attention_mask=mask, do_sample=False, use_cache=False, **words)
    _close(found, recomputed, "the encoder-decoder generates other tokens without its state")


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
    kind = models.RecurrentForCausalLM
    batches = _batches(kind, _sequences(3, 5, 1))
    losses = []
    for batch in batches:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as directory:
            arguments = transformers.TrainingArguments(
                directory, max_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True
            )
            # One row stands for the batch, which its collator returns.
            trainer = transformers.Trainer(_model(kind, cell), arguments, lambda rows: rows[0], [batch])
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
