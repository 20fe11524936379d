"""The start-up check passes on this GPU for the widths of every named size."""

import pytest
import torch

from avmae_fast.config import ENCODER_SIZES, ModelConfig
from avmae_fast.train.recipe import check_kernels
from avmae_kernels import _library, attention_backends


@pytest.mark.parametrize("size", ENCODER_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_size_passes(size: str, dtype: torch.dtype) -> None:
    enabled = dtype != torch.float32
    autocast = lambda: torch.autocast("cuda", torch.bfloat16, enabled=enabled)  # noqa: E731
    check_kernels(ModelConfig.of_size(size), torch.device("cuda"), autocast)
    assert not _library._REJECTED and not attention_backends._REJECTED
