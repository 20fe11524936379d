"""Sources of every kind the patch operations read, and a second way to read them.

The second way cuts, mirrors and patches whole clips with slices and permutations, one clip at a
time, and shares nothing with the code under test.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from avmae_kernels.yuv import i420_to_rgb


@dataclass(frozen=True)
class PatchCase:
    """A source, how it is patched, and the keywords that say what is seen of it."""

    source: Tensor
    patch: tuple[int, ...]
    view: dict[str, Any] = field(default_factory=dict)

    @property
    def is_video(self) -> bool:
        return self.source.ndim != 3

    def to(self, target: torch.device | str | torch.dtype) -> "PatchCase":
        """On another device with the same strides, or, if floating, in another dtype."""
        if isinstance(target, torch.dtype):
            source = self.source.to(target) if self.source.is_floating_point() else self.source
            return PatchCase(source, self.patch, self.view)
        view = {k: v.to(target) if isinstance(v, Tensor) else v for k, v in self.view.items()}
        if self.source.stride(0) == 0:
            source = self.source[:1].to(target).expand_as(self.source)
            return PatchCase(source, self.patch, view)
        memory = torch.empty_strided(
            self.source.shape, self.source.stride(), dtype=self.source.dtype, device=target
        )
        return PatchCase(memory.copy_(self.source), self.patch, view)


def dense_patches(case: PatchCase) -> Tensor:
    """All patches of what is seen, [B, N, P], in the dtype of the source."""
    source, patch = case.source, case.patch
    if not case.is_video:
        return torch.stack([_cut(clip[None, :, :, None], (1, *patch)) for clip in source])
    if case.view.get("layout") == "CTHW":
        source = source.movedim(1, -1)
    if case.view.get("layout") == "I420":
        source = i420_to_rgb(source, case.view.get("colour", "bt601"))
    seen = []
    for b, clip in enumerate(source):
        if "crop" in case.view:
            (top, left), (height, width) = case.view["crop"][b].tolist(), case.view["size"]
            clip = clip[:, top : top + height, left : left + width]
        if "flip" in case.view and case.view["flip"][b]:
            clip = clip.flip(2)
        seen.append(_cut(clip, patch))
    return torch.stack(seen)


def _cut(clip: Tensor, patch: tuple[int, ...]) -> Tensor:
    """[T, H, W, C] to [N, P], patch by patch."""
    (pt, ph, pw), (T, H, W, _) = patch, clip.shape
    patches = [
        clip[t : t + pt, y : y + ph, x : x + pw].flatten()
        for t in range(0, T - pt + 1, pt)
        for y in range(0, H - ph + 1, ph)
        for x in range(0, W - pw + 1, pw)
    ]
    return torch.stack(patches)


def token_index(case: PatchCase, count: int, seed: int = 1) -> Tensor:
    """`count` tokens of each clip in random order, none twice: [B, count] int64."""
    generator = torch.Generator().manual_seed(seed)
    N = dense_patches(case).shape[1]
    rows = [torch.randperm(N, generator=generator)[:count] for _ in case.source]
    return torch.stack(rows).to(case.source.device)


def _bytes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


_CROP = torch.tensor([[0, 1], [3, 8], [8, 0]], dtype=torch.int32)
_FLIP = torch.tensor([True, False, True])
_PATCH = (2, 4, 4)

# Three clips each. Patches of 96 = 3 * 32 values, of 256 = a power of two, of 90, 35 and 15 = none.
CASES: dict[str, Callable[[], PatchCase]] = {
    "THWC": lambda: PatchCase(_bytes(3, 4, 16, 24, 3), _PATCH),
    "CTHW": lambda: PatchCase(_bytes(3, 3, 4, 16, 24), _PATCH, {"layout": "CTHW"}),
    "CTHW-of-THWC-memory": lambda: PatchCase(
        _bytes(3, 4, 16, 24, 3).movedim(-1, 1), _PATCH, {"layout": "CTHW"}
    ),
    "crop": lambda: PatchCase(_bytes(3, 4, 16, 24, 3), _PATCH, {"crop": _CROP, "size": (8, 16)}),
    "flip": lambda: PatchCase(_bytes(3, 4, 16, 24, 3), _PATCH, {"flip": _FLIP}),
    "crop-flip": lambda: PatchCase(
        _bytes(3, 4, 16, 24, 3), _PATCH, {"crop": _CROP, "size": (8, 16), "flip": _FLIP}
    ),
    "crop-flip-CTHW": lambda: PatchCase(
        _bytes(3, 3, 4, 16, 24),
        _PATCH,
        {"layout": "CTHW", "crop": _CROP, "size": (8, 16), "flip": _FLIP},
    ),
    "remainders": lambda: PatchCase(_bytes(3, 5, 14, 23, 3), (2, 3, 5)),
    "remainders-crop-flip": lambda: PatchCase(
        _bytes(3, 5, 14, 23, 3), (2, 3, 5), {"crop": _CROP, "size": (5, 13), "flip": _FLIP}
    ),
    "floating-video": lambda: PatchCase(_floats(3, 2, 16, 32, 3), (1, 8, 16)),
    "strided-clips": lambda: PatchCase(_bytes(6, 4, 20, 28, 3)[::2, :, 2:18, 1:25], _PATCH),
    "one-token": lambda: PatchCase(_bytes(3, 2, 4, 5, 3), (2, 4, 5)),
    "I420": lambda: PatchCase(_bytes(3, 4, 24, 24), _PATCH, {"layout": "I420"}),
    "I420-crop-flip": lambda: PatchCase(
        _bytes(3, 4, 24, 24),
        _PATCH,
        {"layout": "I420", "crop": _CROP, "size": (8, 16), "flip": _FLIP},
    ),
    # Half a line of chroma at the end of a plane; clips and frames of a larger tensor.
    "I420-remainders": lambda: PatchCase(
        _bytes(6, 10, 21, 22)[::2, ::2], (2, 3, 5), {"layout": "I420", "colour": "bt709-full"}
    ),
    "spectrogram": lambda: PatchCase(_floats(3, 50, 32), (16, 16)),
    "spectrogram-remainders": lambda: PatchCase(_floats(3, 26, 17), (7, 5)),
    "spectrogram-transposed": lambda: PatchCase(_floats(3, 16, 26).mT, (4, 4)),
    "spectrogram-expanded": lambda: PatchCase(_floats(1, 26, 16).expand(3, -1, -1), (4, 4)),
}
