"""Train Trainers of other packages, as they are, on packed batches, and compare with padded ones.

    python -m tests.tools.third_parties

Installs the packages once into a folder, as ``tests/tools/matrix.py`` does, and the wheel of this project beside them.
What is trained stands in ``tests/support/third_party_trainers.py`` and ``third_party_runs.py``, which do not turn
hf_packfix on: the variable ``HF_PACKFIX`` does. The latter trains beside import hooks, of packages that each have a
folder of their own, so that no program has a hook that it does not ask for; with DeepSpeed and with Ray Train, in two
processes on the CPU. Exits with 1 if something is not as expected.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from tests.support.installed import Environment
from tests.tools import matrix
from tests.tools.tomorrow import equal

ROOT = matrix.ROOT
RUNS = str(ROOT / "tests/support/third_party_runs.py")

NEWEST = matrix.TESTED[-1]
PACKAGES = {"trl": "1.16.0", "sentence-transformers": "6.2.0"}
NEEDS = [f"transformers=={NEWEST['transformers']}", "wrapt", "importlib-metadata", "packaging"]
NEEDS += ["datasets", "psutil", "scikit-learn", "scipy"]
#: They ask for torch, and would bring one of their own.
ALONE = [f"accelerate=={NEWEST['accelerate']}", *(f"{name}=={version}" for name, version in PACKAGES.items())]

STOCK = "AssertionError: Expected data to be a list or tuple of length 2"
#: What becomes of packed batches, by the name of the program: None where they train as padded ones do, otherwise the
#: error that the limits in hf_packfix/docs tell of.
PACKED = {
    "sft": None,
    "sft_all_packed": "TypeError: tuple indices must be integers or slices, not tuple",
    "reward": None,
    "sentences": None,
}
#: What has no packed batches: they must come out the same to the last digit.
ORDINARY = ["dpo"]

#: Packages with import hooks, by the name that is imported, and what pip installs: of mlflow the small package, which
#: has all of its hooks.
HOOKS = {"mlflow": "mlflow-skinny", "typeguard": "typeguard", "jaxtyping": "jaxtyping", "comet_ml": "comet_ml"}
#: When each hook is put in: "first", and the variable turns hf_packfix on, or "last", in front of hf_packfix's hooks.
HOOKED = [
    ("mlflow", "first"),
    ("comet_ml", "first"),
    ("typeguard", "last"),
    ("jaxtyping", "last"),
    ("comet_ml", "last"),
]

#: DeepSpeed, which asks for torch, and what else it asks for.
DEEPSPEED = "0.19.8"
DEEPSPEED_NEEDS = ["einops", "hjson", "msgpack", "ninja", "py-cpuinfo", "pydantic"]
#: How far packed and padded numbers may differ: by rounding; in bf16, in which a loss near 1.4 has steps of 0.008.
TOLERANCES = {"processes": 1e-5, "fp32": 1e-5, "bf16": 2e-2}
#: Ray Train, which starts processes of its own.
RAY = "2.60.0"

#: What the doctor must find in each package: a Trainer, and its methods that are patched and call ``super()`` or not.
TRAINERS = {
    "trl": {"trl.trainer.sft_trainer.SFTTrainer": {"compute_loss": True, "prediction_step": False}},
    "sentence_transformers": {
        "sentence_transformers.base.trainer.BaseTrainer": {"compute_loss": False, "evaluation_loop": True},
        "sentence_transformers.sentence_transformer.trainer.SentenceTransformerTrainer": {},
    },
}


def environment(directory: Path) -> Environment:
    """Return a new virtual environment with this project's wheel, torch and the packages."""
    base = matrix.interpreter()
    target = matrix.fill("third-parties", NEEDS, ALONE)
    (torch,) = base.parents[1].glob("[Ll]ib/**/site-packages")
    fresh = Environment(directory / "venv").unpack()
    fresh.write("zz_shared.pth", f"{target}\n{torch}\n")
    return fresh


