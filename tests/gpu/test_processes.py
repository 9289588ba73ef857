"""Several GPUs: nccl between two processes, and the error of one process with two GPUs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.device import on_device
from tests.support import stuck
from tests.support.distributed_worker import scenarios
from tests.support.installed import ROOT
from tests.support.layouts import LAYOUTS
from tests.support.oracle import Tagger, new_trainer, packed_batch, rows

pytestmark = pytest.mark.gpu

NAMES = [name for name, _ in scenarios()]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of every scenario, by rank, of two processes with a GPU each."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    directory = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    env = {key: value for key, value in os.environ.items() if key not in ("HF_PACKFIX", "ACCELERATE_USE_CPU")}
    arguments = ["-m", "tests.support.distributed_worker", str(directory)]
    done = stuck.run([*command, *arguments], seconds=200, env={**env, "OMP_NUM_THREADS": "1"}, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_nccl(several_gpus: int, results: list[dict[str, Any]], name: str) -> None:
    for rank in results:
        found, expected = rank[name]["packed"], rank[name]["padded"]
        if name.startswith("language model"):
            expected = dict.fromkeys(LAYOUTS, expected["right"])
        tolerance = 3e-2 if name == "sharded in bfloat16" else 2e-4
        torch.testing.assert_close(found, expected, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ["train", "evaluate", "predict"])
def test_data_parallel_names_the_two_ways_out(several_gpus: int, tmp_path: Path, method: str) -> None:
    trainer = new_trainer(tmp_path, Tagger, rows(), packed_batch, **on_device())
    assert trainer.args.n_gpu == several_gpus
    with pytest.raises(ValueError, match=rf"torchrun --nproc-per-node {several_gpus} .*accelerate launch"):
        getattr(trainer, method)(*([rows()] if method == "predict" else []))
