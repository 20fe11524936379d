"""Which tokens the encoder sees, and which rows of a packed tensor attend to one another.

Shape letters: B clips, N tokens of a modality, V visible, M masked, S sequences, T packed tokens.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avmae_fast.config import Modality
from avmae_kernels.attention import slot_owners
from avmae_kernels.masking import Masks


@dataclass(frozen=True)
class TokenMask:
    """The visible and the masked tokens of each clip in one modality, int64.

    visible: [B, V], token numbers the encoder sees. masked: [B, M], all others.
    Both may be in any order; the loss does not depend on it (except in released inpainting, which
    numbers the visible tokens by their order). Every clip has the same V.
    """

    visible: Tensor
    masked: Tensor

    @classmethod
    def from_numpy(cls, masks: Masks, device: torch.device | str = "cpu") -> "TokenMask":
        """The same mask as tensors on `device`."""

        def to_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device, torch.int64, non_blocking=True)

        return cls(to_device(masks.visible), to_device(masks.masked))

    @classmethod
    def all_visible(cls, batch: int, tokens: int, device: torch.device | str) -> "TokenMask":
        """Nothing masked: what feature extraction uses."""
        every = torch.arange(tokens, device=device).expand(batch, tokens)
        return cls(every, every[:, :0])


@dataclass(frozen=True)
class TokenLayout:
    """Sequences laid end to end in a packed tensor [T, width]; attention stays inside each.

    A fusion strategy is a layout: joint attention is one sequence a clip, shared weights are two.

    cu_seqlens: [S + 1] int32, where each sequence starts, and T at the end.
    fixed_length: the length of every sequence where all have the same above 0, else None.
    owners: `slot_owners` of sequences whose lengths vary, found once for all layers.
    """

    cu_seqlens: Tensor
    fixed_length: int | None
    owners: Tensor | None = None

    @classmethod
    def fixed(cls, sequences: int, length: int, device: torch.device | str) -> "TokenLayout":
        """`sequences` of one `length` each."""
        offsets = torch.arange(sequences + 1, dtype=torch.int32, device=device) * length
        # Empty sequences are not worth a fast path: their offsets say it all.
        return cls(offsets, length or None)

    @classmethod
    def end_to_end(
        cls, sequences: int, lengths: Sequence[int], device: torch.device | str
    ) -> "TokenLayout":
        """`sequences` of the first length, then as many of the next, and so on."""
        if len(set(lengths)) == 1:
            return cls.fixed(sequences * len(lengths), lengths[0], device)
        number = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        # Made where they are needed: a copy from the host would wait for the GPU.
        offsets, start = [number[:1]], 0
        for length in lengths:
            offsets.append(number[1:] * length + start)
            start += sequences * length
        cu_seqlens = torch.cat(offsets)
        return cls(cu_seqlens, None, slot_owners(cu_seqlens, start))

    @classmethod
    def varying(cls, lengths: Sequence[int], device: torch.device | str) -> "TokenLayout":
        """A sequence of each length, for lengths that differ or change from step to step."""
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        # Does not wait for the GPU: the few bytes are taken over before the call returns.
        cu_seqlens = offsets.to(device, non_blocking=True)
        return cls(cu_seqlens, None, slot_owners(cu_seqlens, sum(lengths)))


@dataclass(frozen=True)
class Tail:
    """The last tokens of every sequence: the only ones the last decoder block has to finish.

    rows: [Q] int64, their rows in the packed tensor. layout: them alone, packed.
    """

    rows: Tensor
    layout: TokenLayout


def pack(
    tokens: Mapping[Modality, Tensor], joint: bool, tails: Mapping[Modality, int] | None = None
) -> tuple[Tensor, TokenLayout, Tail | None]:
    """Lay the sequences of all modalities end to end.

    Args:
        tokens: [B, length_m, width] of each modality m.
        joint: one sequence a clip (its modalities side by side) or one for each modality.
        tails: for each modality, how many of its last tokens are asked for; None asks for all.
            In a joint sequence each modality's tokens stay together, so its tail is a tail of its
            own part.

    Returns:
        The packed tokens [T, width], their layout, and the tail (None where `tails` is).
    """
    parts = list(tokens.values())
    batch, device = parts[0].shape[0], parts[0].device
    lengths = [part.shape[1] for part in parts]
    if joint:
        packed = torch.cat(parts, dim=1).flatten(0, 1)
        layout = TokenLayout.fixed(batch, sum(lengths), device)
    else:
        packed = torch.cat([part.flatten(0, 1) for part in parts])
        layout = TokenLayout.end_to_end(batch, lengths, device)
    if tails is None:
        return packed, layout, None
    counts = [tails[name] for name in tokens]
    rows = _tail_rows(batch, lengths, counts, joint, device)
    if joint:
        return packed, layout, Tail(rows, TokenLayout.fixed(batch, sum(counts), device))
    return packed, layout, Tail(rows, TokenLayout.end_to_end(batch, counts, device))


def _tail_rows(
    batch: int, lengths: list[int], counts: list[int], joint: bool, device: torch.device
) -> Tensor:
    """Rows of the last `counts[m]` tokens of each part, in the order of the packed tails."""
    clip = torch.arange(batch, device=device)[:, None]
    rows, start = [], 0
    for length, count in zip(lengths, counts, strict=True):
        own = torch.arange(length - count, length, device=device)
        # Joint: parts follow each other inside a clip. Else: all clips of a part, then the next.
        first = clip * sum(lengths) + start if joint else start + clip * length
        rows.append(first + own)
        start += length if joint else length * batch
    if joint:
        return torch.cat(rows, dim=1).flatten()
    return torch.cat([part.flatten() for part in rows])


def unpack(
    packed: Tensor, batch: int, lengths: Mapping[Modality, int], joint: bool
) -> dict[Modality, Tensor]:
    """Undo `pack`: [B, length_m, width] of each modality m."""
    if joint:
        joined = packed.unflatten(0, (batch, sum(lengths.values())))
        parts = joined.split(list(lengths.values()), dim=1)
        return dict(zip(lengths, parts, strict=True))
    parts = packed.split([batch * length for length in lengths.values()])
    items = zip(lengths.items(), parts, strict=True)
    return {name: part.unflatten(0, (batch, length)) for (name, length), part in items}
