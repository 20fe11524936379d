"""One row of a manifest as the records that go into shards: read once, cut, encoded."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from avmae_fast.data.clip import AUDIO_RATE_HZ, ClipError, ClipReader
from avmae_fast.data.manifest import Record
from avmae_fast.data.readers import open_record
from avmae_fast.data.shard_encode import Codec, Packed, encode
from avmae_fast.data.windows import ticks_in

# Pictures between keyframes. A window may start at any picture and those before it, back to its
# keyframe, are decoded too: 8 instead of 16 cost a window 4 pictures less, for a tenth more bytes.
GOP = 8


class PackError(ValueError):
    """Clips cannot be packed as asked; the text says what to do."""


class DiskFullError(PackError):
    """There is no room for the shards."""

    exit_code = 73  # EX_CANTCREAT


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """How clips are stored. Checked on creation; raises PackError.

    codec: h264, or mjpeg: two thirds more bytes with the sound, quicker to decode.
    fps: pictures a second.
    short_side: height or width in pixels, the smaller one.
    crf: of x264; 26 is about as close to the source as JPEGs of quality 90, 20 is finer.
    quality: of JPEGs; 75 is libjpeg's own default.
    clip_seconds: about how long a record is. A longer clip is cut into equal parts.
    """

    codec: Codec = "h264"
    fps: float = 8.0
    short_side: int = 256
    crf: int = 26
    quality: int = 75
    clip_seconds: float = 10.0

    def __post_init__(self) -> None:
        codecs = get_args(Codec)
        _require(self.codec in codecs, "codec", self.codec, "one of " + ", ".join(codecs))
        for name, low, high in (
            ("fps", 1, 120),
            ("short_side", 16, 4096),
            ("crf", 0, 51),
            ("quality", 1, 100),
            ("clip_seconds", 1, 600),
        ):
            value = getattr(self, name)
            _require(low <= value <= high, name, value, f"in {low}..{high}")
        _require(self.short_side % 2 == 0, "short_side", self.short_side, "even (4:2:0 colour)")
        if self.codec == "mjpeg":
            _require_simplejpeg()

    def stored(self) -> dict[str, Any]:
        """What all records of a folder have in common, by name."""
        return {**asdict(self), "gop": GOP}

    def differing(self, found: dict[str, Any]) -> list[str]:
        """`name = there, here` for each of these that `found` has another value of."""
        return [
            f"{name} = {found.get(name)!r} there, {value!r} asked"
            for name, value in self.stored().items()
            if found.get(name) != value
        ]


def _require(ok: bool, name: str, value: object, valid: str) -> None:
    if not ok:
        raise PackError(f"{name} = {value!r} is not valid: it must be {valid}")


def _require_simplejpeg() -> None:
    try:
        import simplejpeg  # noqa: F401
    except ImportError as error:
        raise PackError("codec = 'mjpeg' needs simplejpeg: pip install simplejpeg") from error


@dataclass(frozen=True)
class Segment:
    """A part of a file that becomes one record: from `start_s` to `end_s`, `frames` pictures."""

    start_s: float
    end_s: float
    frames: int


@dataclass(frozen=True)
class Listed:
    """A row of a manifest: its number, its record, and path, labels and split as written there."""

    number: int
    record: Record
    path: str
    labels: tuple[str, ...]
    split: str


def segments(start_s: float, end_s: float, options: PackOptions) -> list[Segment]:
    """Cut a clip into equal parts of about `clip_seconds`, at pictures. Nothing is left over."""
    duration_s = end_s - start_s
    ticks = ticks_in(duration_s, options.fps)
    parts = min(max(1, round(duration_s / options.clip_seconds)), ticks)
    cuts = [round(i * ticks / parts) for i in range(parts + 1)]
    starts = [start_s + cut / options.fps for cut in cuts[:-1]]
    ends = [*starts[1:], end_s]
    counts = np.diff(cuts).tolist()
    return [Segment(*part) for part in zip(starts, ends, counts, strict=True)]


def pack_row(
    row: Listed, options: PackOptions, first: int = 0, limit: int | None = None
) -> Iterator[tuple[int, Segment | None, Packed | ClipError]]:
    """(number, part, encoded record or why there is none) of each part of a row's clip.

    Parts before number `first` are left out, as are those after `limit` parts. Where the file
    cannot be used at all, there is no part.
    """
    record = row.record
    try:
        with open_record(record, "pyav") as reader:
            parts = list(enumerate(_segments_of(record, reader, options)))[first:]
            for number, part in parts[:limit]:
                try:
                    yield number, part, _pack(reader, part, options)
                except ClipError as error:
                    yield number, part, error
    except ClipError as error:
        yield 0, None, error


def count_parts(row: Listed, options: PackOptions) -> int:
    """How many records a row makes; raises ClipError where its file cannot be used."""
    with open_record(row.record, "pyav") as reader:
        return len(_segments_of(row.record, reader, options))


def _segments_of(record: Record, reader: ClipReader, options: PackOptions) -> list[Segment]:
    info = reader.info
    if not info.has_video:
        raise ClipError("no_video", record.path, "there is no video track")
    end_s = min(record.end_s, info.duration_s)
    if not (np.isfinite(end_s) and end_s > record.start_s):
        detail = f"the clip starts at {record.start_s} s, the file ends at {end_s:.2f} s"
        raise ClipError("short", record.path, detail)
    return segments(record.start_s, end_s, options)


def _pack(reader: ClipReader, part: Segment, options: PackOptions) -> Packed:
    times_s = part.start_s + np.arange(part.frames) / options.fps
    pictures = _even(reader.read_video(times_s, options.short_side))
    return encode(
        pictures,
        _sound(reader, part),
        codec=options.codec,
        fps=options.fps,
        gop=GOP,
        crf=options.crf,
        quality=options.quality,
    )


def _even(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Without the last line or column where there is an odd number of them."""
    height, width = pictures.shape[1:3]
    return pictures[:, : height // 2 * 2, : width // 2 * 2]


def _sound(reader: ClipReader, part: Segment) -> NDArray[np.int16] | None:
    if not reader.info.has_audio:
        return None
    first, last = round(part.start_s * AUDIO_RATE_HZ), round(part.end_s * AUDIO_RATE_HZ)
    try:
        return reader.read_audio(first, max(last - first, 1))
    except ClipError as error:
        if error.kind == "no_audio":  # a track without content
            return None
        raise


def describe(row: Listed, part: Segment, packed: Packed, options: PackOptions) -> bytes:
    """The json member: where the record comes from and what it holds, for other programs.

    Its `label` is the only one, null where there is none or several; `labels` lists all.
    """
    fields = {
        "source": row.path,
        "label": row.labels[0] if len(row.labels) == 1 else None,
        "labels": row.labels,
        "split": row.split,
        **asdict(part),
        "fps": options.fps,
        "height": packed.shape[0],
        "width": packed.shape[1],
        "has_audio": packed.sound is not None,
        "audio_rate_hz": AUDIO_RATE_HZ,
    }
    return json.dumps(fields, sort_keys=True).encode() + b"\n"
