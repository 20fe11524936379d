"""Pictures as the decoder leaves them, planes of luma and chroma: half the bytes of RGB.

A picture is uint8 [3H/2, W] with even H and W, laid out as `avmae_kernels.yuv` says, in limited
BT.601 whatever the file is in; the GPU makes RGB of it where patches are gathered.
"""

import numpy as np
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from numpy.typing import NDArray

from avmae_fast.data.clip import Size, resized_shape

Plane = NDArray[np.uint8]

# FFmpeg's numbers: no tag, BT.470BG and SMPTE 170M, which are both BT.601.
_BT601 = (2, 5, 6)


def planes_of(frame: VideoFrame, reformatter: VideoReformatter, size: Size) -> Plane:
    """A decoded frame, upright, resized to `size` with sides rounded down to even lengths.

    swscale resizes the planes bilinearly (antialiased): within a level of `clip.resize` on luma,
    in less than half the time of converting to RGB and resizing that. An odd side that is not
    resized loses its last line.
    """
    rotation = frame.rotation
    sideways = rotation % 180 != 0
    stored = (frame.width, frame.height) if sideways else (frame.height, frame.width)
    wanted = resized_shape(*stored, size)
    height, width = wanted[0] // 2 * 2, wanted[1] // 2 * 2
    scaled = stored if wanted == stored else (height, width)
    if scaled != stored or not _is_limited_bt601(frame):
        # Left alone, it starts a thread on every core.
        frame = reformatter.reformat(
            frame,
            width=scaled[0] if sideways else scaled[1],
            height=scaled[1] if sideways else scaled[0],
            format="yuv420p",
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
    out = np.empty((height * 3 // 2, width), np.uint8)
    for target, plane in zip(views(out), frame.planes, strict=True):
        upright = _upright(plane, rotation)
        target[...] = upright[: target.shape[0], : target.shape[1]]
    return out


def _is_limited_bt601(frame: VideoFrame) -> bool:
    """Whether a frame's planes can be taken as they are; one without tags counts as this."""
    return (
        frame.format.name == "yuv420p"
        and frame.colorspace in _BT601
        and frame.color_range in (ColorRange.UNSPECIFIED, ColorRange.MPEG)
    )


def _upright(plane: VideoPlane, rotation: int) -> Plane:
    """A plane [h, w] without the padding of its lines."""
    lines: Plane = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    stored = lines[: plane.height, : plane.width]
    return np.rot90(stored, rotation // 90) if rotation else stored


def views(planes: Plane) -> tuple[Plane, Plane, Plane]:
    """Y [..., H, W], U and V [..., H/2, W/2] of contiguous pictures [..., 3H/2, W], uncopied."""
    lines, width = planes.shape[-2:]
    height = lines // 3 * 2
    luma, quarter = height * width, height // 2 * (width // 2)
    flat = planes.reshape(*planes.shape[:-2], lines * width)
    shape = (*planes.shape[:-2], height // 2, width // 2)
    u, v = flat[..., luma : luma + quarter], flat[..., luma + quarter :]
    return planes[..., :height, :], u.reshape(shape), v.reshape(shape)


def crop_planes(
    planes: Plane,
    size: tuple[int, int],
    u_top: float | None = None,
    u_left: float | None = None,
    u_flip: float | None = None,
) -> Plane:
    """Crop pictures [N, 3H/2, W] to `size`, as `avmae_fast.data.windows.crop` does RGB.

    Offsets are even, because two lines and two columns share their chroma: uniform over those.

    Raises:
        ValueError: a side of `size` is odd.
    """
    if size[0] % 2 or size[1] % 2:
        raise ValueError(f"planes are cropped to even sides, got {size}")
    count, lines, width = planes.shape
    room_y, room_x = (lines // 3 * 2 - size[0]) // 2, (width - size[1]) // 2
    top = room_y // 2 if u_top is None else int(u_top * (room_y + 1))
    left = room_x // 2 if u_left is None else int(u_left * (room_x + 1))
    out = np.empty((count, size[0] * 3 // 2, size[1]), np.uint8)
    step = 1 if u_flip is None or u_flip >= 0.5 else -1
    for source, target, unit in zip(views(planes), views(out), (2, 1, 1), strict=True):
        height, width = target.shape[1:]
        y, x = top * unit, left * unit
        target[...] = source[:, y : y + height, x : x + width][..., ::step]
    return out
