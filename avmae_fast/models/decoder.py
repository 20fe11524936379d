"""What the decoder is shown and asked, for each of the three pretraining objectives.

Shape letters: B clips, N tokens of a modality, V visible, S scored tokens.
Source: arXiv:2212.05922, sections 3.2 and 3.3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from avmae_fast.config import Modality, ModelConfig
from avmae_fast.models.layout import TokenMask


@dataclass(frozen=True)
class Question:
    """The decoder sequence of one modality: encoded tokens, then mask tokens.

    source: the modality whose encoded tokens are shown.
    token_table: the modality whose position table they are placed in.
    token_index: [B, V] their positions in that table.
    mask_index: [B, S] positions of the mask tokens in the modality's own table.
    scored: [B, S] the tokens the loss looks at, in the order of the sequence's tail.
    """

    source: Modality
    token_table: Modality
    token_index: Tensor
    mask_index: Tensor
    scored: Tensor


def question(config: ModelConfig, m: Modality, masks: Mapping[Modality, TokenMask]) -> Question:
    """What modality `m` has to reconstruct, and from what."""
    mask = masks[m]
    every = torch.arange(config.input(m).tokens, device=mask.visible.device)
    if config.objective == "reconstruction":
        return _scored(config, m, m, mask.visible, mask.masked)
    other: Modality = "audio" if m == "video" else "video"
    shown = masks[other].visible
    batch, count = shown.shape
    if config.objective == "inpainting":
        # Every token of `m` is a mask token at its own place; all of them are scored.
        each = every.expand(batch, -1)
        return Question(other, other, shown, each, each)
    if count >= len(every):
        raise ValueError(
            f"released inpainting shows {count} {other} tokens at the first positions of "
            f"{len(every)} {m} tokens: none is left to predict; raise {other}.mask_ratio"
        )
    # As released: foreign tokens take the first positions of `m`'s own table, mask tokens the rest.
    first, rest = every[:count].expand(batch, -1), every[count:].expand(batch, -1)
    return _scored(config, other, m, first, rest)


def _scored(
    config: ModelConfig, source: Modality, table: Modality, index: Tensor, masked: Tensor
) -> Question:
    scored = torch.cat([index, masked], dim=1) if config.loss_on == "all" else masked
    return Question(source, table, index, masked, scored)
