"""What a model makes of a clip, as pictures: original, masked, reconstruction, raw output.

Shape letters: B clips, N tokens of a modality, S scored tokens, P values in a patch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avmae_fast.config import Modality, ModelConfig
from avmae_fast.models import AudiovisualMAE, TokenMask
from avmae_fast.models.encoder import patch_of
from avmae_fast.models.patches import patchify, unpatchify
from avmae_kernels.patches import normalise_pixels
from avmae_kernels.reconstruction_loss import target_statistics
from avmae_kernels.yuv import i420_to_rgb

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """One clip in one modality: video [T, H, W, 3] in [0, 1], or log-mel [frames, bins] as stored.

    masked: the original, NaN where the encoder did not look.
    reconstruction: the model's output where it did not look, the original elsewhere.
    raw: the model's output everywhere; at visible patches nothing has trained it.
    """

    original: Array
    masked: Array
    reconstruction: Array
    raw: Array


@torch.no_grad()
def draw(
    model: AudiovisualMAE, inputs: Mapping[str, Any], clips: int
) -> list[dict[Modality, Picture]]:
    """The pictures of the first clips of a batch, each clip's by modality.

    Args:
        inputs: arguments of the model: video, audio, masks.
        clips: how many are wanted; fewer come where the batch has fewer.
    """
    inputs = _first(inputs, clips)
    # Pretraining predicts masked tokens only. The same weights, asked for all of them:
    config = replace(model.config, loss_on="all")
    full = AudiovisualMAE(config).to(next(model.parameters()).device)
    full.load_state_dict(model.state_dict())
    out = full(**inputs)
    by_modality = {
        m: _pictures(
            config, m, inputs[m], inputs["masks"][m], out.predictions[m].float(), out.scored[m]
        )
        for m in config.modalities
    }
    columns = zip(*by_modality.values(), strict=True)
    return [dict(zip(by_modality, pictures, strict=True)) for pictures in columns]


def _first(inputs: Mapping[str, Any], clips: int) -> dict[str, Any]:
    masks = {
        m: TokenMask(mask.visible[:clips], mask.masked[:clips])
        for m, mask in inputs["masks"].items()
    }
    tensors = {name: x[:clips] for name, x in inputs.items() if name != "masks"}
    return {**tensors, "masks": masks}


def _pictures(
    config: ModelConfig,
    m: Modality,
    source: Tensor,
    mask: TokenMask,
    predictions_BSP: Tensor,
    scored_BS: Tensor,
) -> list[Picture]:
    patch, grid = patch_of(config, m), config.input(m).grid
    if source.ndim == 4:
        source = i420_to_rgb(source)
    original_BNP = patchify(normalise_pixels(source, torch.float32), patch)
    clip = torch.arange(len(source), device=source.device)[:, None]
    raw = original_BNP.clone()
    raw[clip, scored_BS] = predictions_BSP
    raw = _unnormalised(config, m, raw, original_BNP)
    masked = original_BNP.clone()
    masked[clip, mask.masked] = torch.nan
    mixed = torch.where(masked.isnan(), raw, original_BNP)
    as_pixels = [
        _for_display(config, m, unpatchify(patches, grid, patch))
        for patches in (original_BNP, masked, mixed, raw)
    ]
    return [Picture(*parts) for parts in zip(*as_pixels, strict=True)]


def _unnormalised(config: ModelConfig, m: Modality, raw: Tensor, original: Tensor) -> Tensor:
    """Outputs of a model trained on normalised patches, with the true mean and spread put back."""
    mean, spread = target_statistics(original, config.target_norm, has_channels=m == "video")
    return raw * spread + mean


def _for_display(config: ModelConfig, m: Modality, pixels: Tensor) -> Array:
    if m == "video":
        return ((pixels + 1) / 2).clamp(0, 1).cpu().numpy()
    audio = config.audio
    assert audio is not None
    return (pixels * audio.std + audio.mean).cpu().numpy()
