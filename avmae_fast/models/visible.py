"""Which tokens of which clips: what callers of `MaskedEncoder` hand in, checked and made alike.

Shape letters: B clips, N tokens of a clip's grid, V visible tokens.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avmae_fast.config import Modality
from avmae_kernels._check import describe
from avmae_kernels.patches import grid_of

Clips = Tensor | Sequence[Tensor]
Keep = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Visible:
    """The clips of one modality and the tokens to look at.

    clips: one tensor [B, ...], or a tensor for each clip.
    grids: tokens along each axis of each clip.
    index: int64 [V_b] of each clip.
    together: the same as [B, V], where clips and indices came as one tensor each.
    """

    clips: Clips
    grids: tuple[tuple[int, ...], ...]
    index: tuple[Tensor, ...]
    together: Tensor | None

    @property
    def lengths(self) -> list[int]:
        """Visible tokens of each clip."""
        return [len(index) for index in self.index]

    def batches(self) -> Iterator[tuple[Tensor, Tensor, tuple[int, ...]]]:
        """Clips [b, ...], their tokens [b, V] and their grid, in order."""
        if isinstance(self.clips, Tensor) and self.together is not None:
            yield self.clips, self.together, self.grids[0]
            return
        for clip, index, grid in zip(self.clips, self.index, self.grids, strict=True):
            yield clip[None], index[None], grid


def by_modality(
    keep: Keep | Mapping[Modality, Keep] | None, clips: Mapping[Modality, Clips]
) -> dict[Modality, Keep | None]:
    """The visible tokens of each modality that has clips."""
    if isinstance(keep, Mapping):
        if keep.keys() != clips.keys():
            raise ValueError(f"keep is for {sorted(keep)}, the clips are {sorted(clips)}")
        return dict(keep)
    if keep is not None and len(clips) > 1:
        raise ValueError(
            "keep of two modalities is a mapping, as {'video': ..., 'audio': ...}, "
            f"got {type(keep).__name__}"
        )
    return dict.fromkeys(clips, keep)


def grids_of(
    m: Modality, clips: Clips, patch: tuple[int, ...], whole: bool
) -> tuple[tuple[int, ...], ...]:
    """The grid of each clip.

    Args:
        whole: whether patches have to fill a clip; else what does not fill one is dropped.

    Raises:
        ValueError: a clip has other axes than its modality, or is no multiple of the patch.
    """
    if not isinstance(clips, Tensor):
        return tuple(_grid_of(f"{m}[{b}]", clip, patch, whole) for b, clip in enumerate(clips))
    if clips.ndim < 2:
        raise ValueError(f"{m}: a batch of clips was expected, got {describe(clips)}")
    return (_grid_of(m, clips[0], patch, whole),) * len(clips) if len(clips) else ()


def _grid_of(name: str, clip: Tensor, patch: tuple[int, ...], whole: bool) -> tuple[int, ...]:
    video = len(patch) == 3
    axes = ("frames", "height", "width", "3") if video else ("frames", "mel_bins")
    if clip.ndim != len(axes) or (video and clip.shape[-1] != 3):
        raise ValueError(f"{name}: a clip is [{', '.join(axes)}], got {describe(clip)}")
    for axis, size, p in zip(axes, clip.shape, patch, strict=False):
        if size < p or (whole and size % p):
            want = f"a multiple of {p}" if whole else f"at least {p}"
            raise ValueError(f"{name}: {axis} = {size} must be {want}, for patches of {patch}")
    return grid_of(clip[None], patch)


def choose_visible(
    m: Modality, clips: Clips, grids: tuple[tuple[int, ...], ...], keep: Keep | None
) -> Visible:
    """Clips and their visible tokens as index tensors.

    Raises:
        ValueError: `keep` is not for these clips, or of another dtype than int64 and bool.
    """
    tokens = [math.prod(grid) for grid in grids]
    if keep is None:
        keep = _every_token(clips, tokens)
    if len(keep) != len(grids):
        raise ValueError(f"keep of {m}: {len(keep)} entries for {len(grids)} clips")
    together = None
    if isinstance(keep, Tensor) and keep.ndim == 2 and keep.dtype == torch.int64:
        index = tuple(keep.unbind())
        if isinstance(clips, Tensor):
            together = keep
    else:
        pairs = enumerate(zip(keep, tokens, strict=True))
        index = tuple(_as_index(f"keep of {m}[{b}]", own, n) for b, (own, n) in pairs)
    for b, (own, n) in enumerate(zip(index, tokens, strict=True)):
        _check_range(f"keep of {m}[{b}]", own, n)
    return Visible(clips, grids, index, together)


def _every_token(clips: Clips, tokens: list[int]) -> Keep:
    device = clips[0].device if tokens else None
    if isinstance(clips, Tensor) and tokens:
        return torch.arange(tokens[0], device=device).expand(len(tokens), -1)
    return [torch.arange(n, device=device) for n in tokens]


def _as_index(name: str, keep: Tensor, tokens: int) -> Tensor:
    if keep.ndim == 1 and keep.dtype == torch.int64:
        return keep
    if keep.ndim == 1 and keep.dtype == torch.bool and len(keep) == tokens:
        return keep.nonzero()[:, 0]
    raise ValueError(f"{name} is int64 [V], or bool [{tokens}], got {describe(keep)}")


def _check_range(name: str, index: Tensor, tokens: int) -> None:
    # Reading them on a GPU would wait for it.
    if index.device.type != "cpu" or torch.compiler.is_compiling() or len(index) == 0:
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= tokens:
        raise ValueError(f"{name} has token {low if low < 0 else high} of 0 .. {tokens - 1}")
