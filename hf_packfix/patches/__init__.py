"""The patches: one file per upstream module, named after it, each with its reasons.

A patch file imports torch only when one of its patches is put on, so that ``status()`` can name every
patch in a process that has loaded neither torch nor transformers.
"""

from __future__ import annotations

from hf_packfix.patches import (
    accelerate_accelerator,
    accelerate_utils_operations,
    torch_distributed_utils,
    torch_nn_modules_rnn,
    transformers_feature_extraction_utils,
    transformers_tokenization_utils_base,
    transformers_trainer,
    transformers_trainer_evaluation,
    transformers_trainer_pt_utils,
    transformers_trainer_seq2seq,
    transformers_trainer_utils,
)
from hf_packfix.patches.patch import Patch, PatchStatus, State

__all__ = ["FAST_RNN", "PATCHES", "Patch", "PatchStatus", "State"]

#: Every patch that is on by default, in the order in which they are put on.
PATCHES: tuple[Patch, ...] = (
    *transformers_trainer.PATCHES,
    *transformers_trainer_evaluation.PATCHES,
    *transformers_trainer_pt_utils.PATCHES,
    *transformers_trainer_utils.PATCHES,
    *transformers_trainer_seq2seq.PATCHES,
    *transformers_feature_extraction_utils.PATCHES,
    *transformers_tokenization_utils_base.PATCHES,
    *accelerate_utils_operations.PATCHES,
    *accelerate_accelerator.PATCHES,
    *torch_distributed_utils.PATCHES,
)

#: The patches that ``enable(fast_rnn=True)`` and ``HF_PACKFIX_FAST_RNN=1`` ask for.
FAST_RNN: tuple[Patch, ...] = torch_nn_modules_rnn.PATCHES
