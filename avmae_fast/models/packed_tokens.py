"""Features of clips of any length, packed: what `MaskedEncoder` returns.

Shape letters: B clips, T tokens of all clips and modalities together, L longest, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from avmae_fast.config import Modality
from avmae_fast.models.layout import TokenLayout


@dataclass(frozen=True)
class PackedTokens:
    """Features [T, D]: clip by clip, in each its video tokens and then its audio tokens.

    tokens: [T, D].
    layout: one sequence a clip.
    index: for each modality the token numbers of each clip, int64 [V_b], in the order of the rows;
        prefix tokens come first, as -1, -2, ...
    grids: for each modality the grid of each clip, tokens along each axis; numbers are row-major.
    """

    tokens: Tensor
    layout: TokenLayout
    index: Mapping[Modality, tuple[Tensor, ...]]
    grids: Mapping[Modality, tuple[tuple[int, ...], ...]]

    def lengths(self, modality: Modality | None = None) -> list[int]:
        """Tokens of each clip, of one modality or of all."""
        if modality is not None:
            return [len(index) for index in self.index[modality]]
        counts = (self.lengths(m) for m in self.index)
        return [sum(of_clip) for of_clip in zip(*counts, strict=True)]

    def clips(self, modality: Modality | None = None) -> list[Tensor]:
        """Features of each clip, views [V_b, D], of one modality or of all side by side."""
        if modality is None:
            return list(self.tokens.split(self.lengths()))
        counts = [self.lengths(m) for m in self.index]
        parts = self.tokens.split([n for of_clip in zip(*counts, strict=True) for n in of_clip])
        return list(parts[list(self.index).index(modality) :: len(self.index)])

    def pad(self, modality: Modality | None = None) -> tuple[Tensor, Tensor]:
        """Features [B, L, D], zero past the end of a clip, and where they are real, bool [B, L]."""
        dense = pad_sequence(self.clips(modality), batch_first=True)
        counts = torch.tensor(self.lengths(modality)).to(dense.device, non_blocking=True)
        return dense, torch.arange(dense.shape[1], device=dense.device) < counts[:, None]
