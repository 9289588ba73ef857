"""The wrapper of ``Trainer._prepare_input``: moves PackedSequences, and rebuilds what holds them.

These are other named tuples, and dataclasses, which upstream leaves on the CPU (transformers #29068).
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from hf_packfix.packing.packed import PackedSequence, with_data
from hf_packfix.packing.trees import LEAVES, contains, is_namedtuple, rebuild
from hf_packfix.patches.countable import CountablePackedSequence
from hf_packfix.patches.patch import Function, Patch

# The types that most batches consist of. None is a named tuple, and a lookup of the type is faster than `isinstance`.
_ORDINARY = LEAVES | {dict, list, tuple}

# Raised here, before the first forward: `DataParallel.scatter` would split the fields of a PackedSequence one by one
# and fail on `batch_sizes` with a message that names neither the cause nor a way out (pytorch #31422).
_DATA_PARALLEL = (
    "nn.DataParallel, which the Trainer uses for {0} GPUs without a launcher, cannot split a PackedSequence. Start a "
    "process for each GPU, with `torchrun --nproc-per-node {0} SCRIPT` or `accelerate launch --num_processes {0} "
    "SCRIPT`, or let the Trainer see one GPU alone (CUDA_VISIBLE_DEVICES=0)."
)


def wrap(original: Function, patch: Patch) -> Function:
    """Return a ``_prepare_input`` that handles named tuples, and dataclasses that hold a PackedSequence.

    Hand-made, since it is called for every leaf of every batch: every instruction shows, and so does every variable
    that it closes over, which Python copies at each call. Of ordinary values only the type is looked at.

    Args:
        original: ``_prepare_input``, which calls itself through the Trainer for what is nested.
        patch: the patch that the wrapper belongs to.
    """
    # True if upstream's own function is wrapped directly; for a tensor it only calls `.to(device)`, and casts for
    # DeepSpeed.
    upstream = getattr(original, "__globals__", None) is vars(sys.modules[patch.module])

    def _prepare_input(self: Any, data: Any) -> Any:
        return original(self, data) if type(data) in _ORDINARY else prepare_other(self, data)

    def prepare_other(trainer: Any, data: Any) -> Any:
        if patch.active:
            if isinstance(data, PackedSequence):
                return prepare_packed(trainer, data)
            if isinstance(data, tuple):
                if is_namedtuple(data):
                    return rebuild(data, [trainer._prepare_input(item) for item in data])
            elif hasattr(data, "__dataclass_fields__"):
                return prepare_dataclass(trainer, data)
        return original(trainer, data)

    def prepare_dataclass(trainer: Any, data: Any) -> Any:
        # A `ModelOutput` is a mapping, which the original rebuilds. Others it returns as they are.
        held = {} if isinstance(data, Mapping) else _fields_of(data)
        if not contains(held):
            return original(trainer, data)
        moved = copy.copy(data)
        for name, value in held.items():
            # Past the `__setattr__` of a frozen one.
            object.__setattr__(moved, name, trainer._prepare_input(value))
        return moved

    def prepare_packed(trainer: Any, data: PackedSequence) -> PackedSequence:
        packed = data.plain() if isinstance(data, CountablePackedSequence) else data
        arguments, prepare = trainer.args, trainer._prepare_input
        # The property `n_gpu` returns this, but takes longer than the rest for a tensor that need not move.
        if getattr(arguments, "_n_gpu", 1) > 1:
            raise ValueError(_DATA_PARALLEL.format(arguments.n_gpu))
        direct = upstream and getattr(prepare, "__func__", None) is _prepare_input
        if not direct or trainer.is_deepspeed_enabled:
            return with_data(packed, prepare(packed.data))
        tensor, device = packed.data, arguments.device
        return with_data(packed, tensor if tensor.device == device else tensor.to(device))

    return _prepare_input


def _fields_of(data: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that have a value."""
    if isinstance(data, type):  # the class itself
        return {}
    return {field.name: getattr(data, field.name) for field in dataclasses.fields(data) if hasattr(data, field.name)}
