"""Train and evaluate beside an import hook of another package; print what was logged, and where the patches stand.

    python tests/support/third_party_hooks.py packed|padded first|last [PACKAGE]

``tests/tools/third_parties.py`` runs this in environments of their own. With ``first``, the other package puts its
hook in before anything else is imported, and the variable ``HF_PACKFIX`` turns hf_packfix on, or not. With ``last``,
``import hf_packfix`` comes before the hook, which then stands in front.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

#: What the import hooks of typeguard and jaxtyping are asked to instrument.
INSTRUMENTED = "transformers.trainer"


def put_in(package: str, directory: str) -> None:
    """Put in the import hook of a package, as its users do; what it writes goes to a directory."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # the small package of mlflow has no other store
    module = importlib.import_module(package)  # for comet_ml, that is all
    if package == "mlflow":
        module.set_tracking_uri(Path(directory, "tracked").as_uri())
        module.autolog()
    elif package == "typeguard":
        # The Trainer's annotations are not meant to be checked: count only that they are.
        module.config.typecheck_fail_callback = lambda error, memo: None
        module.install_import_hook(INSTRUMENTED)
    elif package == "jaxtyping":
        module.install_import_hook(INSTRUMENTED, None)


def train(packed: bool, directory: str) -> list[dict[str, float]]:
    """Train and evaluate a tagger; return the losses and gradient norms that were logged."""
    import torch
    from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence
    from transformers import Trainer, TrainingArguments

    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = torch.nn.GRU(2, 4, batch_first=True)

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            states = self.gru(x)[0]
            if isinstance(x, PackedSequence):
                return {"loss": torch.nn.functional.cross_entropy(states.data, labels.data), "logits": states}
            loss = torch.nn.functional.cross_entropy(states.flatten(0, 1), labels.flatten())
            return {"loss": loss, "logits": states}

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        x, labels = ([row[key] for row in rows] for key in ("x", "labels"))
        if packed:
            return {"x": pack_sequence(x, enforce_sorted=False), "labels": pack_sequence(labels, enforce_sorted=False)}
        return {"x": pad_sequence(x, True), "labels": pad_sequence(labels, True, -100)}

    def metrics(prediction: Any) -> dict[str, float]:
        real = prediction.label_ids != -100
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids)[real].mean())}

    torch.manual_seed(0)
    rows: Any = [{"x": torch.randn(n, 2), "labels": torch.arange(n) % 4} for n in (3, 1, 5, 2, 4, 4)]
    args = TrainingArguments(
        directory,
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        logging_steps=1,
        learning_rate=0.05,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(Tagger(), args, collate, rows, rows, compute_metrics=metrics)
    trainer.train()
    trainer.evaluate()
    kept = ("loss", "grad_norm", "eval_loss", "eval_accuracy")
    return [{key: float(entry[key]) for key in kept if key in entry} for entry in trainer.state.log_history]


def main() -> None:
    """Run what the command line names; the last line printed is the outcome."""
    layout, order, *packages = sys.argv[1:]
    if order == "last":
        import hf_packfix
    with tempfile.TemporaryDirectory() as directory:
        for package in packages:
            put_in(package, directory)
        finders = [type(finder).__module__.partition(".")[0] for finder in sys.meta_path]
        logged = train(layout == "packed", directory)
    import hf_packfix

    states = {patch.target: patch.state for patch in hf_packfix.status().patches}
    loaded = {target: state for target, state in states.items() if target.partition(":")[0] in sys.modules}
    print(json.dumps({"logged": logged, "finders": finders, "patches": loaded}))


if __name__ == "__main__":
    main()
