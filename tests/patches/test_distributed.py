"""Streaming and several processes: every row reaches the process that the padded run gives it, whole.

Real processes, over gloo and the loopback interface; the padded run has the same number of processes.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.distributed.utils
from transformers import Trainer

import hf_packfix
from tests.support import stuck
from tests.support.distributed_worker import FULLY_SHARDS, numbered, scenarios
from tests.support.interpreters import ROOT, environment
from tests.support.layouts import LAYOUTS
from tests.support.oracle import Tagger, assert_training_equals_padded, padded_batch, rows, stock
from tests.support.reports import Stream, assert_evaluation_equals_padded, assert_same_report, report

NAMES = [name for name, _ in scenarios()]
DISPATCHED = [name for name in NAMES if name.startswith("dispatch")]
TRAINED = [name for name in NAMES if name.startswith(("map-style", "streaming"))]
WORLDS = [2, 3]

#: After how many seconds a launch is stuck; all scenarios take 15 to 60.
SECONDS = 200


def launch(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    env = environment(measured=True) | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    return stuck.run([*command, *arguments], seconds=SECONDS, env=env, cwd=ROOT)


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} processes")
def results(request, tmp_path_factory) -> list[dict[str, Any]]:
    """The results of every scenario, by rank."""
    directory = tmp_path_factory.mktemp("results")
    result = launch(request.param, "-m", "tests.support.distributed_worker", str(directory))
    if stuck.MESSAGE in result.stderr:
        # Seen twice in some hundred launches, beside heavy load; why is not known. Once more, with a word of where.
        warnings.warn(result.stderr[result.stderr.index(stuck.MESSAGE) :], stacklevel=1)
        result = launch(request.param, "-m", "tests.support.distributed_worker", str(directory))
    assert result.returncode == 0, result.stderr[-5000:]
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("name", DISPATCHED)
def test_dispatched_rows_are_those_of_the_padded_run(results, name):
    too_small = ["dispatch 4 split=False drop=True"] + ["dispatch 4 split=True drop=True"] * (len(results) == 3)
    for rank in results:
        assert rank[name]["packed"] == rank[name]["padded"]
        assert rank[name]["packed"].get("again", True)
        # A data set that ends before the first round is too much for stock, and nothing else is.
        assert ("error" in rank[name]["packed"]) == (name in too_small)


@pytest.mark.parametrize("name", [name for name in DISPATCHED if "drop=False" in name])
def test_no_row_is_lost_or_doubled_beyond_the_filling(results, name):
    count = int(name.split()[1])
    arrived = [row[-1] for rank in results for batch in rank[name]["packed"]["batches"] for row in batch]
    whole = dict(enumerate(numbered(count)))
    assert set(arrived) == set(whole)
    doubled = len(arrived) - count
    assert doubled < len(results)
    assert sorted({number for number in arrived if arrived.count(number) > 1}) == list(range(doubled))
    for rank in results:
        for batch in rank[name]["packed"]["batches"]:
            for ids, features, number in batch:
                assert ids == whole[number]["input_ids"].tolist()
                assert features == whole[number]["features"].tolist()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize("name", TRAINED)
def test_the_trainer_reports_what_the_padded_run_reports(results, name):
    for rank in results:
        packed, padded = rank[name]["packed"], rank[name]["padded"]
        assert packed["tokens"] == padded["tokens"]
        assert packed["samples"] == padded["samples"]
        # Without a length, stock counts what this process alone has seen.
        assert packed["samples"] == [13] or name.startswith("streaming")
        for key in ("losses", "grad_norms", "eval_loss", "accuracy", "predictions", "label_ids"):
            close(packed[key], padded[key])
        assert len(packed["seen"]) == len(padded["seen"]) > 0
        for ours, theirs in zip(packed["seen"], padded["seen"], strict=True):
            close(ours[0], theirs[0])
            close(ours[1], theirs[1])
        assert len(packed["label_ids"]) == 13


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("language model")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_language_model_trains_alike_in_every_layout(results, name, layout):
    if "[..., 1:]" not in inspect.getsource(Trainer):
        pytest.skip("this release counts the first label of each padded sequence, too, which no model predicts")
    for rank in results:
        found, expected = rank[name]["packed"][layout], rank[name]["padded"]["right"]
        assert len(found["losses"]) == len(expected["losses"]) > 0
        for key in ("losses", "grad_norms", "eval_loss"):
            close(found[key], expected[key])


@pytest.mark.parametrize("name", ["gathering", "broadcasting"])
def test_gathering_and_broadcasting_equal_the_padded_operations(results, name):
    for rank in results:
        assert rank[name]["packed"] == rank[name]["padded"]


@pytest.mark.skipif(not FULLY_SHARDS, reason="this torch has no fully_shard")
@pytest.mark.parametrize(("name", "tolerance"), [("sharded", 1e-5), ("sharded in bfloat16", 3e-2)])
def test_a_fully_sharded_model_trains_as_a_whole_one(results, name, tolerance):
    for rank in results:
        packed, whole = rank[name]["packed"], rank[name]["padded"]
        torch.testing.assert_close(packed, whole, rtol=tolerance, atol=tolerance)
        assert packed[-1] < packed[0]  # it learns


def test_a_rank_that_fails_raises_its_own_error(tmp_path):
    (tmp_path / "fails.py").write_text("""
import sys
import hf_packfix
from accelerate import PartialState
from tests.support import oracle
from tests.support.patched import patch_of

def collate(features):
    if PartialState().process_index == 1:
        raise LookupError("this is rank 1's own error")
    return oracle.packed_batch(features)

oracle.new_trainer(sys.argv[1], oracle.Tagger, oracle.rows(), collate).train()
""")
    result = launch(2, str(tmp_path / "fails.py"), str(tmp_path))
    assert result.returncode != 0
    assert "LookupError: this is rank 1's own error" in result.stderr


def test_a_stream_in_one_process_reports_what_the_padded_one_does(tmp_path):
    data = rows()
    options = {"max_steps": 8, "include_num_input_tokens_seen": True}
    packed, _ = assert_training_equals_padded(tmp_path, Tagger, Stream(data), **options)
    seen = [*data, *data[:9]]  # 14 rows in five batches of three, and three batches more
    assert packed.state.num_input_tokens_seen == sum(len(row["input_ids"]) for row in seen)
    assert_evaluation_equals_padded(tmp_path, Tagger, Stream(data), max_steps=1)


def test_a_stream_of_datasets_reports_what_the_padded_rows_do(tmp_path):
    import datasets

    data = rows()
    columns = {key: [row[key].tolist() for row in data] for key in data[0]}
    stream = datasets.Dataset.from_dict(columns).to_iterable_dataset()
    collate = hf_packfix.DataCollatorForPackedSequence()
    found = report(tmp_path, Tagger, collate, stream, max_steps=1)
    with stock():
        expected = report(tmp_path, Tagger, padded_batch, Stream(data), max_steps=1)
    assert_same_report(found, expected)
