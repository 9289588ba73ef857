"""Train and evaluate with DeepSpeed on the CPU, and write what was logged to a file.

    torchrun --nproc-per-node 2 tests/support/third_party_deepspeed.py packed|padded FILE

``tests/tools/third_parties.py`` runs this in an environment of its own. Nothing here turns hf_packfix on: the variable
``HF_PACKFIX`` does, or does not. DeepSpeed takes the CPU if ``DS_ACCELERATOR=cpu``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_PACKFIX", "0")  # the module below imports hf_packfix
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers import training_args

from tests.support import oracle

RUNS = [(stage, dtype) for stage in (1, 2, 3) for dtype in ("fp32", "bf16")]


class FeatureTagger(oracle.Tagger):
    """Reads vectors, which DeepSpeed casts to the dtype of the weights; token ids would stay as they are."""

    def __init__(self, config: oracle.OracleConfig) -> None:
        super().__init__(config)
        self.embedding = torch.nn.Linear(3, oracle.HIDDEN)


def rows() -> list[oracle.Row]:
    """Return rows of vectors ``[T, 3]`` that tell the labels."""
    ids = torch.arange(3)
    return [{**row, "input_ids": torch.sin(row["input_ids"][:, None] * (1 + ids))} for row in oracle.rows()]


def configuration(stage: int, dtype: str) -> dict[str, Any]:
    """Return a configuration of DeepSpeed; the Trainer fills in what is "auto"."""
    return {
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == "bf16"},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "zero_allow_untested_optimizer": True,
    }


def logged(layout: str, stage: int, dtype: str) -> list[dict[str, float]]:
    """Train for two epochs and evaluate; return what was logged at every step and at the end."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the configuration of the run before
    with tempfile.TemporaryDirectory() as directory:
        trainer = oracle.new_trainer(
            Path(directory),
            FeatureTagger,
            rows(),
            oracle.packed_batch if layout == "packed" else oracle.padded_batch,
            options={"compute_metrics": oracle.accuracy},
            use_cpu=False,  # True turns DeepSpeed off; DS_ACCELERATOR chooses the device
            bf16=dtype == "bf16",
            deepspeed=configuration(stage, dtype),
        )
        trainer.train()
        trainer.evaluate()
    assert trainer.is_deepspeed_enabled
    assert trainer.accelerator.num_processes == 2
    return oracle.logged(trainer)


def allow_cpu() -> None:
    """Let accelerate and transformers take DeepSpeed on a CPU, which DeepSpeed itself supports.

    accelerate chooses a backend only for accelerators or ``use_cpu=True``, and transformers asks for a GPU for bf16.
    Nothing is compiled: torch's own all-reduce replaces DeepSpeed's, which is C++.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.NO)
    training_args.is_torch_bf16_gpu_available = lambda: True


def main() -> None:
    """Run every stage in both precisions; the first process writes the file."""
    layout, file = sys.argv[1:]
    torch.set_num_threads(1)
    allow_cpu()
    outcomes = {f"stage {stage}, {dtype}": logged(layout, stage, dtype) for stage, dtype in RUNS}
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
