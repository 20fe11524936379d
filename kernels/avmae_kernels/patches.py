"""Patches of a video or a spectrogram, and the few of them that a masked encoder looks at.

Shape letters: B clips; T, H, W frames, height, width; C colour channels; F mel bins; N tokens of
a grid; K tokens picked; P values in a patch. Tokens are numbered row-major over the grid, and a
patch vector is row-major too: (time, height, width, channel) for video, (time, frequency) for a
spectrogram.
Source: Audiovisual Masked Autoencoders, arXiv:2212.05922, section 3 (tubelets of 2x16x16, 16x16).
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from avmae_kernels._check import wanted
from avmae_kernels.yuv import Colour, coefficients, read_i420, require_i420

VideoLayout = Literal["THWC", "CTHW", "I420"]


class ClipView(NamedTuple):
    """A batch of clips as operations read it; a spectrogram is a video of one frame and channel.

    clips: [B, T, H, W, C], a view of the source in any memory layout; or planes, as `pixels` says.
    patch: size of a patch along T, H and W.
    size: height and width of the window that is seen.
    crop: [B, 2] int32, top and left of the window in each clip; None: it is the whole picture.
    flip: [B] bool, whether the window is mirrored left to right; None: nowhere.
    pixels: `rgb`, or the colour space of planes [B, T, 3H/2, W], which are read as RGB.
    """

    clips: Tensor
    patch: tuple[int, int, int]
    size: tuple[int, int]
    crop: Tensor | None
    flip: Tensor | None
    pixels: Literal["rgb"] | Colour

    @property
    def channels(self) -> int:
        """Values in a pixel."""
        return self.clips.shape[-1] if self.pixels == "rgb" else 3

    @property
    def values(self) -> int:
        """Values in a patch vector."""
        return math.prod(self.patch) * self.channels


def view_clips(
    op: str,
    source: Tensor,
    patch: tuple[int, ...],
    layout: VideoLayout = "THWC",
    crop: Tensor | None = None,
    size: tuple[int, int] | None = None,
    flip: Tensor | None = None,
    colour: Colour = "bt601",
) -> ClipView:
    """The arguments by which `op` was told what to read, checked; see `gather_patches`."""
    if layout not in get_args(VideoLayout):
        raise ValueError(f"{op} wants layout 'THWC', 'CTHW' or 'I420', got {layout!r}")
    video_axes = 4 if layout == "I420" else 5
    if source.ndim not in (3, video_axes) or len(patch) != (3 if source.ndim != 3 else 2):
        frame = "3H/2, W" if layout == "I420" else "H, W, 3"
        want = f"video [B, T, {frame}] or spectrogram [B, T, F] for patch {tuple(patch)}"
        raise wanted(op, want, source=source)
    if source.ndim == 3:
        if crop is not None or size is not None or flip is not None:
            raise wanted(op, "crop, size and flip for video only", source=source)
        clips, tubelet = source[:, None, :, :, None], (1, patch[0], patch[1])
        full = (clips.shape[2], clips.shape[3])
    elif layout == "I420":
        require_i420(op, source)
        coefficients(colour)
        clips, tubelet = source, (patch[0], patch[1], patch[2])
        full = (clips.shape[2] // 3 * 2, clips.shape[3])
    else:
        clips = source if layout == "THWC" else source.permute(0, 2, 3, 4, 1)
        tubelet = (patch[0], patch[1], patch[2])
        full = (clips.shape[2], clips.shape[3])
        if clips.shape[-1] != 3:
            raise wanted(op, f"3 colour channels in layout {layout}", source=source)
    seen = _window(op, clips, full, crop, size, flip)
    if any(n < p for n, p in zip((clips.shape[1], *seen), tubelet, strict=True)):
        raise wanted(op, f"at least one patch of {tuple(patch)}", source=source)
    return ClipView(clips, tubelet, seen, crop, flip, colour if clips.ndim == 4 else "rgb")


def _window(
    op: str,
    clips: Tensor,
    full: tuple[int, int],
    crop: Tensor | None,
    size: tuple[int, int] | None,
    flip: Tensor | None,
) -> tuple[int, int]:
    """Height and width of what is seen of each clip, once crop, size and flip are checked."""
    for name, tensor, dtype, shape in (
        ("crop", crop, torch.int32, (clips.shape[0], 2)),
        ("flip", flip, torch.bool, (clips.shape[0],)),
    ):
        if tensor is None:
            continue
        good = tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous()
        if not good or tensor.device != clips.device:
            kind = str(dtype).removeprefix("torch.")
            want = f"{name} {kind} {list(shape)}, contiguous, on the clips' device"
            raise wanted(op, want, **{"clips": clips, name: tensor})
    if (crop is None) != (size is None):
        raise ValueError(f"{op} wants crop and size together, got size {size}")
    if size is None:
        return full
    if not (len(size) == 2 and 0 < size[0] <= full[0] and 0 < size[1] <= full[1]):
        raise ValueError(f"{op} wants size in (1, 1)..{full}, got {size}")
    return size[0], size[1]


def refuse_source_gradient(op: str, source: Tensor) -> None:
    """Raise where autograd expects a gradient that `op` does not compute."""
    if source.requires_grad and torch.is_grad_enabled():
        raise wanted(op, "a source without requires_grad: it gets no gradient", source=source)


def check_index(op: str, name: str, index: Tensor, source: Tensor) -> None:
    """Raise unless `index` is int64 [B, count] on the device of `source`, whose first axis is B."""
    good = index.ndim == 2 and index.shape[0] == source.shape[0] and index.dtype == torch.int64
    if not good or index.device != source.device:
        raise wanted(op, f"{name} int64 [B, count]", source=source, **{name: index})


def grid_of(source: Tensor, patch: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens along each patched axis of `source`; what does not fill a patch is dropped."""
    return tuple(size // p for size, p in zip(source.shape[1:], patch, strict=False))


def normalise_pixels(source: Tensor, dtype: torch.dtype) -> Tensor:
    """`source * 2/255 - 1` for uint8, `source` itself for a floating tensor; both as `dtype`.

    Uint8 pixels become [-1, 1], the input range of the released model (no mean and no std).
    """
    if source.dtype != torch.uint8:
        return source.to(dtype)
    # Written as (x - 127.5) * 2/255, whose difference is exact: one rounding, and the same value
    # from every device, however it contracts a product and a sum.
    wide = torch.promote_types(dtype, torch.float32)
    return source.to(wide).sub_(127.5).mul_(2.0 / 255.0).to(dtype)


def gather_patches(
    source: Tensor,
    index: Tensor,
    patch: tuple[int, ...],
    *,
    layout: VideoLayout = "THWC",
    crop: Tensor | None = None,
    size: tuple[int, int] | None = None,
    flip: Tensor | None = None,
    colour: Colour = "bt601",
) -> Tensor:
    """Return the patches `index[b]` of every clip b, flattened: [B, K, P], dtype of `source`.

    Args:
        source: video [B, T, H, W, 3] with `patch` (t, h, w), or spectrogram [B, T, F] with
            `patch` (time, frequency). Any dtype. Read only at the picked patches.
        index: token numbers, [B, K], int64, in [0, N). Not checked: it would stall a GPU.
        patch: size of a patch along each patched axis.
        layout: `THWC`, or `CTHW` for video [B, 3, T, H, W], or `I420` for planes of uint8
            [B, T, 3H/2, W] as `avmae_kernels.yuv` lays them out. The patches are the same: of
            planes, those of `i420_to_rgb(source, colour)`, which is not made.
        crop: top and left pixel of the part of each clip that is seen, [B, 2], int32, with its
            `size`. Tokens are numbered in it. It must lie inside the clip, which is not checked.
        size: height and width of that part.
        flip: clips that are seen mirrored left to right, after the crop, [B], bool.
        colour: colour space of planes; `bt601` is what swscale takes for granted.

    Raises:
        ValueError: a shape or dtype is not as above, or the grid has no token.
    """
    view = view_clips("gather_patches", source, patch, layout, crop, size, flip, colour)
    check_index("gather_patches", "index", index, source)
    return read_patches(view, index)


def read_patches(view: ClipView, index: Tensor) -> Tensor:
    """`gather_patches` of checked arguments: what every kernel that reads patches must see."""
    clips, (pt, ph, pw), size, crop, flip, pixels = view
    B, K = index.shape
    if B * K == 0:
        return clips.new_empty(B, K, view.values)
    if pixels != "rgb":
        return _read_planes(view, index)
    of_b, of_t, of_h, of_w, of_c = clips.stride()
    rows, columns = size[0] // ph, size[1] // pw
    row = index // columns
    # One column on is pw pixels right; a new row also takes back the columns of the last one, and
    # a new frame its rows.
    first = index * (pw * of_w)
    first.add_(row, alpha=ph * of_h - columns * pw * of_w)
    if clips.shape[1] > pt:
        first.add_(row // rows, alpha=pt * of_t - rows * ph * of_h)
    first.add_(_steps(B, of_b, index)[:, None])
    if flip is not None:
        mirrored = (size[1] - pw - 2 * pw * (index % columns)) * of_w
        first.add_(torch.where(flip[:, None], mirrored, 0))
    if crop is not None:
        first.add_(crop[:, :1], alpha=of_h).add_(crop[:, 1:], alpha=of_w)
    step = _steps(pt, of_t, index)[:, None] + _steps(ph, of_h, index)
    # Row n of `lines` is the line of a patch that starts at element n of the clips' memory, so
    # whole lines are copied: about twenty times as fast on a CPU as indexing an array of patches.
    channels = clips.shape[-1]
    extent = 1 + sum((n - 1) * s for n, s in zip(clips.shape, clips.stride(), strict=True))
    starts = extent - (pw - 1) * of_w - (channels - 1) * of_c
    if of_w == channels and of_c == 1:
        lines = clips.as_strided((starts, pw * channels), (1, 1))
    else:
        lines = clips.as_strided((starts, pw, channels), (1, of_w, of_c))
    patches = lines.index_select(0, (first[..., None, None] + step).flatten())
    if flip is not None:
        patches = patches.view(B, K, pt * ph, pw, channels)
        patches = torch.where(flip[:, None, None, None, None], patches.flip(3), patches)
    return patches.reshape(B, K, view.values)


def _read_planes(view: ClipView, index: Tensor) -> Tensor:
    """`read_patches` of planes, pixel by pixel: [B, K, P] uint8."""
    clips, patch, (height, width), crop, flip, colour = view
    B, K = index.shape
    rows, columns = height // patch[1], width // patch[2]

    def along(axis: int, token: Tensor) -> Tensor:
        """Where the pixels of each patch lie along an axis: [B, K, 1, .., size, .., 1]."""
        step = _steps(patch[axis], 1, index).view([-1 if a == axis else 1 for a in range(3)])
        return token[..., None, None, None] * patch[axis] + step

    row = index // columns
    frame, y, x = along(0, row // rows), along(1, row % rows), along(2, index % columns)
    clip = _steps(B, 1, index).view(-1, 1, 1, 1, 1)
    if flip is not None:
        x = torch.where(flip.view_as(clip), width - 1 - x, x)
    if crop is not None:
        y, x = y + crop[:, 0].view_as(clip), x + crop[:, 1].view_as(clip)
    return read_i420(clips, clip, frame, y, x, colour).reshape(B, K, view.values)


def _steps(count: int, stride: int, like: Tensor) -> Tensor:
    """0, stride, 2 stride, ..., on the device of `like`."""
    return torch.arange(count, device=like.device) * stride


def patchify(source: Tensor, patch: tuple[int, ...]) -> Tensor:
    """All patches in token order: [B, N, P]; inverse of `unpatchify`, up to dropped remainders."""
    grid = grid_of(source, patch)
    blocks = _blocks(source, grid, patch)
    axes = len(grid)
    tokens = [1 + 2 * axis for axis in range(axes)]
    values = [2 + 2 * axis for axis in range(axes)]
    channel = [1 + 2 * axes] if source.ndim == 5 else []
    return blocks.permute(0, *tokens, *values, *channel).flatten(1 + axes).flatten(1, axes)


def unpatchify(patches: Tensor, grid: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    """Put [B, N, P] patches back: [B, T, H, W, 3] for three axes, [B, T, F] for two."""
    axes = len(grid)
    want_values = math.prod(patch) * (3 if axes == 3 else 1)
    if patches.ndim != 3 or patches.shape[1:] != (math.prod(grid), want_values):
        want = f"patches [B, {math.prod(grid)}, {want_values}] for grid {grid}, patch {patch}"
        raise wanted("unpatchify", want, patches=patches)
    channel = (3,) if axes == 3 else ()
    blocks = patches.reshape(-1, *grid, *patch, *channel)
    pairs = [axis for i in range(axes) for axis in (1 + i, 1 + axes + i)]
    last = [1 + 2 * axes] if axes == 3 else []
    sizes = [g * p for g, p in zip(grid, patch, strict=True)]
    return blocks.permute(0, *pairs, *last).reshape(-1, *sizes, *channel)


def _blocks(source: Tensor, grid: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    """A view [B, g0, p0, g1, p1, ..., (3)] of the part of `source` that fills patches."""
    for axis, (tokens, size) in enumerate(zip(grid, patch, strict=True)):
        source = source.narrow(1 + axis, 0, tokens * size)
    # From the last axis, so that the axes still to split keep their numbers.
    for axis in reversed(range(len(grid))):
        source = source.unflatten(1 + axis, (grid[axis], patch[axis]))
    return source
