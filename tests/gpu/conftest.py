"""What every test on a GPU needs: a GPU, one of them unless it asks for more, and float32 as it is written."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.device import DEVICE


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip without a GPU; hide all GPUs but one, and turn off TF32, in which cuDNN rounds to three digits."""
    if DEVICE is None:
        pytest.skip("needs a GPU: torch.cuda.is_available() is False")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if "several_gpus" not in request.fixturenames:
        # Or the Trainer takes nn.DataParallel, also for the padded run.
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.fixture
def several_gpus() -> int:
    """Return the number of GPUs, or skip the test with fewer than two."""
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"needs two GPUs, found {count}")
    return count
