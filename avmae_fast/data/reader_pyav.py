"""The default reader, on PyAV: FFmpeg inside the wheel, typed errors, every packet's timestamp.

FFmpeg is kept on one thread throughout, because workers are processes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import av
import numpy as np
from av.audio.stream import AudioStream
from av.codec.context import ThreadType
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from numpy.typing import NDArray

from avmae_fast.data.clip import (
    READ_TIMEOUT_S,
    ClipError,
    ClipInfo,
    Pixels,
    Placed,
    Size,
    stacked,
)
from avmae_fast.data.media import open_source
from avmae_fast.data.pyav_guard import Guard
from avmae_fast.data.pyav_pictures import Pictures
from avmae_fast.data.pyav_sound import Sound

av.logging.set_level(av.logging.PANIC)


class PyavReader:
    """One open file, read through PyAV; see `ClipReader`."""

    def __init__(self, path: Path, pixels: Pixels = "rgb") -> None:
        self._pixels = pixels
        self._guard = Guard(path)
        self._open()

    def _open(self) -> None:
        with self._guard.errors("open"):
            self._container = av.open(
                open_source(self._guard.path),
                "r",
                metadata_errors="replace",  # tags need not be valid UTF-8
                timeout=READ_TIMEOUT_S,
            )
        try:
            with self._guard.errors("open"):
                self._open_streams()
        except BaseException:
            self.close()
            raise

    def _open_streams(self) -> None:
        container, path = self._container, self._guard.path
        # The cover of an album is a video stream to FFmpeg.
        videos = [
            s for s in container.streams.video if Disposition.attached_pic not in s.disposition
        ]
        video = videos[0] if videos else None
        audio = container.streams.audio[0] if container.streams.audio else None
        clock = video or audio
        if clock is None:
            raise ClipError("no_video", path, "neither a video nor an audio track")
        for stream in container.streams:
            if isinstance(stream, VideoStream | AudioStream):
                if stream.codec_context is None:
                    raise ClipError("decode", path, f"no decoder for its {stream.type} track")
                stream.codec_context.thread_type = ThreadType.NONE
                stream.codec_context.thread_count = 1
        assert clock.time_base is not None
        zero_s = float((clock.start_time or 0) * clock.time_base)
        end_s = _promised_end_s(container, clock, zero_s)
        if end_s is None:
            raise ClipError("decode", path, "the header gives no duration")
        self.info = ClipInfo(
            duration_s=end_s,
            height=video.height if video else 0,
            width=video.width if video else 0,
            fps=float(video.average_rate or 0) if video else 0.0,
            video_codec=video.codec_context.codec.canonical_name if video else "",
            audio_rate_hz=audio.rate if audio else 0,
        )
        self._heard = False
        self._pictures = None
        if video:
            self._pictures = Pictures(self._guard, container, video, zero_s, end_s, self._pixels)
        if audio:
            audio_end_s = _promised_end_s(container, audio, zero_s)
            self._sound = Sound(self._guard, container, audio, zero_s, audio_end_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._container.close()

    def read_video(self, times_s: NDArray[np.float64], size: Size) -> NDArray[np.uint8]:
        """The pictures on display at `times_s`, as one array; see `ClipReader`."""
        return stacked(self.read_pictures(times_s, size), len(times_s))

    def read_pictures(self, times_s: NDArray[np.float64], size: Size) -> Iterator[Placed]:
        """The pictures on display at `times_s`, as they are decoded; see `ClipReader`."""
        if self._pictures is None:
            raise ClipError("no_video", self._guard.path, "there is no video track")
        return self._pictures.read(times_s, size)

    def read_audio(self, start: int, samples: int) -> NDArray[np.int16]:
        """16 kHz samples from number `start` of the clip's clock on; see `ClipReader`."""
        if not self.info.has_audio:
            raise ClipError("no_audio", self._guard.path, "there is no audio track")
        if self._heard:
            # A decoder keeps some state over a seek (AAC: its noise generator), so that only a
            # fresh one gives every read the same samples.
            self.close()
            self._open()
        self._heard = True
        return self._sound.read(start, samples)


def _promised_end_s(
    container: InputContainer, stream: VideoStream | AudioStream, zero_s: float
) -> float | None:
    """Where the header says that a stream ends, on the clock that starts at `zero_s`."""
    assert stream.time_base is not None
    if stream.duration:
        end = (stream.start_time or 0) + stream.duration
        return float(end * stream.time_base) - zero_s
    # Matroska keeps the length of a track in a tag; the container's is the longest track's.
    clock = stream.metadata.get("DURATION", "").split(":")
    if len(clock) == 3:
        hours, minutes, seconds = map(float, clock)
        return 3600 * hours + 60 * minutes + seconds - zero_s
    return container.duration / av.time_base if container.duration else None
