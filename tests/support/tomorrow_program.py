"""What runs on a copy of upstream in which a name is changed: ``python -m tests.support.tomorrow_program LAYOUT...``.

Prints one JSON object: for each layout ("padded", "packed") and use the numbers that were reported, or the error; the
warnings of hf_packfix, what it logged, and the states of its patches; with ``doctor``, what the doctor reports.
``HF_PACKFIX=0`` runs it without the plugin.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

_logged: list[str] = []
_handler = logging.Handler(logging.INFO)
_handler.emit = lambda record: _logged.append(record.getMessage())  # type: ignore[method-assign]
logging.getLogger("hf_packfix").addHandler(_handler)
logging.getLogger("hf_packfix").setLevel(logging.INFO)

with warnings.catch_warnings(record=True) as _at_import:
    warnings.simplefilter("always")
    import hf_packfix
    from tests.support import oracle
    from tests.support.reports import Recorder, Stream

Numbers = dict[str, Any]


def _trained(trainer: Any) -> Numbers:
    trainer.train()
    logged = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in logged if "loss" in entry],
        "grad_norms": [float(entry["grad_norm"]) for entry in logged if "grad_norm" in entry],
        "tokens": trainer.state.num_input_tokens_seen,
    }


def _arrays(value: Any) -> Any:
    """Return nested arrays as their shapes and sums."""
    if isinstance(value, (tuple, list)):
        return [_arrays(item) for item in value]
    return None if value is None else [list(value.shape), float(value.sum())]


def accumulate(new: Callable[..., Any]) -> Numbers:
    return _trained(new(oracle.Tagger, gradient_accumulation_steps=2, include_num_input_tokens_seen="non_padding"))


def smooth_labels(new: Callable[..., Any]) -> Numbers:
    return _trained(new(oracle.Tagger, label_smoothing_factor=0.1))


def dispatch(new: Callable[..., Any]) -> Numbers:
    """Train on a stream, whose batches one process loads for all."""
    return _trained(new(oracle.Tagger, train=Stream, max_steps=3))


def evaluate(new: Callable[..., Any]) -> Numbers:
    recorder = Recorder()
    trainer = new(
        oracle.Tagger, options={"compute_metrics": recorder}, include_for_metrics=["loss", "inputs"], evaluation=Stream
    )
    with oracle.counted_samples() as counted:
        metrics = trainer.evaluate()
    (prediction,) = recorder.calls
    return {
        "metrics": {key: metrics[key] for key in ("eval_loss", "eval_accuracy")},
        "samples": counted,
        "seen": _arrays([prediction.predictions, prediction.label_ids, prediction.losses]),
    }


def predict(new: Callable[..., Any]) -> Numbers:
    found = new(oracle.Tagger, eval_accumulation_steps=2).predict(oracle.rows())
    return {"loss": found.metrics["test_loss"], "arrays": _arrays([found.predictions, found.label_ids])}


USES = {use.__name__: use for use in (accumulate, smooth_labels, dispatch, evaluate, predict)}


def _models(collate: Callable[[Any], Any]) -> Numbers:
    """Train our language model with label smoothing, and generate from our encoder-decoder."""
    from transformers import Seq2SeqTrainer

    from hf_packfix import models

    ids = {"vocab_size": oracle.VOCABULARY, "hidden_size": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"].clone()} for row in oracle.rows()]
    oracle.torch.manual_seed(0)
    language = models.RecurrentForCausalLM(models.RecurrentConfig("gru", **ids))
    translator = models.RecurrentEncoderDecoder(models.RecurrentEncoderDecoderConfig("gru", **ids))
    new = partial(oracle.new_trainer, tempfile.mkdtemp(), data=data, collate=collate, label_smoothing_factor=0.1)
    trainer = new(model=language, gradient_accumulation_steps=2)
    seq2seq = new(model=translator, trainer=Seq2SeqTrainer, predict_with_generate=True)
    seq2seq.model.generation_config.max_length = 8
    found = seq2seq.predict(data)
    return {**_trained(trainer), "generated": _arrays([found.predictions]), "loss": found.metrics["test_loss"]}


def run(layout: str) -> dict[str, Any]:
    collate = oracle.packed_batch if layout == "packed" else oracle.padded_batch
    data = oracle.rows()

    def new(model: Any, train: Any = list, evaluation: Any = list, **changes: Any) -> Any:
        trainer = oracle.new_trainer(tempfile.mkdtemp(), model, train(data), collate, **changes)
        trainer.eval_dataset = evaluation(data)
        return trainer

    results: dict[str, Any] = {}
    uses = {**USES, **({"models": lambda _: _models(collate)} if hf_packfix.is_enabled() else {})}
    for name, use in uses.items():
        try:
            results[name] = use(new)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return results


def main() -> None:
    with warnings.catch_warnings(record=True) as later:
        warnings.simplefilter("always")
        found: dict[str, Any] = {layout: run(layout) for layout in sys.argv[1:] if layout != "doctor"}
    kept = [str(w.message) for w in [*_at_import, *later] if issubclass(w.category, hf_packfix.HFPackfixWarning)]
    states = {patch.target: patch.state for patch in hf_packfix.status().patches}
    if "doctor" in sys.argv:
        from hf_packfix.commands.doctor import examine

        report = examine([])
        found |= {"problems": report.problems, "healthy": report.healthy}
    print(json.dumps({**found, "warnings": kept, "logged": _logged, "states": states}))


if __name__ == "__main__":
    main()
