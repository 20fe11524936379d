"""Patches, reconstruction targets and the loss.

Shape letters: B clips, N tokens, P values in a patch.
Source: arXiv:2212.05922; the loss, with its 1e-8, is that of the authors' code.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from avmae_fast.config import TargetNorm

_TARGET_EPS = 1e-6
_COUNT_EPS = 1e-8


def patchify(x: Tensor, patch: Sequence[int]) -> Tensor:
    """Cut the axes after the first into patches and flatten them: [B, N, P], dtype of x.

    Tokens and the values of a patch both run row-major: (t, h, w) and (t, h, w, channel) for a
    video [B, T, H, W, 3], (time, frequency) for a spectrogram [B, T, F]. What does not fill a
    patch is dropped.
    """
    for axis, size in enumerate(patch, start=1):
        count = x.shape[axis] // size
        x = x.narrow(axis, 0, count * size)
    for axis in range(len(patch), 0, -1):
        x = x.unflatten(axis, (-1, patch[axis - 1]))
    # The axes are now B, (count, size) of each patched axis, and the channel if there is one.
    counts = [1 + 2 * i for i in range(len(patch))]
    rest = [axis for axis in range(1, x.ndim) if axis not in counts]
    return x.permute(0, *counts, *rest).flatten(len(patch) + 1).flatten(1, len(patch))


def reconstruction_target(x: Tensor, patch: Sequence[int], norm: TargetNorm) -> Tensor:
    """The patches to predict, [B, N, P], from the network's input; no gradient flows into it.

    `patch` standardises each patch, `patch_channel` each colour channel of it, with the biased
    variance and 1e-6 inside the root; a spectrogram has no channels and `patch_channel` leaves it
    as it is.

    Raises:
        ValueError: the norm is another one, not the authors'.
    """
    if norm not in ("none", "patch", "patch_channel"):
        choices = "'none', 'patch' or 'patch_channel'"
        raise ValueError(f"the reference knows target_norm {choices}, got {norm!r}")
    target = patchify(x.detach(), patch)
    has_channels = x.ndim > len(patch) + 1
    if norm == "none" or (norm == "patch_channel" and not has_channels):
        return target
    values = target.unflatten(-1, (-1, x.shape[-1] if norm == "patch_channel" else 1))
    variance, mean = torch.var_mean(values, dim=2, correction=0, keepdim=True)
    return ((values - mean) / (variance + _TARGET_EPS).sqrt()).flatten(2)


def reconstruction_loss(
    pred: Tensor, target: Tensor, weight: Tensor, mean_over_patch: bool
) -> Tensor:
    """Return `sum(weight * |pred - target|^2) / (sum(weight) + 1e-8)`, divided by P if asked.

    Args:
        pred: predicted patches, [B, N, P].
        target: true patches, [B, N, P].
        weight: how much each token counts, [B, N]; 0 for what is not scored.
        mean_over_patch: average over the values of a patch instead of adding them up.
    """
    error = (pred - target).square().sum(dim=-1)
    loss = (weight * error).sum() / (weight.sum() + _COUNT_EPS)
    return loss / pred.shape[-1] if mean_over_patch else loss
