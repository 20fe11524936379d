"""How fine-tuning changes its clips: stretched and recoloured pictures, masked spectrograms.

Every number is keyed by (seed, position of the sample), so a clip is changed alike whatever batch,
process or device it is on; what is random is decided on the host, what is computed on the device.

Shape letters: B clips, T frames, H height, W width, F spectrogram frames, M mel bins.
Source: the authors' fine-tuning configurations and the augmentations of DMVR and Lingvo they name.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from avmae_fast.config import VideoConfig
from avmae_fast.finetune_config import RecipeConfig
from avmae_kernels.masking import keyed_uniform

# Streams of keyed randomness; 0 to 3 are those of masks, windows and substitutes.
_PICTURE_STREAM, _SOUND_STREAM = 4, 5

_PICTURE_DRAWS = 10
_BRIGHTNESS = 32 / 255
_FACTORS = (0.6, 1.4)  # of saturation and of contrast
_HUE = 0.2  # turns, either way
_LUMA = (0.2989, 0.5870, 0.1140)


def augment_pictures(
    video: Tensor, keys: NDArray[np.int64], seed: int, recipe: RecipeConfig, size: VideoConfig
) -> Tensor:
    """The clips as the network gets them, uint8 [B, T, size.height, size.width, 3].

    Each clip is stretched (`scale_jitter`), its colours are changed with probability `colour` and
    taken away with probability `greyscale`: the same for all of its frames.

    Args:
        video: uint8 [B, T, H, W, 3], of `FinetuneConfig.training_input`.
        keys: [B] position of each sample.
    """
    given = (size.height, size.width)
    if video.shape[2:4] == given and not (recipe.colour or recipe.greyscale):
        return video
    draws = keyed_uniform(seed, keys, _PICTURE_STREAM, _PICTURE_DRAWS)
    out = video.new_empty(*video.shape[:2], *given, 3)
    # Clip by clip: as floats a batch would take four times its memory, several times over.
    for clip, target, u in zip(video, out, draws.tolist(), strict=True):
        x = clip.permute(0, 3, 1, 2).float() / 255
        if x.shape[2:] != given:
            x = _stretched(x, given, recipe.scale_jitter, u[:4])
        if u[4] < recipe.colour:
            x = _recoloured(x, u[5:9])
        if u[9] < recipe.greyscale:
            x = _grey(x).expand_as(x)
        target.copy_((x * 255).round().clamp(0, 255).permute(0, 2, 3, 1))
    return out


def _stretched(
    x: Tensor, size: tuple[int, int], jitter: tuple[float, float], u: list[float]
) -> Tensor:
    """A region of [T, 3, H, W], height and width each `size` over its own factor, resized."""
    low, high = jitter
    corners = []
    for side, wanted, u_factor, u_place in zip(x.shape[2:], size, u[:2], u[2:], strict=True):
        extent = min(side, max(1, round(wanted / (low + (high - low) * u_factor))))
        corners.append((int(u_place * (side - extent + 1)), extent))
    (top, tall), (left, wide) = corners
    region = x[:, :, top : top + tall, left : left + wide]
    return F.interpolate(region, size, mode="bilinear", align_corners=False)


def _recoloured(x: Tensor, u: list[float]) -> Tensor:
    """Brightness, saturation, contrast and hue changed, in this order; [T, 3, H, W] in [0, 1]."""
    low, high = _FACTORS
    x = x + _BRIGHTNESS * (2 * u[0] - 1)
    hue, saturation, value = rgb_to_hsv(x)
    x = hsv_to_rgb(hue, (saturation * (low + (high - low) * u[1])).clamp(0, 1), value)
    mean = x.mean((2, 3), keepdim=True)
    x = mean + (x - mean) * (low + (high - low) * u[2])
    hue, saturation, value = rgb_to_hsv(x)
    return hsv_to_rgb(hue + _HUE * (2 * u[3] - 1), saturation, value).clamp(0, 1)


def _grey(x: Tensor) -> Tensor:
    weights = torch.tensor(_LUMA, device=x.device)[:, None, None]
    return (x * weights).sum(1, keepdim=True)


def rgb_to_hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in turns, saturation and value of [T, 3, H, W], [T, H, W] each."""
    red, green, blue = x.unbind(1)
    value, smallest = x.amax(1), x.amin(1)
    chroma = value - smallest
    safe = chroma.clamp(min=1e-12)
    # The sector whose primary is largest; of equals the first, where the formulas agree.
    hue = torch.where(
        value == red,
        (green - blue) / safe % 6,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    saturation = torch.where(value > 0, chroma / value.clamp(min=1e-12), 0.0)
    return torch.where(chroma > 0, hue / 6, 0.0), saturation, value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """[T, 3, H, W] of hue in turns (any number of them), saturation and value."""
    channels = []
    for offset in (5, 3, 1):
        k = (offset + 6 * hue) % 6
        channels.append(value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1)))
    return torch.stack(channels, dim=1)


def augment_sound(
    audio: Tensor, keys: NDArray[np.int64], seed: int, recipe: RecipeConfig
) -> Tensor:
    """The spectrograms turned round in time and with stretches set to 0, [B, F, M] as they came.

    A stretch has a uniform length, from 0 to one less than its limit, and a uniform place.
    """
    kinds = (
        (2, recipe.frequency_masks, recipe.frequency_mask_bins),
        (1, recipe.time_masks, recipe.time_mask_frames),
    )
    if not (recipe.time_shift or any(count and limit for _, count, limit in kinds)):
        return audio
    draws = keyed_uniform(seed, keys, _SOUND_STREAM, 1 + sum(2 * count for _, count, _ in kinds))
    if recipe.time_shift:
        audio = _turned(audio, (draws[:, 0] * audio.shape[1]).astype(np.int64))
    first = 1
    for axis, count, limit in kinds:
        u = draws[:, first : first + 2 * count].reshape(len(keys), count, 2)
        first += 2 * count
        if count and limit:
            hidden = _stretches(u, audio.shape[axis], limit)
            mask = torch.from_numpy(hidden).to(audio.device, non_blocking=True)
            audio = audio.masked_fill(mask[:, None] if axis == 2 else mask[..., None], 0.0)
    return audio


def _turned(audio: Tensor, by: NDArray[np.int64]) -> Tensor:
    """Each spectrogram rolled by its own number of frames."""
    frames = audio.shape[1]
    source = (np.arange(frames) - by[:, None]) % frames
    index = torch.from_numpy(source).to(audio.device, non_blocking=True)
    return audio.gather(1, index[..., None].expand_as(audio))


def _stretches(u: NDArray[np.float64], length: int, limit: int) -> NDArray[np.bool_]:
    """What `count` stretches cover of an axis, [B, length], by uniform numbers [B, count, 2]."""
    sizes = np.minimum((u[..., 0] * limit).astype(np.int64), length)
    starts = (u[..., 1] * (length - sizes)).astype(np.int64)
    place = np.arange(length)[:, None]
    covered: Any = (place >= starts[:, None]) & (place < (starts + sizes)[:, None])
    return covered.any(-1)
