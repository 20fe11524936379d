"""The reader on decord (or decord2, which is imported by the same name), for its pictures only.

Sound comes through PyAV: decord's audio reader leaks and returns garbage for stereo. Pictures are
found by their timestamps and indices clamped to the last one, because decord counts pictures that
do not exist. After a seek in MPEG-TS, in a codec other than H.264 or in a file cut without
re-encoding, indices and pictures do not even agree: such a file is read through PyAV altogether.
"""

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Self

import decord
import numpy as np
from numpy.typing import NDArray

from avmae_fast.data.clip import (
    TIME_TOLERANCE_S,
    ClipError,
    Picture,
    Placed,
    Size,
    check_times,
    placed,
    require_reached,
    resize,
    stacked,
)
from avmae_fast.data.media import open_source
from avmae_fast.data.pictures import RgbPicture
from avmae_fast.data.reader_pyav import PyavReader
from avmae_fast.data.stages import stage

decord.logging.set_level(decord.logging.QUIET)

# Decoded at once: keeps the memory of a long list of large pictures bounded.
_CHUNK = 16


class DecordReader:
    """One open file, its pictures read through decord; see `ClipReader`."""

    def __init__(self, path: Path) -> None:
        _warn_of_old_version()
        self._path = path
        self._pyav = PyavReader(path)
        self.info = self._pyav.info

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._pyav.close()

    def read_video(self, times_s: NDArray[np.float64], size: Size) -> NDArray[np.uint8]:
        """The pictures on display at `times_s`, as one array; see `ClipReader`."""
        return stacked(self.read_pictures(times_s, size), len(times_s))

    def read_pictures(self, times_s: NDArray[np.float64], size: Size) -> Iterator[Placed]:
        """The pictures on display at `times_s`, as they are decoded; see `ClipReader`."""
        check_times(times_s)
        if not self.info.has_video:
            raise ClipError("no_video", self._path, "there is no video track")
        if times_s.size == 0:
            return
        pictures: list[Picture] = []
        try:
            reader = decord.VideoReader(open_source(self._path), num_threads=1)
            shown_s = reader.get_frame_timestamp(np.arange(len(reader)))
            cut = shown_s[0, 0] < -TIME_TOLERANCE_S
            no_index = shown_s[-1, 1] <= shown_s[-1, 0]
            if cut or no_index or self.info.video_codec != "h264":
                _warn_of_misnumbering()
                yield from self._pyav.read_pictures(times_s, size)
                return
            starts_s = shown_s[:, 0] - shown_s[0, 0]
            end_s = float(shown_s[-1, 1] - shown_s[0, 0])
            require_reached(self._path, "video", float(times_s.max()), self.info.duration_s, end_s)
            found = np.searchsorted(starts_s, times_s + TIME_TOLERANCE_S, side="right") - 1
            indices, shown = np.unique(found.clip(0, len(reader) - 1), return_inverse=True)
            for first in range(0, len(indices), _CHUNK):
                batch = reader.get_batch(indices[first : first + _CHUNK]).asnumpy()
                with stage("convert"):
                    pictures += [RgbPicture(resize(picture, size)) for picture in batch]
        except (decord.DECORDError, RuntimeError, IndexError, ValueError, OSError) as error:
            raise ClipError("decode", self._path, str(error)) from error
        yield from placed(pictures, shown)

    def read_audio(self, start: int, samples: int) -> NDArray[np.int16]:
        """16 kHz samples from number `start` of the clip's clock on; see `ClipReader`."""
        return self._pyav.read_audio(start, samples)


@cache
def _warn_of_old_version() -> None:
    if decord.__version__ == "0.6.0":
        logging.getLogger(__name__).warning(
            "decord 0.6.0 can hang for ever on files cut without re-encoding, and leaks memory; "
            "pip uninstall decord, then pip install decord2 (the same import name), or use "
            "reader = 'pyav'"
        )


@cache
def _warn_of_misnumbering() -> None:
    logging.getLogger(__name__).warning(
        "decord misnumbers the pictures of MPEG-TS, of codecs other than H.264 and of files cut "
        "without re-encoding: those are read by pyav"
    )
