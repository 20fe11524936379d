"""Mixup: each clip of a micro-batch is blended with another one, and so are their labels.

Each modality has a share of its own, so its labels are its own too. As released the partner of
clip i is clip B - 1 - i of the same micro-batch on the same device, with one share for all.
Source: arXiv:1710.09412; the authors' trainer for the shares.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

# Apart from stochastic depth, whose numbers come from the same generator.
_COUNTER = 1
_STREAM = {"video": 0, "audio": 1, "both": 2}


def draw_shares(names: tuple[str, ...], alpha: float, seed: int, first: int) -> dict[str, float]:
    """The share of a clip in its blend, for each of `names`, from Beta(alpha, alpha).

    Args:
        first: position of the first sample of the micro-batch, which is what it depends on.
    """
    shares = {}
    for name in names:
        bits = np.random.Philox(key=seed, counter=[0, _COUNTER, _STREAM[name], first])
        shares[name] = float(np.random.Generator(bits).beta(alpha, alpha))
    return shares


def mix(x: Tensor, share: float) -> Tensor:
    """`share * x + (1 - share) * x` reversed along its first axis; uint8 stays so, rounded once."""
    if x.dtype != torch.uint8:
        return x.lerp(x.flip(0), 1.0 - share)
    mixed = torch.empty_like(x)
    # Clip by clip: as floats a batch of pictures would take four times its memory.
    for clip, partner, target in zip(x, x.flip(0), mixed, strict=True):
        target.copy_(clip.float().lerp(partner.float(), 1.0 - share).round())
    return mixed


def mix_labels(labels: Tensor, shares: Mapping[str, float]) -> dict[str, Tensor]:
    """The labels [B, C] of each name, mixed by its share."""
    return {name: mix(labels, share) for name, share in shares.items()}
