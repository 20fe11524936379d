"""From a batch on the host to the model's arguments on the device: log-mel, standardised, masks."""

from typing import Any

import torch

from avmae_fast.config import Config
from avmae_fast.data.loader import Batch
from avmae_fast.models import TokenMask
from avmae_fast.train.recipe import mask_specs
from avmae_kernels.logmel import log_mel
from avmae_kernels.masking import sample_masks


class InputStage:
    """Makes the arguments of `AudiovisualMAE` out of batches.

    Masks are drawn by (seed, position of the sample, modality): a sample is masked alike whatever
    the batch it is in.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        self.device = device
        self._specs = mask_specs(config)

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """video [B, T, H, W, 3] uint8, audio [B, frames, mel_bins] float32, masks by modality."""
        inputs: dict[str, Any] = {"masks": {}}
        seed = self.config.train.seed
        for m, spec in self._specs.items():
            masks = sample_masks(spec, batch.keys.numpy(), seed=seed, modality=m)
            inputs["masks"][m] = TokenMask.from_numpy(masks, self.device)
        if batch.video is not None:
            inputs["video"] = batch.video.to(self.device, non_blocking=True)
        audio = self.config.model.audio
        if batch.waveform is not None and audio is not None:
            waveform = batch.waveform.to(self.device, non_blocking=True)
            inputs["audio"] = (log_mel(waveform, audio.mel_bins) - audio.mean) / audio.std
        return inputs
