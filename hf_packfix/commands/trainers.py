"""What ``hf-packfix doctor`` tries and looks up: a packed batch through a Trainer, and what Trainer subclasses do."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from hf_packfix._warnings import in_a_line
from hf_packfix.activation.control import status
from hf_packfix.engine.patch import Patch
from hf_packfix.engine.targets import names_in
from hf_packfix.patches import PATCHES

#: Whose methods are patched.
_TRAINERS = ("Trainer", "Seq2SeqTrainer")

#: Methods that are not patched, through which a batch goes.
_OF_BATCHES = ("_prepare_inputs", "training_step", "compute_loss", "get_batch_samples")


def try_trainer() -> str | None:
    """Train a step and evaluate a tagger on packed batches; return what went wrong, in a line, or None."""
    import torch
    from torch.nn.utils.rnn import PackedSequence, pack_sequence

    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = torch.nn.GRU(2, 3)

        def forward(self, input_ids: PackedSequence, labels: PackedSequence) -> dict[str, Any]:
            states = self.gru(input_ids)[0]
            return {"loss": torch.nn.functional.cross_entropy(states.data, labels.data), "logits": states}

    def collate(rows: list[dict[str, Any]]) -> dict[str, PackedSequence]:
        return {key: pack_sequence([row[key] for row in rows], enforce_sorted=False) for key in rows[0]}

    rows: Any = [{"input_ids": torch.ones(n, 2), "labels": torch.arange(n) % 3} for n in (1, 4, 2)]
    shapes: list[list[int]] = []
    try:
        from transformers import Trainer, TrainingArguments

        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as directory:
            arguments = TrainingArguments(
                directory,
                max_steps=1,
                per_device_eval_batch_size=2,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,  # with several GPUs and no launcher the Trainer uses DataParallel, which cannot work
            )

            def metrics(prediction: Any) -> dict[str, float]:
                shapes.append(list(prediction.label_ids.shape))
                return {}

            trainer = Trainer(Tagger(), arguments, collate, rows, rows, compute_metrics=metrics)
            trainer.train()
            trainer.evaluate()
    except Exception as error:
        return in_a_line(error)
    return None if shapes == [[3, 4]] else f"compute_metrics got labels of the shapes {shapes}, expected [[3, 4]]"


def load_lazy(module: ModuleType) -> Iterator[str]:
    """Load the Trainers that a module lists and loads when they are asked for, as trl does; yield what fails."""
    for name in dir(module):
        if name.endswith("Trainer") and name not in vars(module):
            try:
                getattr(module, name)
            except Exception as error:
                yield f"{module.__name__}.{name} cannot be loaded: {in_a_line(error)}"


def patched_methods() -> dict[str, Patch]:
    """Return the methods of the Trainers that are patched on this version, each with its patch."""
    idle = {p.target for p in status().patches if p.state in ("not-needed", "not-applicable")}
    patches = [p for p in PATCHES if p.path.split(".")[0] in _TRAINERS and p.target not in idle]
    return {p.path.split(".")[1]: p for p in reversed(patches)}


def overridden_methods(package: str) -> dict[str, dict[str, bool]]:
    """Return the Trainer subclasses of a module and its submodules, with the patched methods that each overrides.

    A method is True if it calls ``super()``.
    """
    patched = patched_methods()
    return {
        f"{cls.__module__}.{cls.__qualname__}": {
            name: _calls_super(cls, name) for name in sorted(patched.keys() & vars(cls).keys())
        }
        for cls in _subclasses(package)
    }


def handled_apart(package: str) -> Iterator[str]:
    """Yield what a module and its submodules do to tensors of a batch by themselves, and not to a PackedSequence.

    These are methods of Trainer subclasses that look for tensors, and copies of functions that are patched upstream.
    """
    for cls in _subclasses(package):
        for method in _OF_BATCHES:
            names = names_in(vars(cls).get(method))
            looks = sorted(names & {"is_tensor", "Tensor"})
            if looks and "PackedSequence" not in names:
                yield (
                    f"{cls.__module__}.{cls.__qualname__}.{method} looks for tensors itself ({', '.join(looks)}): "
                    f"what it does to them, such as a cast, it does not do to a PackedSequence, whose tensor is its "
                    f"`data`"
                )
    functions = {patch.path: patch.target for patch in PATCHES if "." not in patch.path}
    for name, module in sorted(sys.modules.items()):
        if _is_within(name, package):
            for path, target in functions.items():
                found = vars(module).get(path)
                if isinstance(found, FunctionType) and found.__module__ == name:
                    yield f"{name}.{path} is a copy of {target}, and is not patched: import it from there instead"


def _subclasses(package: str) -> list[type[Any]]:
    """Return the Trainer subclasses of a module and its submodules, by name."""
    from transformers import Trainer

    found: list[type[Any]] = []
    waiting: list[type[Any]] = [Trainer]
    while waiting:
        cls = waiting.pop()
        waiting.extend(cls.__subclasses__())
        # A class of another module counts where this one shows it, as scripts do that import theirs.
        shown = vars(sys.modules[package]).get(cls.__name__) is cls
        if (shown and not cls.__module__.startswith("transformers.")) or _is_within(cls.__module__, package):
            found.append(cls)
    return sorted(found, key=lambda cls: (cls.__module__, cls.__qualname__))


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _calls_super(cls: type[Any], method: str) -> bool:
    """Return whether a class's own method calls that of a parent: read from the names in its code."""
    names = names_in(vars(cls)[method])
    # The name of the method alone could be a call of itself, which the original makes for what is nested.
    return method in names and not names.isdisjoint({"super", *(base.__name__ for base in cls.__mro__[1:])})
