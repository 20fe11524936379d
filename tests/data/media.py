"""Small real media files for the tests, written through PyAV.

Every picture carries its frame number as a row of black and white squares, so a test can tell
which frame it got after any codec, resize or rotation that keeps the squares apart.
"""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 8
_TIME_BASE = Fraction(1, 12800)


def picture(index: int, height: int, width: int) -> np.ndarray:
    """An RGB picture [height, width, 3] that shows `index` in its upper half."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack(
        [
            60 + 130 * x // max(width - 1, 1),
            60 + 130 * y // max(height - 1, 1),
            128 + 60 * np.sin((x + 3 * index) / 9.0),
        ],
        axis=-1,
    ).astype(np.uint8)
    for bit, (left, right) in enumerate(_squares(width)):
        image[: height // 2, left:right] = 255 if index >> bit & 1 else 0
    return image


def shown_index(image: np.ndarray) -> int:
    """The frame number that a picture of `picture` shows."""
    height, width = image.shape[:2]
    upper = image[height // 8 : 3 * height // 8].astype(float).mean(axis=(0, 2))
    inner = [(left + right) // 2 for left, right in _squares(width)]
    return sum(int(upper[x] > 128) << bit for bit, x in enumerate(inner))


def _squares(width: int) -> list[tuple[int, int]]:
    edges = [round(i * width / BITS) for i in range(BITS + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def tone(seconds: float, rate: int, hz: float = 440.0) -> np.ndarray:
    """A sine of half the full scale, float32 [samples]."""
    t = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hz * t)).astype(np.float32)


def write_clip(
    path: Path,
    *,
    frames: int = 50,
    fps: int = 25,
    size: tuple[int, int] = (80, 112),
    gop: int = 250,
    times_s: Sequence[float] | None = None,
    pictures: Sequence[np.ndarray] | None = None,
    sound: np.ndarray | None = None,
    rate: int = 16000,
    channels: int = 1,
    sound_start_s: float = 0.0,
    codec: str = "libx264",
    audio_codec: str = "aac",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    faststart: bool = True,
) -> Path:
    """Write a clip of numbered pictures with `sound` (default: a tone; an empty array: no track).

    `times_s` gives each picture its own presentation time (variable frame rate); `frames=0`
    leaves the video track out. `faststart` puts the index before the media, as on the web.
    """
    times = [i / fps for i in range(frames)] if times_s is None else list(times_s)
    if sound is None:
        sound = tone(max(times, default=1.0) + 1 / fps, rate)
    index_first = faststart and path.suffix in (".mp4", ".mov")
    muxer = {"movflags": "+faststart"} if index_first else {}
    with av.open(str(path), "w", options=muxer) as container:
        if times:
            video = container.add_stream(codec, rate=fps)
            video.width, video.height = size[1], size[0]
            video.pix_fmt = pix_fmt
            video.codec_context.time_base = _TIME_BASE
            video.codec_context.gop_size = gop
            video.codec_context.thread_count = 1
            video.options = {"crf": "18", "threads": "1", **(options or {})}
        if sound.size:
            audio = container.add_stream(
                audio_codec, rate=rate, layout="mono" if channels == 1 else "stereo"
            )
        for i, time_s in enumerate(times):
            image = picture(i, *size) if pictures is None else pictures[i]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
            frame.pts = round(time_s / _TIME_BASE)
            frame.time_base = _TIME_BASE
            container.mux(video.encode(frame))
        if times:
            container.mux(video.encode(None))
        if sound.size:
            for first in range(0, sound.size, 1024):
                block = np.repeat(sound[None, first : first + 1024], channels, axis=0)
                frame = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(block, np.float32),
                    format="fltp",
                    layout="mono" if channels == 1 else "stereo",
                )
                frame.sample_rate = rate
                frame.pts = first + round(sound_start_s * rate)
                frame.time_base = Fraction(1, rate)
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def write_jpeg(path: Path, image: np.ndarray) -> None:
    """Write an RGB picture [H, W, 3] as a JPEG, in a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    context = av.CodecContext.create("mjpeg", "w")
    context.height, context.width = image.shape[:2]
    context.pix_fmt, context.time_base = "yuvj420p", Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuvj420p")
    path.write_bytes(b"".join(bytes(p) for p in [*context.encode(frame), *context.encode(None)]))


def remux(source: Path, target: Path, start_s: float) -> Path:
    """Copy the streams of `source` from `start_s` on without coding: a cut with a lead-in."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        streams = {s.index: new.add_stream_from_template(s) for s in old.streams}
        old.seek(round(start_s * av.time_base))
        for packet in old.demux():
            if packet.dts is None:
                continue
            shift = round(start_s / packet.time_base)
            packet.pts -= shift
            packet.dts -= shift
            packet.stream = streams[packet.stream.index]
            new.mux(packet)
    return target


def rotate(path: Path) -> Path:
    """Set the display matrix of an mp4's first track to a quarter turn clockwise, in place."""
    data = bytearray(path.read_bytes())
    start = data.find(b"tkhd")
    if start < 0:
        raise ValueError(f"{path} has no tkhd box")
    # tkhd, version 0: type 4, flags 4, 9 words of times, ids and volume; then the 3x3 matrix.
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    data[start + 44 : start + 80] = matrix
    path.write_bytes(bytes(data))
    return path


def zero_middle(path: Path, share: float = 0.2) -> Path:
    """Overwrite the middle of a file with zeros, in place."""
    data = bytearray(path.read_bytes())
    first = round(len(data) * (0.5 - share / 2))
    last = round(len(data) * (0.5 + share / 2))
    data[first:last] = bytes(last - first)
    path.write_bytes(bytes(data))
    return path


def truncate(path: Path, share: float = 0.5) -> Path:
    """Keep the first `share` of a file's bytes, in place."""
    data = path.read_bytes()
    path.write_bytes(data[: round(len(data) * share)])
    return path
