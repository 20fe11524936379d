"""Small models in every format, made from random models of ours."""

import torch
from torch import Tensor

from avmae_fast.config import AudioConfig, ModelConfig, StackConfig, VideoConfig
from avmae_fast.interop.vit import Shape
from avmae_fast.models import AudiovisualMAE, Encoder

ENCODER = StackConfig(width=24, layers=2, heads=3, mlp=36)
DECODER = StackConfig(width=20, layers=2, heads=2, mlp=28)
PICTURE = VideoConfig(frames=1, height=16, width=16, tubelet=(1, 8, 8), loss_weight=1.0)
CLIP = VideoConfig(frames=4, height=16, width=16, tubelet=(2, 8, 8), loss_weight=1.0)
SOUND = AudioConfig(frames=32, mel_bins=128, patch=(16, 16), loss_weight=1.0)
SHAPE = Shape(heads=3, decoder_heads=2)

_BASE = {
    "encoder": ENCODER,
    "decoder": DECODER,
    "fusion": "separate",
    "gelu": "erf",
    "target_norm": "patch_unbiased",
    "audio": None,
}
_MAE = {**_BASE, "positions": "learned", "decoder_positions": "learned", "prefix_tokens": 1}
_VIDEOMAE = {
    **_BASE,
    "video": CLIP,
    "projection_bias": False,
    "target_norm": "videomae",
}
# By format: the configuration, whether it comes with a decoder, and what tensors do not say.
FIELDS: dict[str, tuple[dict, bool, Shape]] = {
    "timm": ({**_MAE, "video": PICTURE}, False, SHAPE),
    "hf-vit": ({**_MAE, "video": PICTURE, "prefix_tokens": 2}, False, SHAPE),
    "mae": ({**_MAE, "video": PICTURE}, True, SHAPE),
    "hf-vitmae": ({**_MAE, "video": PICTURE}, True, SHAPE),
    "mae-st": ({**_MAE, "video": CLIP}, True, SHAPE),
    "audiomae": ({**_MAE, "video": None, "audio": SOUND}, True, SHAPE),
    "videomae": (_VIDEOMAE, True, Shape(heads=3, decoder_heads=2, frames=4, size=(16, 16))),
    "hf-videomae": (_VIDEOMAE, True, Shape(heads=3, decoder_heads=2, frames=4, size=(16, 16))),
    "cav-mae": (
        {
            **_MAE,
            "video": PICTURE,
            "audio": AudioConfig(frames=24, mel_bins=128, patch=(8, 8), loss_weight=1.0),
            "prefix_tokens": 0,
            "fusion": "mid",
            "fusion_layers": 1,
            "decoding": "joint",
            "modality_tokens": True,
            "middle_norm": False,
            "layer_norm_eps": 1e-5,
        },
        True,
        SHAPE,
    ),
}


def config_for(name: str) -> ModelConfig:
    """The configuration of the small model of a format."""
    return ModelConfig(**FIELDS[name][0])  # type: ignore[arg-type]


def state_for(name: str) -> dict[str, Tensor]:
    """Random weights of ours that the format can hold."""
    fields, decoder, _ = FIELDS[name]
    config = ModelConfig(**fields)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    names = (AudiovisualMAE if decoder else Encoder)(config).state_dict()
    state = {n: 0.3 * torch.randn(x.shape, generator=generator) for n, x in names.items()}
    if "videomae" in name:
        for n, x in state.items():
            if n.endswith("qkv.bias"):
                x[len(x) // 3 : 2 * len(x) // 3] = 0.0  # they have no key bias
    if name == "cav-mae":
        for part in ("decoder_embed.{}.weight", "decoder_embed.{}.bias", "mask_token.{}"):
            state[part.format("audio")] = state[part.format("video")].clone()
    if name == "mae-st":
        for owner, width in (("pos_embed", 24), ("decoder_pos_embed", 20)):
            space, time = (torch.randn(n, width, generator=generator) for n in (4, 2))
            state[f"{owner}.video"][1:] = (time[:, None] + space).flatten(0, 1)
    return state