def outcomes(fresh: Environment, variable: str, layout: str, names: list[str]) -> dict[str, Any]:
    """Return what the programs logged, or raised, by name."""
    program = str(ROOT / "tests/support/third_party_trainers.py")
    done = fresh.run(
        program, layout, *names, variable=variable, env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, timeout=600
    )
    if done.returncode:
        raise SystemExit(f"{program} {layout}, HF_PACKFIX={variable}:\n{done.stdout}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def agree(found: Any, expected: Any, tolerance: float) -> bool:
    """Return whether a program that ran logged what is expected: the same entries, with numbers up to a tolerance."""
    return isinstance(found, list) and equal(found, expected, tolerance)


def check_doctor(fresh: Environment) -> list[tuple[str, str, bool]]:
    """Ask the doctor for the Trainers of each package."""
    imports = [word for module in TRAINERS for word in ("--import", module)]
    done = fresh.run("-m", "hf_packfix", "doctor", "--json", *imports, env={"HF_HUB_OFFLINE": "1"}, variable="1")
    report = json.loads(done.stdout) if done.stdout else {"problems": [done.stderr], "trainers": {}}
    text = f"{len(report['trainers'])} Trainers; problems: {report['problems'] or 'none'}"
    rows = [("doctor", text, not done.returncode)]
    for module, expected in TRAINERS.items():
        found = {name: report["trainers"].get(name) for name in expected}
        rows.append((f"doctor --import {module}", json.dumps(found), found == expected))
    return rows


def check_training(fresh: Environment) -> list[tuple[str, str, bool]]:
    """Train on packed and on padded batches, with the plugin and without."""
    every = [*PACKED, *ORDINARY]
    runs = [("1", "packed", [*PACKED]), ("0", "packed", [*PACKED]), ("1", "padded", every), ("0", "padded", every)]
    with ThreadPoolExecutor(2) as pool:
        packed, stock, padded_on, padded = pool.map(lambda run: outcomes(fresh, *run), runs)
    rows = []
    for name, error in PACKED.items():
        text = packed[name] if isinstance(packed[name], str) else f"train loss {packed[name][-2]['train_loss']:.6f}"
        good = packed[name] == error if error else agree(packed[name], padded[name], 1e-5)
        rows.append((f"{name}, packed", text, good))
        rows.append((f"{name}, packed, off", str(stock[name]), stock[name] == STOCK))
    for name, expected in padded.items():
        text = expected if isinstance(expected, str) else f"train loss {expected[-2]['train_loss']:.6f}"
        rows.append((f"{name}, padded, on as off", text, agree(padded_on[name], expected, 0.0)))
    return rows


def outcome(fresh: Environment, folder: str, *command: str, file: Path, layout: str, more: Sequence[str] = ()) -> Any:
    """Return what a run of ``third_party_runs.py`` wrote to the file, or the last line of its errors."""
    env = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": folder}
    variable = "1" if layout == "packed" else "0"
    done = fresh.run(*command, str(file), layout, *more, variable=variable, env=env)
    return done.stderr.strip().splitlines()[-1] if done.returncode else json.loads(file.read_text(encoding="utf-8"))


def check_hooks(fresh: Environment, directory: Path) -> list[tuple[str, str, bool]]:
    """Train on packed batches beside each import hook, and on padded ones with no hook and hf_packfix off."""
    folders = {name: str(matrix.fill(f"hook-{name}", [needs], [])) for name, needs in HOOKS.items()}

    def run(name: str, order: str) -> Any:
        layout, more = ("packed", [order, name]) if name else ("padded", [order])
        file = directory / f"{name} {order}.json"
        return outcome(fresh, folders.get(name, ""), RUNS, "hooks", file=file, layout=layout, more=more)

    with ThreadPoolExecutor(2) as pool:
        padded, *found = pool.map(run, *zip(("", "first"), *HOOKED, strict=True))
    rows = []
    for (name, order), each in zip(HOOKED, found, strict=True):
        (version,) = {item.version for item in distributions(path=[folders[name]]) if item.name == HOOKS[name]}
        if isinstance(each, str):
            rows.append((f"{name} {version}, its hook {order}", each, False))
            continue
        logged, finders, states = each["logged"], each["finders"], list(each["patches"].values())
        in_front = name in finders and ("wrapt" not in finders or finders.index(name) < finders.index("wrapt"))
        good = in_front and "applied" in states and not {"pending", "refused"} & {*states}
        text = f"eval loss {logged[-1]['eval_loss']:.6f}"
        text += f"; {states.count('applied')} patches applied, {states.count('pending')} pending"
        rows.append((f"{name} {version}, its hook {order}", text, good and agree(logged, padded["logged"], 1e-5)))
    return rows


def check_processes(fresh: Environment, directory: Path) -> list[tuple[str, str, bool]]:
    """Train with DeepSpeed and with Ray Train on packed batches, and on padded ones with hf_packfix off."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    deepspeed = matrix.fill("deepspeed", DEEPSPEED_NEEDS, [f"deepspeed=={DEEPSPEED}"])
    ray = matrix.fill("ray", [f"ray[train]=={RAY}"], [])
    rows = []
    for package, folder, command in (
        (f"DeepSpeed {DEEPSPEED}", deepspeed, [*launch, RUNS, "deepspeed"]),
        (f"Ray Train {RAY}", ray, [RUNS, "ray"]),
    ):
        packed, padded = (
            outcome(fresh, str(folder), *command, file=directory / f"{package} {layout}.json", layout=layout)
            for layout in ("packed", "padded")
        )
        if isinstance(packed, str) or isinstance(padded, str):
            rows.append((package, f"packed: {packed}; padded: {padded}", False))
            continue
        for name, expected in padded.items():
            text = f"eval loss {packed[name][-1]['eval_loss']:.6f}, padded {expected[-1]['eval_loss']:.6f}"
            good = agree(packed[name], expected, TOLERANCES[name.split()[-1]])
            rows.append((f"{package}, {name}", text, good))
    return rows


def main() -> int:
    """Run, print the table, and return 1 where something is not as expected."""
    with tempfile.TemporaryDirectory(prefix="hf_packfix_third_parties_") as directory:
        fresh = environment(Path(directory))
        rows = [*check_doctor(fresh), *check_training(fresh), *check_hooks(fresh, Path(directory))]
        rows += check_processes(fresh, Path(directory))
    print(", ".join(f"{name} {version}" for name, version in {**NEWEST, **PACKAGES}.items()))
    for name, text, good in rows:
        print(f"{'as expected' if good else 'NOT SO':<13}{name:<38}{text}")
    return int(not all(good for _, _, good in rows))


if __name__ == "__main__":
    sys.exit(main())
