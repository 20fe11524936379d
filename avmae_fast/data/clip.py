"""What a reader gives back: pictures and sound of one clip on one clock, or a `ClipError`.

The contract of every reader is in seconds, never in frame numbers. Zero of the clock is the start
of the video stream (of the sound where there is no video). The picture at time t is the one on
display: the last whose presentation time is not later than t. Sound is mono, 16 kHz, on the same
clock, and zero wherever the track has none.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

AUDIO_RATE_HZ = 16000

# Matroska rounds its timestamps to 1 ms, so the picture due at 2/30 s is stamped 67 ms: a time is
# taken to have reached a picture that is at most this much later.
TIME_TOLERANCE_S = 1e-3

# A stream that ends this much before its header says has been cut off; encoders round by less.
SHORT_TOLERANCE_S = 0.5

# One clip takes tens of milliseconds; a reader that can stop itself gives up after this long.
READ_TIMEOUT_S = 60.0

# A lossy decoder gives other samples after a seek than in one run (AAC fills bands from a running
# noise generator), so sound is decoded from its start for windows that begin before this ...
SOUND_FROM_START_S = 15.0
# ... and for later ones from this much before the window, enough for any codec to settle.
SOUND_PREROLL_S = 1.0

ErrorKind = Literal["open", "no_video", "no_audio", "decode", "short", "timeout", "crash"]
Size = int | tuple[int, int] | None
Pixels = Literal["rgb", "yuv420"]


class ClipError(Exception):
    """A media file cannot be read; nothing else escapes from a reader.

    kind: `open` (missing, not a media file, damaged header), `no_video`, `no_audio`, `decode`
        (damaged content), `short` (ends before its header says or before the clip starts),
        `timeout` (the reader does not come back), `crash` (it ends the process that reads).
    """

    def __init__(self, kind: ErrorKind, path: Path | str, detail: str) -> None:
        # All three go to Exception, so that the error survives the way out of a worker process.
        super().__init__(kind, str(path), detail)
        self.kind: ErrorKind = kind
        self.path = str(path)
        self.detail = " ".join(detail.split())[:300]

    def __str__(self) -> str:
        return f"{self.path}: {self.kind}: {self.detail}"


@dataclass(frozen=True)
class ClipInfo:
    """What the header of a file says.

    duration_s: length of the video stream; of the sound where there is no video.
    height, width: of the pictures as stored, before any rotation; 0 where there is no video.
    fps: average rate of the pictures; 0 where there is no video.
    video_codec: FFmpeg's name of it, such as h264; empty where there is no video.
    audio_rate_hz: rate the sound is stored at; 0 where there is none.
    """

    duration_s: float
    height: int
    width: int
    fps: float
    video_codec: str
    audio_rate_hz: int

    @property
    def has_video(self) -> bool:
        return bool(self.video_codec)

    @property
    def has_audio(self) -> bool:
        return self.audio_rate_hz > 0


@dataclass(frozen=True)
class Clip:
    """video: uint8 [N, H, W, 3], RGB; waveform: int16 [S], mono 16 kHz. Empty if not asked for."""

    video: NDArray[np.uint8]
    waveform: NDArray[np.int16]
    info: ClipInfo


class Picture(Protocol):
    """A decoded, upright picture, any part of which can be made: `avmae_fast.data.pictures`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole of it: [H, W, 3], or [3H/2, W] as planes (see `avmae_fast.data.planes`)."""
        ...

    def write(
        self, out: NDArray[np.uint8], top: int = 0, left: int = 0, mirrored: bool = False
    ) -> None:
        """Fill `out` with the part that has this corner, mirrored left to right or not.

        Args:
            out: uint8 [h, w, 3] or, of planes, [3h/2, w]; contiguous.
            top, left: the corner in pixels; even, of planes.
        """
        ...


# A picture, and the places in the list of wanted times at which it is on display.
Placed = tuple[Sequence[int], Picture]


class ClipReader(Protocol):
    """One open file. Readers are not shared between threads or processes."""

    info: ClipInfo

    def read_pictures(self, times_s: NDArray[np.float64], size: Size) -> Iterator[Placed]:
        """The pictures on display at `times_s` (any order, repeats allowed), as they are decoded.

        Every place comes once, in any order, and all pictures have one shape. A picture holds only
        until the next one is asked for.
        """
        ...

    def read_video(self, times_s: NDArray[np.float64], size: Size) -> NDArray[np.uint8]:
        """The same pictures as one array, [N, H, W, 3] or [N, 3H/2, W]."""
        ...

    def read_audio(self, start: int, samples: int) -> NDArray[np.int16]:
        """`samples` samples from sample number `start` of the 16 kHz clock on, int16."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def require_file(path: Path) -> None:
    """Raise `open` unless `path` is a file: opening a pipe would wait for ever."""
    try:
        found, regular = path.exists(), path.is_file()
    except (OSError, ValueError) as error:
        raise ClipError("open", path, str(error)) from error
    if not regular:
        raise ClipError("open", path, "not a regular file" if found else "no such file")


