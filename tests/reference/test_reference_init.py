"""Initial weights have the released distributions."""

import math

import pytest
import torch

from avmae_fast.config import ModelConfig
from avmae_fast.reference import ReferenceMAE


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = ModelConfig.of_size("Ti", positions="learned", modality_tokens=True)
    return ReferenceMAE(config).state_dict()


def _assert_uniform(matrix: torch.Tensor) -> None:
    """Xavier-uniform: the bound is reached, the deviation is bound / sqrt(3)."""
    bound = math.sqrt(6 / sum(matrix.shape))
    assert matrix.abs().max() <= bound
    assert matrix.abs().max() >= 0.999 * bound
    _assert_std(matrix, bound / math.sqrt(3))


def _assert_std(x: torch.Tensor, std: float) -> None:
    # The standard error of a deviation is at most std / sqrt(2 n); five of them.
    assert abs(x.std() - std) <= 5 * std / math.sqrt(2 * x.numel())
    assert abs(x.mean()) <= 5 * std / math.sqrt(x.numel())


def test_matrices_are_xavier_uniform(weights: dict[str, torch.Tensor]) -> None:
    block = "encoder.video.blocks.0"
    for matrix in weights[f"{block}.attn.qkv.weight"].chunk(3):
        _assert_uniform(matrix)
    for name in ("attn.proj", "mlp.fc1", "mlp.fc2"):
        _assert_uniform(weights[f"{block}.{name}.weight"])
        _assert_uniform(weights[f"decoder.both.blocks.3.{name}.weight"])
    _assert_uniform(weights["decoder_embed.audio.weight"])


@pytest.mark.parametrize(("m", "fan_in"), [("video", 1536), ("audio", 256)])
def test_patch_embeddings_are_lecun_normal(
    weights: dict[str, torch.Tensor], m: str, fan_in: int
) -> None:
    kernel = weights[f"patch_embed.{m}.weight"]
    std = 1 / math.sqrt(fan_in)
    _assert_std(kernel, std)
    # A normal cut at two standard deviations and scaled back to unit variance ends at 2.274.
    assert kernel.abs().max() <= 2.274 * std
    assert kernel.abs().max() >= 2.2 * std


def test_biases(weights: dict[str, torch.Tensor]) -> None:
    block = "encoder.both.blocks.1"
    for name in ("mlp.fc1", "mlp.fc2"):
        _assert_std(weights[f"{block}.{name}.bias"], 1e-6)
    for name in ("attn.qkv", "attn.proj", "norm1", "norm2"):
        assert not weights[f"{block}.{name}.bias"].any()
    for name in ("patch_embed.video", "decoder_embed.video", "head.audio", "encoder.both.norm"):
        assert not weights[f"{name}.bias"].any()


def test_norms_heads_tokens_and_positions(weights: dict[str, torch.Tensor]) -> None:
    for name in ("encoder.video.blocks.0.norm1", "encoder.audio.norm", "decoder.both.norm"):
        assert (weights[f"{name}.weight"] == 1).all()
    for m in ("video", "audio"):
        for name in ("mask_token", "modality_token", "decoder_modality_token"):
            assert not weights[f"{name}.{m}"].any()
        assert not weights[f"head.{m}.weight"].any()
        _assert_std(weights[f"pos_embed.{m}"], 0.02)
