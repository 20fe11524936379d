"""Everything in this folder needs a CUDA device: `pytest -m gpu`.

Without a device the tests are skipped, or fail where AVMAE_REQUIRE_GPU=1 says there must be one.
"""

import os
from pathlib import Path

import pytest
import torch
from poison import poisoned_memory

__all__ = ["poisoned_memory"]

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device, a fixed seed, and float32 products in float32 whatever ran before."""
    if not torch.cuda.is_available():
        reason = "no CUDA device, or a PyTorch built without CUDA"
        if os.environ.get("AVMAE_REQUIRE_GPU") == "1":
            pytest.fail(f"AVMAE_REQUIRE_GPU=1, but there is {reason}")
        pytest.skip(reason)
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