def check_times(times_s: NDArray[np.float64]) -> None:
    """Raise ValueError unless `times_s` is a list of finite times from zero on."""
    if times_s.ndim != 1 or not np.isfinite(times_s).all() or (times_s < 0).any():
        raise ValueError(f"times_s must be a 1-D array of seconds >= 0, got {times_s}")


def stacked(pictures: Iterable[Placed], count: int) -> NDArray[np.uint8]:
    """`count` pictures as one array [N, H, W, 3] or, of planes, [N, 3H/2, W]."""
    video = np.zeros((0, 0, 0, 3), np.uint8)
    for places, picture in pictures:
        if not len(video):
            video = np.empty((count, *picture.shape), np.uint8)
        for at in places:
            picture.write(video[at])
    return video


def placed(pictures: Iterable[Picture], shown: NDArray[np.int64]) -> Iterator[Placed]:
    """Pictures with their places: `shown` says for each place the number of its picture."""
    for number, picture in enumerate(pictures):
        yield np.flatnonzero(shown == number).tolist(), picture


def resized_shape(height: int, width: int, size: Size) -> tuple[int, int]:
    """(height, width) after a resize to `size`: (H, W), a length of the shorter side, or None."""
    if size is None:
        return height, width
    if isinstance(size, tuple):
        return size
    # The longer side is rounded down, as by the authors.
    short = min(height, width)
    return height * size // short, width * size // short


def resize(picture: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Resize one RGB picture [H, W, 3] bilinearly (antialiased). Every reader uses this one."""
    height, width = picture.shape[:2]
    shape = resized_shape(height, width, size)
    if shape == (height, width):
        return picture
    # Channels-last strides from the batch dimension on: torch then takes its 8-bit path, uncopied.
    nchw = torch.from_numpy(picture)[None].permute(0, 3, 1, 2)
    out = interpolate(nchw, size=shape, mode="bilinear", antialias=True)
    return out.permute(0, 2, 3, 1)[0].contiguous().numpy()


def to_int16(waveform: NDArray[np.float32]) -> NDArray[np.int16]:
    """Sound in [-1, 1) as 16-bit samples, rounded to the nearest and clipped."""
    return np.clip(np.rint(waveform * 32768.0), -32768, 32767).astype(np.int16)


def place(out: NDArray[Any], at: int, sound: NDArray[Any]) -> None:
    """Write `sound` to `out` from index `at` on, as far as they overlap."""
    first, last = max(at, 0), min(at + sound.size, out.size)
    if first < last:
        out[first:last] = sound[first - at : last - at]


def require_reached(
    path: Path, what: str, wanted_s: float, promised_s: float, end_s: float
) -> None:
    """Raise `short` if a stream ended at `end_s` although its header promised what is wanted.

    Args:
        what: the stream, for the message.
        wanted_s: the last time asked for.
        promised_s: where the header says the stream ends; beyond it nothing is missed.
        end_s: where decoding ended.
    """
    if min(wanted_s, promised_s) - end_s > SHORT_TOLERANCE_S:
        detail = f"the {what} ends at {end_s:.2f} s, its header says {promised_s:.2f} s"
        raise ClipError("short", path, detail)
