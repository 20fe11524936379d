"""Names and layouts of the authors' pretraining tree; the golden arrays prove the numbers."""

import itertools

import numpy as np
import pytest
import torch

from avmae_fast.config import AudioConfig, ModelConfig, StackConfig, VideoConfig
from avmae_fast.interop.scenic import from_scenic, to_scenic
from avmae_fast.reference import ReferenceMAE


def _config(**fields: object) -> ModelConfig:
    base = {
        "encoder": StackConfig(width=12, layers=3, heads=3, mlp=20),
        "decoder": StackConfig(width=8, layers=2, heads=2, mlp=12),
        "video": VideoConfig(frames=4, height=6, width=4, tubelet=(2, 3, 2)),
        "audio": AudioConfig(frames=9, mel_bins=6, patch=(4, 3)),
        "fusion_layers": 1,
    }
    return ModelConfig(**{**base, **fields})  # type: ignore[arg-type]


def _random_state(config: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = ReferenceMAE(config).state_dict()
    return {name: torch.randn(x.shape, generator=generator) for name, x in state.items()}


FUSIONS = ("early", "mid", "separate", "shared")
VARIANTS = [
    {"fusion": fusion, "decoding": decoding}
    for fusion, decoding in itertools.product(FUSIONS, ("joint", "shared", "separate"))
] + [
    {"encoder_norm": False, "projection_bias": False},
    {"modality_tokens": True, "positions": "learned"},
    {"video": None, "fusion": "mid"},
    {"audio": None, "fusion": "early"},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_there_and_back(fields: dict) -> None:
    config = _config(**fields)
    state = _random_state(config)
    leaves = to_scenic(state, config)
    back = from_scenic(leaves, config)
    assert back.keys() == state.keys()
    for name, x in state.items():
        assert torch.equal(back[name], x), name
    assert sum(leaf.size for leaf in leaves.values()) == sum(x.numel() for x in state.values())


def test_names_and_shapes_of_the_released_configuration() -> None:
    """Some leaves of a mid-fusion model with a shared decoder, as the authors name them."""
    config = _config()
    leaves = to_scenic(_random_state(config), config)
    attention = "encoderblock_0/MultiHeadDotProductAttention_0"
    expected = {
        "embedding_rgb/kernel": (2, 3, 2, 3, 12),
        "embedding_spectrogram/kernel": (4, 3, 1, 12),
        "Transformer_rgb/encoderblock_1/LayerNorm_1/scale": (12,),
        "Transformer_spectrogram/encoder_norm/bias": (12,),
        f"Transformer_concat/{attention}/query/kernel": (12, 3, 4),
        f"Transformer_concat/{attention}/key/bias": (3, 4),
        f"Decoder/{attention}/out/kernel": (2, 4, 8),
        "Decoder/encoderblock_1/MlpBlock_0/Dense_0/kernel": (8, 12),
        "decoder_projection_rgb/kernel": (12, 8),
        "mask_token_spectrogram": (1, 1, 8),
        "output_projection_rgb/kernel": (8, 36),
    }
    assert {name: leaves[name].shape for name in expected} == expected
    assert "Transformer_rgb/encoderblock_2/LayerNorm_0/scale" not in leaves


def test_layouts_by_hand() -> None:
    config = _config()
    state = _random_state(config)
    leaves = to_scenic(state, config)
    block = "Transformer_rgb/encoderblock_0"
    value = leaves[f"{block}/MultiHeadDotProductAttention_0/value/kernel"]
    weight = state["encoder.video.blocks.0.attn.qkv.weight"]
    # Rows of v come after those of q and k; head 1 of width 4 starts at its row 4.
    assert value[5, 1, 2] == weight[24 + 4 + 2, 5]
    patch = leaves["embedding_rgb/kernel"]
    values = np.arange(36).reshape(2, 3, 2, 3)
    assert patch[1, 2, 0, 1, 7] == state["patch_embed.video.weight"][7, values[1, 2, 0, 1]]


def test_errors_name_the_leaves() -> None:
    config = _config()
    leaves = to_scenic(_random_state(config), config)
    missing = {name: x for name, x in leaves.items() if name != "Decoder/encoder_norm/bias"}
    with pytest.raises(ValueError, match=r"missing \['Decoder/encoder_norm/bias'\]"):
        from_scenic(missing, config)
    with pytest.raises(ValueError, match=r"unknown \['bottleneck'\]"):
        from_scenic({**leaves, "bottleneck": np.zeros((1, 4, 12))}, config)
    with pytest.raises(ValueError, match=r"mask_token_rgb has shape \(8,\), want \(1, 1, 8\)"):
        from_scenic({**leaves, "mask_token_rgb": np.zeros(8)}, config)
    state = _random_state(config)
    del state["head.audio.bias"]
    with pytest.raises(ValueError, match=r"parameters do not fit.*missing \['head.audio.bias'\]"):
        to_scenic(state, config)
