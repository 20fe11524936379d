"""Turn a record of the manifest into one training sample, from its file or from the cache."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from avmae_fast.config import ConfigError, Run
from avmae_fast.data.clip import AUDIO_RATE_HZ, ClipError, Pixels, Placed
from avmae_fast.data.manifest import Record
from avmae_fast.data.order import DRAWS
from avmae_fast.data.readers import open_record, resolve_reader
from avmae_fast.data.stages import stage
from avmae_fast.data.windows import (
    ClipEnd,
    Span,
    centred_sound_start,
    centred_start,
    crop_corner,
    random_start,
    sound_spans,
    sound_start,
    ticks_in,
    waveform_samples,
    window_ticks,
)


@dataclass(frozen=True)
class SampleSpec:
    """What a sample is made of: the part of a run that the data needs.

    frames is 0 without video, samples is 0 without audio.
    """

    frames: int
    crop: tuple[int, int]
    samples: int
    fps: float
    stride: int
    short_side: int
    flip: bool
    clip_end: ClipEnd
    missing_audio: Literal["substitute", "silence"]
    reader: str
    pixels: Pixels = "rgb"

    @classmethod
    def of(cls, config: Run) -> Self:
        """Raises ConfigError where the crop cannot fit or the reader is not installed."""
        video, audio, data = config.model.video, config.model.audio, config.data
        if video is not None and data.short_side < max(video.height, video.width):
            raise ConfigError(
                f"data.short_side = {data.short_side} is not valid: it must be at least the crop, "
                f"video.height x video.width = {video.height} x {video.width}"
            )
        return cls(
            frames=video.frames if video is not None else 0,
            crop=(video.height, video.width) if video is not None else (0, 0),
            samples=waveform_samples(audio.frames) if audio is not None else 0,
            fps=data.fps,
            stride=data.stride,
            short_side=data.short_side,
            flip=data.flip,
            clip_end=data.clip_end,
            missing_audio=data.missing_audio,
            reader=resolve_reader(data.reader, data.pixels),
            pixels=data.pixels,
        )

    @property
    def picture(self) -> tuple[int, ...]:
        """Shape of a picture in a sample: (H, W, 3), or (3H/2, W) as planes."""
        height, width = self.crop
        return (height, width, 3) if self.pixels == "rgb" else (height * 3 // 2, width)


@dataclass(frozen=True)
class Sample:
    """video: uint8 [T, *SampleSpec.picture]; waveform: int16 [S], silent if not has_audio.

    None where they are not asked for.
    """

    video: NDArray[np.uint8] | None
    waveform: NDArray[np.int16] | None
    has_audio: bool


class Source(Protocol):
    """A clip that windows can be cut from: `ticks` pictures and `length` samples of sound."""

    ticks: int
    length: int
    has_audio: bool

    def pictures(self, ticks: NDArray[np.int64]) -> Iterator[Placed]:
        """Pictures at some ticks, resized to the short side: see `ClipReader.read_pictures`."""
        ...

    def sound(self, start: int, samples: int) -> NDArray[np.int16]:
        """Samples from number `start` of the clip on."""
        ...


class FileSource:
    """A record read from its file; a context manager.

    Raises ClipError where the file cannot be opened, lacks a track that the spec asks for, or
    ends before the record starts.
    """

    def __init__(self, record: Record, spec: SampleSpec) -> None:
        self._record = record
        self._spec = spec
        self._reader = open_record(record, spec.reader, spec.pixels)
        try:
            self._check_tracks()
            info = self._reader.info
            end_s = min(record.end_s, info.duration_s)
            if not (math.isfinite(end_s) and end_s > record.start_s):
                detail = f"the clip starts at {record.start_s} s, the file ends at {end_s:.2f} s"
                raise ClipError("short", record.path, detail)
        except BaseException:
            self._reader.close()
            raise
        duration_s = end_s - record.start_s
        self.ticks = ticks_in(duration_s, spec.fps)
        self.length = max(1, round(duration_s * AUDIO_RATE_HZ))
        self.has_audio = info.has_audio
        self.info = info

    def _check_tracks(self) -> None:
        info = self._reader.info
        if self._spec.frames and not info.has_video:
            raise ClipError("no_video", self._record.path, "there is no video track")
        silence = self._spec.missing_audio == "silence"
        if self._spec.samples and not info.has_audio and not silence:
            raise ClipError("no_audio", self._record.path, "there is no audio track")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._reader.close()

    def pictures(self, ticks: NDArray[np.int64]) -> Iterator[Placed]:
        times_s = self._record.start_s + ticks / self._spec.fps
        return self._reader.read_pictures(times_s, self._spec.short_side)

    def sound(self, start: int, samples: int) -> NDArray[np.int16]:
        first = round(self._record.start_s * AUDIO_RATE_HZ)
        return self._reader.read_audio(first + start, samples)


def open_source(record: Record, spec: SampleSpec) -> FileSource:
    """A record, ready to be cut; a context manager. Raises as `FileSource` does."""
    with stage("open"):
        return FileSource(record, spec)


def cut(source: Source, spec: SampleSpec, draws: NDArray[np.float64] | None) -> Sample:
    """One window of a clip: placed by `DRAWS` uniform numbers, or centred where they are None."""
    video = np.empty((1, spec.frames, *spec.picture), np.uint8)
    waveform = np.empty((1, spec.samples), np.int16)
    cut_into(source, spec, None if draws is None else draws[None], video, waveform)
    return Sample(
        video[0] if spec.frames else None, waveform[0] if spec.samples else None, source.has_audio
    )


def cut_into(
    source: Source,
    spec: SampleSpec,
    draws: NDArray[np.float64] | None,
    video: NDArray[np.uint8],
    waveform: NDArray[np.int16],
) -> None:
    """The views of one window of a clip, written where they belong.

    Args:
        draws: [V, DRAWS] uniform numbers; all views begin at the first one's start. None: centred.
        video: uint8 [V, T, *spec.picture], every byte of which is written; T is 0 without video.
        waveform: int16 [V, S], likewise.

    Raises:
        ClipError: what cannot be read; the arrays then hold anything.
    """
    u_start = None if draws is None else float(draws[0, 0])
    extent, stride = spec.frames, spec.stride
    if not extent:  # sound alone: its own length decides where it may start
        extent, stride = math.ceil(spec.samples / AUDIO_RATE_HZ * spec.fps), 1
    if u_start is None:
        start = centred_start(source.ticks, extent, stride)
        first_sample = centred_sound_start(source.length, spec.samples)
    else:
        start = random_start(u_start, source.ticks, extent, stride)
        first_sample = sound_start(start, spec.fps)

    if spec.frames:
        wanted = window_ticks(start, source.ticks, extent, stride, spec.clip_end)
        _crop_into(video, source.pictures(wanted), spec, draws)
    if spec.samples:
        with stage("sound"):
            _hear_into(waveform[0], source, spec, first_sample)
        waveform[1:] = waveform[0]


def _crop_into(
    video: NDArray[np.uint8],
    pictures: Iterator[Placed],
    spec: SampleSpec,
    draws: NDArray[np.float64] | None,
) -> None:
    """Every view of a picture while it is fresh from the decoder, which is still in the cache."""
    drawn = [(None,) * DRAWS] * len(video) if draws is None else draws.tolist()
    with stage("decode"):
        for places, picture in pictures:
            with stage("copy"):
                for out, (_, u_top, u_left, u_flip) in zip(video, drawn, strict=True):
                    top, left = crop_corner(picture.shape, spec.crop, u_top, u_left)
                    mirrored = spec.flip and u_flip is not None and u_flip < 0.5
                    for place in places:
                        picture.write(out[place], top, left, mirrored)


def _hear_into(out: NDArray[np.int16], source: Source, spec: SampleSpec, first_sample: int) -> None:
    covered = 0
    if source.has_audio:
        spans = list(sound_spans(first_sample, out.size, source.length, spec.clip_end))
        fill_sound(out, source, spans)
        covered = spans[-1].target + spans[-1].count
    out[covered:] = 0


def fill_sound(waveform: NDArray[np.int16], source: Source, spans: list[Span]) -> None:
    """Piece the sound together; one read where the pieces lie close to each other."""
    first = min(span.source for span in spans)
    last = max(span.source + span.count for span in spans)
    whole = source.sound(first, last - first) if last - first <= 2 * waveform.size else None
    for span in spans:
        if whole is None:
            piece = source.sound(span.source, span.count)
        else:
            piece = whole[span.source - first :][: span.count]
        waveform[span.target : span.target + span.count] = piece
