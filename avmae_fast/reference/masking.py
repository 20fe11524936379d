"""Random masking as the paper does it: each clip and modality draws its own permutation.

Shape letters: B clips, N tokens, V visible, M masked.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class MaskLike(Protocol):
    """Anything with the token numbers [B, V] the encoder sees and [B, M] all others, int64."""

    @property
    def visible(self) -> Tensor: ...

    @property
    def masked(self) -> Tensor: ...


@dataclass(frozen=True)
class Mask:
    """Visible [B, V] and masked [B, M] token numbers of each clip, int64, in any order."""

    visible: Tensor
    masked: Tensor


def masked_count(tokens: int, ratio: float) -> int:
    """How many of `tokens` are masked: int(ratio * tokens), so 0.9 of 1568 leaves 157 visible."""
    return int(ratio * tokens)


def draw_mask(batch: int, tokens: int, ratio: float, generator: torch.Generator) -> Mask:
    """Mask the first tokens of one random permutation a clip; the rest is visible, unsorted."""
    order = torch.rand(batch, tokens, generator=generator).argsort(dim=1)
    masked = masked_count(tokens, ratio)
    return Mask(visible=order[:, masked:], masked=order[:, :masked])
