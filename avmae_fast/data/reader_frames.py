"""The reader of clips kept as picture files and a sound file, as CAV-MAE's preparation leaves them.

Picture number k, in the order of the numbers in the names, is on display from k / fps seconds on.
"""

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import av
import numpy as np
from av.codec.context import ThreadType
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from avmae_fast.data.clip import (
    TIME_TOLERANCE_S,
    ClipError,
    ClipInfo,
    Picture,
    Pixels,
    Placed,
    Size,
    check_times,
    placed,
    stacked,
)
from avmae_fast.data.manifest import FramesRecord
from avmae_fast.data.pictures import picture_of
from avmae_fast.data.pyav_guard import Guard, frames_of
from avmae_fast.data.reader_pyav import PyavReader


class FramesReader:
    """One clip of picture files; see `ClipReader`."""

    def __init__(self, record: FramesRecord, pixels: Pixels = "rgb") -> None:
        self._guard = Guard(record.path)
        self._pixels = pixels
        self._reformatter = VideoReformatter()
        self._fps = record.fps
        self._files = picture_files(record.path)
        if not self._files:
            raise ClipError("open", record.path, "no picture file has such a name")
        first = self._frame(self._files[0])
        self._sound = PyavReader(record.sound) if record.sound is not None else None
        self.info = ClipInfo(
            duration_s=len(self._files) / record.fps,
            height=first.height,
            width=first.width,
            fps=record.fps,
            video_codec="pictures",
            audio_rate_hz=self._sound.info.audio_rate_hz if self._sound else 0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._sound is not None:
            self._sound.close()

    def read_video(self, times_s: NDArray[np.float64], size: Size) -> NDArray[np.uint8]:
        """The pictures on display at `times_s`, as one array; see `ClipReader`."""
        return stacked(self.read_pictures(times_s, size), len(times_s))

    def read_pictures(self, times_s: NDArray[np.float64], size: Size) -> Iterator[Placed]:
        """The pictures on display at `times_s`, as they are decoded; see `ClipReader`."""
        check_times(times_s)
        numbers = np.floor((times_s + TIME_TOLERANCE_S) * self._fps).astype(np.int64)
        wanted, shown = np.unique(np.minimum(numbers, len(self._files) - 1), return_inverse=True)
        pictures = [self._picture(self._files[number], size) for number in wanted]
        if len({picture.shape for picture in pictures}) > 1:
            raise ClipError("decode", self._guard.path, "the picture size changes in the clip")
        return placed(pictures, shown)

    def read_audio(self, start: int, samples: int) -> NDArray[np.int16]:
        """16 kHz samples from number `start` of the clip's clock on; see `ClipReader`."""
        if self._sound is None:
            raise ClipError("no_audio", self._guard.path, "no sound file is given")
        return self._sound.read_audio(start, samples)

    def _picture(self, file: Path, size: Size) -> Picture:
        frame = self._frame(file)
        with self._guard.errors("decode"):
            # Upright: cameras write which way up a picture is beside it.
            return picture_of(frame, self._reformatter, size, self._pixels)

    def _frame(self, file: Path) -> VideoFrame:
        # Bytes, because FFmpeg takes a name with numbers in it for the pattern of a sequence.
        with self._guard.errors("decode"), file.open("rb") as data:
            with av.open(data, "r") as container:
                stream = container.streams.video[0]
                context = stream.codec_context
                context.thread_type, context.thread_count = ThreadType.NONE, 1
                for frame in frames_of(container, stream):
                    if frame.is_corrupt:
                        break
                    return frame
        raise ClipError("decode", self._guard.path, f"{file.name} is damaged")


def picture_files(pattern: Path) -> list[Path]:
    """The files that a pattern with * stands for, in the order of the numbers in their names."""
    # Only * is a sign of the pattern: names may hold brackets and question marks.
    escaped = glob.escape(str(pattern)).replace("[*]", "*")
    return sorted(map(Path, glob.glob(escaped)), key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key by which frame_2 comes before frame_10."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
