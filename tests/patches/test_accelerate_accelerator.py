"""``gather_for_metrics``: whole sequences of the last batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pack_sequence


@pytest.mark.needs_patch("accelerate.accelerator:Accelerator.gather_for_metrics")
def test_gather_for_metrics_cuts_the_last_batch_by_sequence():
    packed = pack_sequence([torch.arange(4), torch.arange(1) + 10, torch.arange(2) + 20], enforce_sorted=False)
    accelerator = SimpleNamespace(
        gather=lambda data: data, gradient_state=SimpleNamespace(end_of_dataloader=True, remainder=2)
    )
    found = Accelerator.gather_for_metrics(accelerator, packed)
    assert found.tolist() == [[0, 1, 2, 3], [10, -100, -100, -100]]
