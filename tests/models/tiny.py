"""Tiny models and batches shared by the model tests."""

import torch

from avmae_fast.config import AudioConfig, ModelConfig, StackConfig, VideoConfig
from avmae_fast.models import TokenMask
from avmae_kernels.masking import MaskSpec, sample_masks

VIDEO = VideoConfig(frames=4, height=16, width=8, tubelet=(2, 4, 4), mask_ratio=0.75)
AUDIO = AudioConfig(frames=26, mel_bins=16, patch=(4, 4), mask_ratio=0.5)


def tiny_config(**fields: object) -> ModelConfig:
    """Three encoder layers and two decoder layers of widths that are no powers of two."""
    base = {
        "encoder": StackConfig(width=24, layers=3, heads=3, mlp=40),
        "decoder": StackConfig(width=20, layers=2, heads=2, mlp=28),
        "video": VIDEO,
        "audio": AUDIO,
        "fusion_layers": 1,
    }
    return ModelConfig(**{**base, **fields})


def tiny_batch(config: ModelConfig, batch: int = 3, seed: int = 0) -> dict:
    """Random inputs (uint8 video, float64 audio) and keyed masks: arguments of the model."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict = {"masks": {}}
    if config.video is not None:
        v = config.video
        shape = (batch, v.frames, v.height, v.width, 3)
        inputs["video"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    if config.audio is not None:
        shape = (batch, config.audio.frames, config.audio.mel_bins)
        inputs["audio"] = torch.randn(shape, dtype=torch.float64, generator=generator)
    for m in config.modalities:
        spec = MaskSpec("random", config.input(m).grid, config.input(m).mask_ratio)
        keys = torch.arange(batch).numpy() + 100 * seed
        inputs["masks"][m] = TokenMask.from_numpy(sample_masks(spec, keys, seed=1, modality=m))
    return inputs


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter a random value, so that no zero initialisation hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.add_(0.2 * noise.to(parameter.dtype))
