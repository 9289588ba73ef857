"""Train and evaluate with Ray Train in two processes on the CPU, and write what was logged to a file.

    python tests/support/third_party_ray.py packed|padded FILE

``tests/tools/third_parties.py`` runs this in an environment of its own. Nothing here turns hf_packfix on: the variable
``HF_PACKFIX`` does, or does not, in the processes that Ray starts.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

ROOT = str(Path(__file__).resolve().parents[2])


def train(config: dict[str, Any]) -> None:
    """Train for two epochs and evaluate, in each process; that of rank 0 writes what was logged."""
    sys.path.insert(0, config["root"])
    from ray.train.huggingface.transformers import prepare_trainer

    from tests.support import oracle

    collate = oracle.packed_batch if config["layout"] == "packed" else oracle.padded_batch
    trainer = prepare_trainer(
        oracle.new_trainer(Path(config["directory"]), oracle.Tagger, oracle.rows(), collate, ddp_backend="gloo")
    )
    trainer.train()
    trainer.evaluate()
    assert trainer.accelerator.num_processes == 2
    if trainer.is_world_process_zero():
        Path(config["file"]).write_text(json.dumps({"two processes": oracle.logged(trainer)}))


def main() -> None:
    """Start Ray and train."""
    layout, file = sys.argv[1:]
    ray.init(num_cpus=2, include_dashboard=False)
    with tempfile.TemporaryDirectory() as directory:
        result = TorchTrainer(
            train,
            train_loop_config={"root": ROOT, "layout": layout, "file": file, "directory": directory},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=directory),
        ).fit()
    assert result.error is None


if __name__ == "__main__":
    main()
