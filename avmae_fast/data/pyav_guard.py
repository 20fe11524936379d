"""PyAV, watched over: errors become `ClipError`, a read has its time, nothing leaks."""

import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from avmae_fast.data import clip
from avmae_fast.data.clip import ClipError, ErrorKind

# PyAV raises more than errors of its own: a damaged header may ask for more memory than there is,
# or give a rate of 1/0.
_ERRORS = (
    av.FFmpegError,
    OSError,
    ValueError,
    RuntimeError,
    IndexError,
    MemoryError,
    ArithmeticError,
)


class Guard:
    """Watches over the reads of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._deadline = 0.0

    @contextmanager
    def errors(self, kind: ErrorKind) -> Iterator[None]:
        """Run a block of FFmpeg calls: errors become a `ClipError` of `kind`, its time counts."""
        self._deadline = time.monotonic() + clip.READ_TIMEOUT_S
        try:
            yield
        except av.error.ExitError as error:
            detail = f"no data for {clip.READ_TIMEOUT_S:.0f} s"
            raise ClipError("timeout", self.path, detail) from error
        except _ERRORS as error:
            raise ClipError(kind, self.path, str(error) or type(error).__name__) from error

    def check_time(self) -> None:
        """Raise `timeout` once the block has taken too long."""
        if time.monotonic() > self._deadline:
            detail = f"still decoding after {clip.READ_TIMEOUT_S:.0f} s"
            raise ClipError("timeout", self.path, detail)


def seek(container: InputContainer, stream: VideoStream | AudioStream, target: int) -> None:
    """Seek to the last keyframe not later than `target`, or to the start of the stream."""
    try:
        container.seek(target, stream=stream)
    except av.error.PermissionError:  # some formats refuse a target before their first packet
        container.seek(max(target, stream.start_time or 0), stream=stream)


def packets_of(container: InputContainer, stream: VideoStream | AudioStream) -> Iterator[Packet]:
    """The packets of a stream from where the container stands.

    PyAV loses some 160 bytes for each of its demuxers that is left before its end without being
    closed, which over millions of clips is hundreds of megabytes.
    """
    demuxer = cast(Generator[Packet, None, None], container.demux(stream))
    with closing(demuxer) as packets:
        yield from packets


def frames_of(container: InputContainer, stream: VideoStream | AudioStream) -> Iterator[Any]:
    """The decoded frames of a stream, likewise."""
    for packet in packets_of(container, stream):
        yield from packet.decode()
