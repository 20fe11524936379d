"""Video as it is decoded, planes of luma and chroma, and its conversion to RGB.

Shape letters: B clips, T frames, H, W height and width. A frame is [3H/2, W] uint8 ("I420"): H
lines of luma Y, then the chroma planes U and V, [H/2, W/2] each, row after row without gaps. Half
the bytes of RGB.
Source: ITU-R BT.601 and BT.709, section 3 of each; a pixel takes the chroma of its 2x2 block, as
swscale's plain conversion does. Computed in integers, so that every device gives the same bytes.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from avmae_kernels._check import wanted
from avmae_kernels._triton import tl, triton

Colour = Literal["bt601", "bt709", "bt601-full", "bt709-full"]
COLOURS: tuple[Colour, ...] = get_args(Colour)

# Weights of red and blue in luma.
_LUMA = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
# Coefficients are in units of 2**-16: off by 2**-17 each, so by less than 0.006 of a level in all,
# and the sums of products of bytes stay within 32 bits.
_SHIFT = 16
# A kernel may read a global only if it is a constexpr.
_BITS, _HALF = tl.constexpr(_SHIFT), tl.constexpr(1 << (_SHIFT - 1))


def coefficients(colour: str) -> tuple[int, ...]:
    """(black, y, v to red, u to green, v to green, u to blue): see `_convert`.

    Raises:
        ValueError: `colour` is not one of `COLOURS`.
    """
    if colour not in COLOURS:
        raise ValueError(f"colour must be one of {', '.join(map(repr, COLOURS))}, got {colour!r}")
    standard, _, full = colour.partition("-")
    red, blue = _LUMA[standard]
    green = 1.0 - red - blue
    # Limited range: luma in 16..235, chroma 112 to either side of 128; full: 0..255 and 127.5.
    black, luma, chroma = (0, 1.0, 1.0) if full else (16, 255 / 219, 255 / 224)
    to_red, to_blue = 2 * (1 - red) * chroma, 2 * (1 - blue) * chroma
    scaled = (luma, to_red, -to_blue * blue / green, -to_red * red / green, to_blue)
    return black, *(round(c * 2**_SHIFT) for c in scaled)


def require_i420(op: str, planes: Tensor) -> None:
    """Raise ValueError unless `planes` is uint8 [B, T, 3H/2, W] with H, W even, frames whole."""
    good = planes.ndim == 4 and planes.dtype == torch.uint8
    good = good and planes.shape[2] % 3 == 0 and planes.shape[3] % 2 == 0
    if not good or planes.stride()[2:] != (planes.shape[3], 1):
        want = "uint8 planes [B, T, 3H/2, W] with even H and W, every frame contiguous"
        raise wanted(op, want, planes=planes)


def i420_to_rgb(planes: Tensor, colour: Colour = "bt601") -> Tensor:
    """Planes [B, T, 3H/2, W] as pixels, [B, T, H, W, 3] uint8.

    Raises:
        ValueError: `planes` is not as above, or `colour` is unknown.
    """
    require_i420("i420_to_rgb", planes)
    luma, *chroma = split_planes(planes)
    u, v = (c.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1) for c in chroma)
    return _convert(luma, u, v, colour)


def split_planes(planes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Y [..., H, W], U and V [..., H/2, W/2]: views of planes [..., 3H/2, W]."""
    lines, width = planes.shape[-2:]
    height = lines // 3 * 2
    luma = planes[..., :height, :]
    # Half a line of the tensor is a line of chroma.
    flat = planes.flatten(-2)
    quarter = height // 2 * (width // 2)
    shape = (*planes.shape[:-2], height // 2, width // 2)
    u = flat[..., height * width : height * width + quarter].view(shape)
    return luma, u, flat[..., height * width + quarter :].view(shape)


def read_i420(
    clips: Tensor, clip: Tensor, frame: Tensor, y: Tensor, x: Tensor, colour: str
) -> Tensor:
    """The pixels at some places of planes [B, T, 3H/2, W], uint8 [..., 3]; places broadcast."""
    of_b, of_t, width, _ = clips.stride()
    luma_size = clips.shape[2] // 3 * 2 * width
    extent = 1 + sum((n - 1) * s for n, s in zip(clips.shape, clips.stride(), strict=True))
    memory = clips.as_strided((extent,), (1,))
    start = clip * of_b + frame * of_t
    u_at = start + luma_size + y // 2 * (width // 2) + x // 2
    luma, u, v = (memory[at] for at in (start + y * width + x, u_at, u_at + luma_size // 4))
    return _convert(luma, u, v, colour)


def _convert(luma: Tensor, u: Tensor, v: Tensor, colour: str) -> Tensor:
    """[..., 3] uint8 of planes of one shape."""
    black, of_y, v_red, u_green, v_green, u_blue = coefficients(colour)
    luma, u, v = luma.int() - black, u.int() - 128, v.int() - 128
    base = luma * of_y + (1 << (_SHIFT - 1))
    rgb = (base + v * v_red, base + u * u_green + v * v_green, base + u * u_blue)
    return torch.stack([(c >> _SHIFT).clamp_(0, 255).to(torch.uint8) for c in rgb], dim=-1)


@triton.jit
def convert(luma, u, v, channel, YUV: tl.constexpr):
    """Colour `channel` (0 red, 1 green, 2 blue) of bytes of planes, uint8; see `_convert`.

    YUV: `coefficients` of the colour space.
    """
    of_u = tl.where(channel == 0, 0, tl.where(channel == 1, YUV[3], YUV[5]))
    of_v = tl.where(channel == 0, YUV[2], tl.where(channel == 1, YUV[4], 0))
    x = (luma.to(tl.int32) - YUV[0]) * YUV[1] + _HALF
    x += (u.to(tl.int32) - 128) * of_u + (v.to(tl.int32) - 128) * of_v
    return tl.minimum(tl.maximum(x >> _BITS, 0), 255).to(tl.uint8)
