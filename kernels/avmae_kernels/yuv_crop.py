"""Part of a decoded picture, mirrored or not, written where it belongs: as pixels or as planes.

The host's side of `avmae_kernels.yuv`: a pixel is what `i420_to_rgb` makes of the whole picture, so
that a clip has the same bytes whether it is converted here or on a GPU. Only what is wanted is
touched, once.

Computed by `avmae_kernels._C` (`csrc/`), or by NumPy where that is not built: the same bytes.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from avmae_kernels._compiled import compiled
from avmae_kernels.yuv import coefficients

Bytes = NDArray[np.uint8]
# Luma [H, W] and chroma [(H + 1) // 2, (W + 1) // 2] twice; lines may be padded.
Planes = tuple[Bytes, Bytes, Bytes]

# From the full range of levels to the limited one, in 2**-16: scale and offset of luma, 16 + 219 y
# / 255, and of chroma, 128 + 224 (c - 128) / 255.
_LIMITED = ((56284, 16 << 16), (57569, (128 << 16) - 128 * 57569))


def crop_to_rgb(
    out: Bytes, planes: Planes, top: int, left: int, *, mirrored: bool, colour: str = "bt601"
) -> None:
    """Write the pixels of a rectangle of a picture to `out`.

    Args:
        out: uint8 [h, w, 3], contiguous; its shape says how large the rectangle is.
        planes: Y, U and V of a 4:2:0 picture, uint8; the bytes of a line lie side by side.
        top, left: the corner of the rectangle, in pixels; odd ones are fine.
        mirrored: left to right, after the cut.
        colour: see `avmae_kernels.yuv.COLOURS`.

    Raises:
        ValueError: an array is not as above, `colour` is unknown or the rectangle is not inside.
    """
    by = _coefficients(colour)
    module = compiled()
    if module is None:
        _require_rgb(out, planes, top, left)
        _crop_to_rgb(out, planes, top, left, mirrored, by)
        return
    try:
        module.crop_to_rgb(out, *planes, top, left, mirrored, by)
    except (TypeError, ValueError):
        # It refuses whatever is not as above; what that is, is only looked for now.
        _require_rgb(out, planes, top, left)
        raise


def crop_to_i420(
    out: Bytes, planes: Planes, top: int, left: int, *, mirrored: bool, full: bool = False
) -> None:
    """Write a rectangle of a picture to `out` as planes, the layout of `avmae_kernels.yuv`.

    Args:
        out: uint8 [3h/2, w], contiguous, h and w even.
        planes, mirrored: as of `crop_to_rgb`.
        top, left: the corner of the rectangle, even.
        full: the planes are of the full range of levels, 0 to 255; `out` is of the limited one.

    Raises:
        ValueError: an argument is not as above, or the rectangle is not inside.
    """
    module = compiled()
    if module is None:
        _require_i420(out, planes, top, left)
        _crop_to_i420(out, planes, top, left, mirrored, full)
        return
    try:
        module.crop_to_i420(out, *planes, top, left, mirrored, full)
    except (TypeError, ValueError):
        _require_i420(out, planes, top, left)
        raise


@cache
def _coefficients(colour: str) -> tuple[int, ...]:
    return coefficients(colour)


def _crop_to_rgb(
    out: Bytes, planes: Planes, top: int, left: int, mirrored: bool, by: tuple[int, ...]
) -> None:
    height, width, _ = out.shape
    black, of_y, v_red, u_green, v_green, u_blue = by
    y, *chroma = planes
    luma = (y[top : top + height, left : left + width].astype(np.int32) - black) * of_y + (1 << 15)
    rows, columns = (
        slice(top // 2, (top + height + 1) // 2),
        slice(left // 2, (left + width + 1) // 2),
    )
    u, v = (plane[rows, columns].astype(np.int32) - 128 for plane in chroma)
    target = out[:, ::-1] if mirrored else out
    for channel, term in enumerate((v * v_red, u * u_green + v * v_green, u * u_blue)):
        repeated = term.repeat(2, axis=0).repeat(2, axis=1)[top % 2 :, left % 2 :]
        scaled = (luma + repeated[:height, :width]) >> 16
        target[..., channel] = scaled.clip(0, 255)


def _crop_to_i420(
    out: Bytes, planes: Planes, top: int, left: int, mirrored: bool, full: bool
) -> None:
    luma, width = out.shape[0] // 3 * 2, out.shape[1]
    flat = out[luma:].reshape(2, luma // 2, width // 2)
    for target, plane, unit in zip((out[:luma], *flat), planes, (1, 2, 2), strict=True):
        rows, columns = target.shape
        part = plane[top // unit :, left // unit :][:rows, :columns]
        if full:
            scale, offset = _LIMITED[unit - 1]
            part = ((part * np.int32(scale) + (offset + (1 << 15))) >> 16).astype(np.uint8)
        target[...] = part[:, ::-1] if mirrored else part


def _require_rgb(out: Bytes, planes: Planes, top: int, left: int) -> None:
    _require_planes("crop_to_rgb", planes)
    if out.ndim != 3 or out.shape[2] != 3 or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise _wanted("crop_to_rgb", "out as contiguous uint8 [h, w, 3]", out)
    _require_inside("crop_to_rgb", planes[0], top, left, *out.shape[:2])


def _require_i420(out: Bytes, planes: Planes, top: int, left: int) -> None:
    _require_planes("crop_to_i420", planes)
    good = out.ndim == 2 and out.shape[0] % 3 == 0 and out.shape[1] % 2 == 0
    if not good or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise _wanted("crop_to_i420", "out as contiguous uint8 [3h/2, w], h and w even", out)
    if top % 2 or left % 2:
        raise ValueError(f"crop_to_i420 wants top and left even, got {top} and {left}")
    _require_inside("crop_to_i420", planes[0], top, left, out.shape[0] // 3 * 2, out.shape[1])


def _require_planes(op: str, planes: Planes) -> None:
    y, u, v = planes
    half = ((y.shape[0] + 1) // 2, (y.shape[1] + 1) // 2) if y.ndim == 2 else ()
    good = y.ndim == 2 and u.shape == v.shape == half
    for plane in planes:
        good = good and plane.dtype == np.uint8 and (plane.strides[1] == 1 or plane.shape[1] == 1)
    if not good:
        raise _wanted(op, "uint8 planes Y [H, W], U and V of half the sides, rounded up", *planes)


def _require_inside(op: str, y: Bytes, top: int, left: int, height: int, width: int) -> None:
    if not (0 <= top <= y.shape[0] - height and 0 <= left <= y.shape[1] - width):
        raise ValueError(
            f"{op}: {height} x {width} pixels from ({top}, {left}) on are not inside a picture of "
            f"{y.shape[0]} x {y.shape[1]}"
        )


def _wanted(op: str, what: str, *arrays: Bytes) -> ValueError:
    got = ", ".join(f"{array.dtype} {list(array.shape)}" for array in arrays)
    return ValueError(f"{op} wants {what}; got {got}")
