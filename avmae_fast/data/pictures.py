"""Pictures as decoders leave them; any part of one is written straight to where it belongs.

Conversion to RGB, crop and mirroring are one pass over the pixels that are wanted, into the batch
(see `avmae_kernels.yuv_crop`). Only what has to be turned or resized first is RGB already.
"""

from dataclasses import dataclass

import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, VideoReformatter
from numpy.typing import NDArray

from avmae_fast.data.clip import Picture, Pixels, Size, resize, resized_shape
from avmae_fast.data.planes import BT601, planes_of, stored_planes
from avmae_kernels.yuv import Colour
from avmae_kernels.yuv_crop import Planes, crop_to_i420, crop_to_rgb

# FFmpeg's number.
_BT709 = 1


@dataclass(frozen=True, eq=False)
class RgbPicture:
    """pixels: uint8 [H, W, 3]."""

    pixels: NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pixels.shape

    def write(
        self, out: NDArray[np.uint8], top: int = 0, left: int = 0, mirrored: bool = False
    ) -> None:
        part = self.pixels[top : top + out.shape[0], left : left + out.shape[1]]
        if mirrored:
            # By torch, whose kernel for channels-last pixels is 15 times as fast as NumPy's copy.
            nchw = torch.from_numpy(part)[None].permute(0, 3, 1, 2)
            part = nchw.flip(3).permute(0, 2, 3, 1)[0].numpy()
        out[...] = part


@dataclass(frozen=True, eq=False)
class YuvPicture:
    """Planes that are written as RGB: the bytes that a GPU would make of them."""

    planes: Planes
    colour: Colour

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.planes[0].shape, 3

    def write(
        self, out: NDArray[np.uint8], top: int = 0, left: int = 0, mirrored: bool = False
    ) -> None:
        crop_to_rgb(out, self.planes, top, left, mirrored=mirrored, colour=self.colour)


@dataclass(frozen=True, eq=False)
class PlanesPicture:
    """Planes of even sides that stay planes; `full`: of the full range until they are written."""

    planes: Planes
    full: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        height, width = self.planes[0].shape
        return height * 3 // 2, width

    def write(
        self, out: NDArray[np.uint8], top: int = 0, left: int = 0, mirrored: bool = False
    ) -> None:
        crop_to_i420(out, self.planes, top, left, mirrored=mirrored, full=self.full)


def picture_of(
    frame: VideoFrame, reformatter: VideoReformatter, size: Size, pixels: Pixels
) -> Picture:
    """A decoded frame, upright and resized to `size`, as it is to be written."""
    if pixels == "yuv420":
        return PlanesPicture(planes_of(frame, reformatter, size))
    shape = (frame.height, frame.width)
    colour = _colour_of(frame)
    if colour is not None and resized_shape(*shape, size) == shape and not frame.rotation:
        return YuvPicture(stored_planes(frame), colour)
    # Left alone, the colour conversion starts a thread on every core.
    converted = reformatter.reformat(frame, format="rgb24", threads=1)
    rgb: NDArray[np.uint8] = converted.to_ndarray().view(np.uint8)
    if frame.rotation:
        rgb = np.ascontiguousarray(np.rot90(rgb, frame.rotation // 90))
    return RgbPicture(resize(rgb, size))


def resized(picture: Picture, size: Size) -> Picture:
    """A picture of pixels at `size`: itself, where it is that already."""
    height, width, _ = picture.shape
    if resized_shape(height, width, size) == (height, width):
        return picture
    pixels = np.empty(picture.shape, np.uint8)
    picture.write(pixels)
    return RgbPicture(resize(pixels, size))


def _colour_of(frame: VideoFrame) -> Colour | None:
    """What a frame's planes mean; None where they are not 4:2:0 in 8 bits, or mean others."""
    name, space, span = frame.format.name, frame.colorspace, frame.color_range
    if name not in ("yuv420p", "yuvj420p") or space not in (*BT601, _BT709):
        return None
    if name == "yuvj420p" or span == ColorRange.JPEG:
        return "bt709-full" if space == _BT709 else "bt601-full"
    return "bt709" if space == _BT709 else "bt601"
