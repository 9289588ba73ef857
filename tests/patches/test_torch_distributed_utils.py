"""The casts of FSDP's mixed precision."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.utils

from tests.support.packed_sequences import some_packed

pytestmark = pytest.mark.skipif(
    not hasattr(torch.distributed.utils, "_apply_to_tensors"), reason="torch 2.0 has no such function"
)


@pytest.mark.needs_patch("torch.distributed.utils:_apply_to_tensors")
def test_mixed_precision_of_fsdp_casts_the_data():
    from torch.distributed.utils import _apply_to_tensors

    features = some_packed()
    cast, again = _apply_to_tensors(lambda data: data.half(), [features, {"x": features.data}])
    assert torch.equal(cast.data, again["x"])
    assert cast.data.dtype == torch.float16


def test_a_function_that_returns_nothing_leaves_the_packed_sequence():
    # FSDP also applies functions for what they do to a tensor, such as registering a hook.
    seen, packed = [], some_packed()
    (same,) = torch.distributed.utils._apply_to_tensors(lambda tensor: seen.append(tensor), [packed])
    assert same is packed
    assert seen[0] is packed.data
    assert len(seen) == 1
