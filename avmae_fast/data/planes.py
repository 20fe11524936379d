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
from avmae_kernels.yuv_crop import Planes

Plane = NDArray[np.uint8]

# FFmpeg's numbers: no tag, BT.470BG and SMPTE 170M, which are both BT.601.
BT601 = (2, 5, 6)


def planes_of(frame: VideoFrame, reformatter: VideoReformatter, size: Size) -> Planes:
    """Planes of a decoded frame, upright, resized to `size`, sides rounded down to even lengths.

    swscale resizes the planes bilinearly (antialiased): within a level of `clip.resize` on luma,
    in less than half the time of converting to RGB and resizing that. An odd side that is not
    resized loses its last line. Planes that need none of this are the frame's own, uncopied.
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
    y, u, v = stored_planes(frame)
    if rotation:
        y, u, v = (np.ascontiguousarray(np.rot90(p, rotation // 90)) for p in (y, u, v))
    half = slice(0, height // 2), slice(0, width // 2)
    return y[:height, :width], u[half], v[half]


def stored_planes(frame: VideoFrame) -> Planes:
    """Y, U and V of a 4:2:0 frame as it is stored: views, whose lines may be padded."""
    y, u, v = map(_lines, frame.planes)
    return y, u, v


def _is_limited_bt601(frame: VideoFrame) -> bool:
    """Whether a frame's planes can be taken as they are; one without tags counts as this."""
    return (
        frame.format.name == "yuv420p"
        and frame.colorspace in BT601
        and frame.color_range in (ColorRange.UNSPECIFIED, ColorRange.MPEG)
    )


def _lines(plane: VideoPlane) -> Plane:
    shape, strides = (plane.height, plane.width), (plane.line_size, 1)
    return np.ndarray(shape, np.uint8, memoryview(plane), strides=strides)


def views(planes: Plane) -> tuple[Plane, Plane, Plane]:
    """Y [..., H, W], U and V [..., H/2, W/2] of contiguous pictures [..., 3H/2, W], uncopied."""
    lines, width = planes.shape[-2:]
    height = lines // 3 * 2
    luma, quarter = height * width, height // 2 * (width // 2)
    flat = planes.reshape(*planes.shape[:-2], lines * width)
    shape = (*planes.shape[:-2], height // 2, width // 2)
    u, v = flat[..., luma : luma + quarter], flat[..., luma + quarter :]
    return planes[..., :height, :], u.reshape(shape), v.reshape(shape)
