"""One record as the bytes that go into a shard: pictures as mp4 or JPEGs, sound as wav.

Equal pictures and options give equal bytes on one machine with one FFmpeg.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from avmae_fast.data.clip import AUDIO_RATE_HZ

Codec = Literal["h264", "mjpeg"]
SUFFIXES: dict[Codec, str] = {"h264": "mp4", "mjpeg": "mjpeg"}

WAV_HEADER_BYTES = 44
_WAV_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")

# fastdecode: CAVLC instead of CABAC, no deblocking. Variance-based quantisation and psychovisual
# decisions spend bits on what an eye likes, and bits are what decoding takes its time for; subme=7
# weighs bits against distortion in every decision, which saves a tenth of them at equal quality.
# Why one thread and no macroblock tree: see synth_encode.
_PRESET = "faster"
_X264 = (
    "subme=7:no-psy=1:aq-mode=0:ref=1:bframes=0:scenecut=0:threads=1:mbtree=0:"
    "keyint={gop}:min-keyint={gop}"
)


@dataclass(frozen=True)
class Packed:
    """video: the member's bytes, of pictures of `shape` (height, width).

    offsets: uint32 [frames + 1], where each coded picture begins and the last one ends.
    decoder: what a decoder has to know before the first picture (H.264: avcC), or nothing.
    sound: a wav file's bytes, None where the clip has no sound.
    """

    video: bytes
    suffix: str
    shape: tuple[int, int]
    offsets: NDArray[np.uint32]
    decoder: bytes
    sound: bytes | None


def encode(
    pictures: NDArray[np.uint8],
    sound: NDArray[np.int16] | None,
    *,
    codec: Codec,
    fps: float,
    gop: int,
    crf: int,
    quality: int,
) -> Packed:
    """Encode pictures uint8 [N, H, W, 3] with even sides, and mono 16 kHz sound int16 [S]."""
    if codec == "h264":
        video, offsets, decoder = _encode_h264(pictures, _rate(fps), gop, crf)
    else:
        video, offsets, decoder = *_encode_mjpeg(pictures, quality), b""
    return Packed(
        video,
        SUFFIXES[codec],
        (pictures.shape[1], pictures.shape[2]),
        offsets,
        decoder,
        None if sound is None else _wav(sound),
    )


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


def _encode_h264(
    pictures: NDArray[np.uint8], rate: Fraction, gop: int, crf: int
) -> tuple[bytes, NDArray[np.uint32], bytes]:
    file = io.BytesIO()
    options = {"preset": _PRESET, "tune": "fastdecode", "crf": str(crf)}
    options["x264-params"] = _X264.format(gop=gop)
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        for frame in _yuv_frames(pictures):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue(), *_packets(file)


def _yuv_frames(pictures: NDArray[np.uint8]) -> Iterator[VideoFrame]:
    to_yuv = VideoReformatter()
    for number, rgb in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        frame = to_yuv.reformat(frame, format="yuv420p", threads=1)
        frame.pts = number
        yield frame


def _packets(file: io.BytesIO) -> tuple[NDArray[np.uint32], bytes]:
    """Where the coded pictures of an mp4 file lie, and its avcC."""
    file.seek(0)
    with av.open(file, "r", format="mp4") as container:
        (stream,) = container.streams.video
        packets = [packet for packet in container.demux(stream) if packet.size]
        decoder = stream.codec_context.extradata or b""
    starts = [packet.pos or 0 for packet in packets]
    ends = [start + packet.size for start, packet in zip(starts, packets, strict=True)]
    # The muxer writes what it gets one after another; the offsets of a record rely on it.
    assert starts[0] and ends[:-1] == starts[1:]
    return np.array([*starts, ends[-1]], np.uint32), bytes(decoder)


def _encode_mjpeg(pictures: NDArray[np.uint8], quality: int) -> tuple[bytes, NDArray[np.uint32]]:
    import simplejpeg

    jpegs = [
        simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality, colorsubsampling="420")
        for rgb in pictures
    ]
    ends = np.cumsum([0, *(len(jpeg) for jpeg in jpegs)])
    return b"".join(jpegs), ends.astype(np.uint32)


def _wav(sound: NDArray[np.int16]) -> bytes:
    data = sound.astype("<i2").tobytes()
    rate, riff = AUDIO_RATE_HZ, WAV_HEADER_BYTES - 8 + len(data)
    form = (b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)  # PCM, mono, 16 bits
    return _WAV_HEADER.pack(b"RIFF", riff, b"WAVE", *form, b"data", len(data)) + data
