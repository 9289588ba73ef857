"""Train and evaluate a tagger beside another package, and write what was logged to a file, as JSON.

    python tests/support/third_party_runs.py hooks FILE packed|padded first|last [PACKAGE]
    python tests/support/third_party_runs.py ray FILE packed|padded
    torchrun --nproc-per-node 2 tests/support/third_party_runs.py deepspeed FILE packed|padded

``tests/tools/third_parties.py`` runs these in environments of their own, in which the variable ``HF_PACKFIX`` turns
hf_packfix on, or does not. What must not be imported before another package stands inside functions.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[2])
sys.path.append(ROOT)  # behind the installed hf_packfix

#: What the import hooks of typeguard and jaxtyping are asked to instrument.
INSTRUMENTED = "transformers.trainer"


def train(layout: str, prepare: Callable[[Any], Any] = lambda trainer: trainer, **changes: Any) -> Any:
    """Train and evaluate a tagger; return the Trainer, which was prepared."""
    from tests.support import oracle

    collate = oracle.packed_batch if layout == "packed" else oracle.padded_batch
    options = {"model": oracle.Tagger, "data": oracle.rows(), "options": {"compute_metrics": oracle.accuracy}}
    with tempfile.TemporaryDirectory() as directory:
        trainer = prepare(oracle.new_trainer(Path(directory), collate=collate, **options | changes))
        trainer.train()
        trainer.evaluate()
    return trainer


def logged(trainer: Any, processes: int = 1) -> list[dict[str, float]]:
    """Return what a Trainer has logged in so many processes."""
    from tests.support import oracle

    assert trainer.accelerator.num_processes == processes
    return oracle.logged(trainer)


def hooks(file: str, layout: str, order: str, *packages: str) -> None:
    """Train beside an import hook of another package; write where the patches stand as well.

    With ``first``, the other package puts its hook in before anything else is imported. With ``last``,
    ``import hf_packfix`` comes before the hook, which then stands in front.
    """
    if order == "last":
        import hf_packfix
    with tempfile.TemporaryDirectory() as directory:
        for package in packages:
            put_in(package, directory)
        finders = [type(finder).__module__.partition(".")[0] for finder in sys.meta_path]
        entries = logged(train(layout, max_steps=4))
    import hf_packfix

    states = {patch.target: patch.state for patch in hf_packfix.status().patches}
    loaded = {target: state for target, state in states.items() if target.partition(":")[0] in sys.modules}
    write(file, {"logged": entries, "finders": finders, "patches": loaded})


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


def ray(file: str, layout: str) -> None:
    """Train with Ray Train in two processes on the CPU."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(num_cpus=2, include_dashboard=False)
    with tempfile.TemporaryDirectory() as directory:
        result = TorchTrainer(
            in_each_process,
            train_loop_config={"root": ROOT, "layout": layout, "file": file},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=directory),
        ).fit()
    assert result.error is None


def in_each_process(config: dict[str, Any]) -> None:
    """Train; the process of rank 0 writes what was logged."""
    sys.path.append(config["root"])
    from ray.train.huggingface.transformers import prepare_trainer

    from tests.support.third_party_runs import logged, train, write

    trainer = train(config["layout"], prepare_trainer, ddp_backend="gloo")
    entries = logged(trainer, processes=2)
    if trainer.is_world_process_zero():
        write(config["file"], {"two processes": entries})


def deepspeed(file: str, layout: str) -> None:
    """Train at every stage in both precisions, on the CPU if ``DS_ACCELERATOR`` says so; the first process writes."""
    import torch
    from accelerate.state import AcceleratorState

    from tests.support import oracle

    class FeatureTagger(oracle.Tagger):
        """Reads vectors, which DeepSpeed casts to the dtype of the weights; token ids would stay as they are."""

        def __init__(self, config: oracle.OracleConfig) -> None:
            super().__init__(config)
            self.embedding = torch.nn.Linear(3, oracle.HIDDEN)

    allow_cpu()
    torch.set_num_threads(1)
    scales = 1 + torch.arange(3)  # vectors [T, 3] that tell the labels
    data = [{**row, "input_ids": torch.sin(row["input_ids"][:, None] * scales)} for row in oracle.rows()]
    outcomes = {}
    for stage in (1, 2, 3):
        for dtype in ("fp32", "bf16"):
            AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the configuration of the run before
            trainer = train(
                layout,
                model=FeatureTagger,
                data=data,
                use_cpu=False,  # True turns DeepSpeed off; DS_ACCELERATOR chooses the device
                bf16=dtype == "bf16",
                deepspeed=configuration(stage, dtype),
            )
            assert trainer.is_deepspeed_enabled
            outcomes[f"stage {stage}, {dtype}"] = logged(trainer, processes=2)
    if torch.distributed.get_rank() == 0:
        write(file, outcomes)
    torch.distributed.destroy_process_group()


def configuration(stage: int, dtype: str) -> dict[str, Any]:
    """Return a configuration of DeepSpeed; the Trainer fills in what is "auto"."""
    filled_in = ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu")
    return {
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        **dict.fromkeys([*filled_in, "train_batch_size"], "auto"),
    }


def allow_cpu() -> None:
    """Let accelerate and transformers take DeepSpeed on a CPU, which DeepSpeed itself supports.

    accelerate chooses a backend only for accelerators or ``use_cpu=True``, and transformers asks for a GPU for bf16.
    Nothing is compiled: torch's own all-reduce replaces DeepSpeed's, which is C++.
    """
    import deepspeed
    from accelerate.state import DistributedType, PartialState
    from transformers import training_args

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.NO)
    training_args.is_torch_bf16_gpu_available = lambda: True


def write(file: str, outcome: Any) -> None:
    Path(file).write_text(json.dumps(outcome))


if __name__ == "__main__":
    {"hooks": hooks, "ray": ray, "deepspeed": deepspeed}[sys.argv[1]](*sys.argv[2:])
