"""A tiny packed batch through a real Trainer: what ``hf-packfix doctor`` tries."""

from __future__ import annotations

import contextlib
import io
import tempfile
from typing import Any


def try_trainer() -> str | None:
    """Train a step and evaluate a tagger on packed batches.

    Returns:
        None where all is well; otherwise what went wrong, in a line.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as directory:
            metrics = _train_and_evaluate(directory)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if metrics.get("eval_shape") != [3, 4]:
        return f"compute_metrics got labels of the shape {metrics.get('eval_shape')}, expected [3, 4]"
    return None


def _train_and_evaluate(directory: str) -> dict[str, Any]:
    import torch
    from torch.nn.utils.rnn import PackedSequence, pack_sequence
    from transformers import Trainer, TrainingArguments

    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = torch.nn.GRU(2, 3)

        def forward(self, input_ids: PackedSequence, labels: PackedSequence) -> dict[str, Any]:
            states = self.gru(input_ids)[0]
            return {"loss": torch.nn.functional.cross_entropy(states.data, labels.data), "logits": states}

    def collate(rows: list[dict[str, Any]]) -> dict[str, PackedSequence]:
        return {key: pack_sequence([row[key] for row in rows], enforce_sorted=False) for key in rows[0]}

    def shape(prediction: Any) -> dict[str, Any]:
        return {"shape": list(prediction.label_ids.shape)}

    rows: Any = [{"input_ids": torch.ones(n, 2), "labels": torch.arange(n) % 3} for n in (1, 4, 2)]
    arguments = TrainingArguments(
        directory,
        max_steps=1,
        per_device_eval_batch_size=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,  # with several GPUs and no launcher the Trainer takes DataParallel, which nothing can mend
    )
    trainer = Trainer(Tagger(), arguments, collate, rows, rows, compute_metrics=shape)
    trainer.train()
    metrics: dict[str, Any] = trainer.evaluate()
    return metrics
