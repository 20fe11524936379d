"""Decode the pictures of a packed clip from bytes whose bounds are known."""

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType

import av
import numpy as np
from av.codec.context import Flags, ThreadType
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from numpy.typing import NDArray

av.logging.set_level(av.logging.PANIC)

# Open decoders that the next clip can use, the longest unused first. There is one for each picture
# size, and each keeps the memory of some pictures.
_DECODERS: dict[bytes, VideoCodecContext] = {}
_MOST_DECODERS = 8


def h264_pictures(
    coded: Sequence[tuple[int, bytes]], decoder: bytes
) -> Iterator[tuple[int, VideoFrame]]:
    """(number, frame) of each of the coded pictures, given as (number, bytes) in coding order.

    The first one must be a keyframe, and none shown in another order than it is coded in.
    """
    context = _DECODERS.pop(decoder, None) or _h264_decoder(decoder)
    for number, data in coded:
        packet = av.Packet(data)
        packet.pts = number
        for frame in context.decode(packet):
            yield frame.pts, frame  # type: ignore[misc]
    # One that has met damage, or was not asked for all, never comes here and is not used again.
    context.flush_buffers()
    _DECODERS[decoder] = context
    if len(_DECODERS) > _MOST_DECODERS:
        _DECODERS.pop(next(iter(_DECODERS)))


def _h264_decoder(extradata: bytes) -> VideoCodecContext:
    context = av.CodecContext.create("h264", "r")
    assert isinstance(context, VideoCodecContext)
    context.extradata = extradata
    context.thread_type, context.thread_count = ThreadType.NONE, 1
    # Frames come out as they are decoded; without it a decoder may hold one back.
    context.flags |= Flags.low_delay
    return context


def jpeg_rgb(data: bytes) -> NDArray[np.uint8]:
    """A JPEG of any kind as RGB, uint8 [H, W, 3]. Raises ValueError where it is damaged.

    Chroma is repeated, not interpolated, as FFmpeg does for video.
    """
    simplejpeg = _simplejpeg()
    if simplejpeg is None:
        return jpeg_frame(data).to_ndarray(format="rgb24").view(np.uint8)
    picture: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True)
    return picture


def jpeg_frame(data: bytes) -> VideoFrame:
    """A JPEG as FFmpeg decodes it. Raises ValueError where it is damaged."""
    (frame,) = _jpeg_decoder().decode(av.Packet(data))
    return frame


@cache
def _simplejpeg() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:
        log = logging.getLogger(__name__)
        log.warning("JPEGs are decoded by FFmpeg, more slowly: pip install simplejpeg")
        return None
    return simplejpeg


@cache
def _jpeg_decoder() -> VideoCodecContext:
    context = av.CodecContext.create("mjpeg", "r")
    assert isinstance(context, VideoCodecContext)
    context.thread_type, context.thread_count = ThreadType.NONE, 1
    return context
