"""``gather_for_metrics``: whole sequences of the last batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed.utils
from torch.nn.utils.rnn import pack_sequence


def two_packed():
    first = [torch.arange(4), torch.arange(1) + 10, torch.arange(2) + 20]
    second = [torch.arange(3) + 30, torch.arange(5) + 40]
    return first, second, pack_sequence(first, enforce_sorted=False), pack_sequence(second, enforce_sorted=False)


@pytest.mark.needs_patch("accelerate.accelerator:Accelerator.gather_for_metrics")
def test_gather_for_metrics_cuts_the_last_batch_by_sequence():
    from accelerate import Accelerator

    packed = two_packed()[2]
    accelerator = SimpleNamespace(
        gather=lambda data: data, gradient_state=SimpleNamespace(end_of_dataloader=True, remainder=2)
    )
    found = Accelerator.gather_for_metrics(accelerator, packed)
    assert found.tolist() == [[0, 1, 2, 3], [10, -100, -100, -100]]
