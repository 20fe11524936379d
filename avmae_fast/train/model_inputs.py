"""Views of clips as the tensors that classifiers and encoders take."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from avmae_fast.config import AudioConfig, Modality
from avmae_fast.data.views import ClipViews
from avmae_kernels.logmel import log_mel

_SHOWN = 5


class NotFiniteOutput(ArithmeticError):
    """A model gave something that is not a finite number; the text says for which clips."""

    @classmethod
    def of(cls, records: Sequence[int], what: str) -> "NotFiniteOutput":
        rows = ", ".join(str(record + 1) for record in records[:_SHOWN])
        more = ", ..." if len(records) > _SHOWN else ""
        return cls(
            f"the model's {what} are not finite for {len(records)} clips of a batch (rows {rows}"
            f"{more} of the manifest): nothing is written. Its weights may be damaged, or its "
            "numbers too large for bf16: try --precision fp32"
        )


def tensors_of(
    clips: Sequence[ClipViews], audio: AudioConfig | None, device: torch.device
) -> dict[Modality, Tensor]:
    """Views of clips that all have the same tracks, side by side: video uint8 [n * V, T, H, W, 3],
    audio standardised log-mel [n * V, frames, mel_bins]."""
    inputs: dict[Modality, Tensor] = {}
    pictures = [clip.video for clip in clips if clip.video is not None]
    sounds = [clip.waveform for clip in clips if clip.waveform is not None]
    if pictures:
        inputs["video"] = torch.from_numpy(np.concatenate(pictures)).to(device)
    if sounds and audio is not None:
        waveform = torch.from_numpy(np.concatenate(sounds)).to(device)
        inputs["audio"] = (log_mel(waveform, audio.mel_bins) - audio.mean) / audio.std
    return inputs
