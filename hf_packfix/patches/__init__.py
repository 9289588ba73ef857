"""The patches: one file per upstream module, named after it.

To add one: a decorator of ``declare.py`` above a function that bears the name of what it replaces, and a test that
fails without it.
"""

# ruff: noqa: I001 (imported in the order in which `status()` lists their patches)

from __future__ import annotations

from hf_packfix.patches import (
    transformers_trainer,
    transformers_trainer_evaluation,
    transformers_trainer_pt_utils,
    transformers_trainer_utils,
    transformers_trainer_seq2seq,
    transformers_batch_types,
    transformers_models_auto_configuration_auto,
    accelerate_utils_operations,
    accelerate_accelerator,
    torch_distributed_utils,
    torch_nn_modules_rnn,
    first_use,
)
from hf_packfix.patches.declare import check_declarations, declared
from hf_packfix.patches.patch import Patch, PatchStatus, State, apply, revert

__all__ = ["FAST_RNN", "FIRST_USE", "PATCHES", "Patch", "PatchStatus", "State", "apply", "revert"]

check_declarations(
    (
        transformers_trainer,
        transformers_trainer_evaluation,
        transformers_trainer_pt_utils,
        transformers_trainer_utils,
        transformers_trainer_seq2seq,
        transformers_batch_types,
        transformers_models_auto_configuration_auto,
        accelerate_utils_operations,
        accelerate_accelerator,
        torch_distributed_utils,
        torch_nn_modules_rnn,
        first_use,
    )
)

#: Every patch that is on by default, in the order in which they are applied.
PATCHES: tuple[Patch, ...] = declared("default")

#: The patches that ``enable(fast_rnn=True)`` and ``HF_PACKFIX_FAST_RNN=1`` ask for.
FAST_RNN: tuple[Patch, ...] = declared("fast_rnn")

#: The patches that are on while another one is pending; see ``first_use.py``.
FIRST_USE: tuple[Patch, ...] = declared("first_use")
