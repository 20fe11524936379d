"""Feed damaged media files to the reader, as a data set gathered from the web does.

Each file is a good clip of one of seven formats, damaged in one of nine ways, as its number says.
It is read as a training sample is, in a worker under the watchdog. Counted are the files that read,
those that fail with a `ClipError` (by kind), those whose error is of another type (`untyped`), and
those that end or stop the process that reads them. `python -m benchmarks.fuzz_media --count 10000
--json FILE`.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from avmae_fast.data.clip import ClipError, ErrorKind
from avmae_fast.data.readers import open_clip, resolve_reader
from avmae_fast.data.workers import Watch, open_pool
from benchmarks import harness

# Container, video codec, sound codec, frames a group of pictures.
FORMATS: tuple[tuple[str, str, str, int], ...] = (
    ("mp4", "libx264", "aac", 250),
    ("mp4", "libx264", "aac", 8),
    ("mov", "libx264", "pcm_s16le", 12),
    ("mkv", "mpeg4", "libmp3lame", 12),
    ("webm", "libvpx-vp9", "libopus", 30),
    ("avi", "mpeg4", "libmp3lame", 12),
    ("ts", "libx264", "aac", 12),
)
_FRAMES, _FPS, _HEIGHT, _WIDTH, _RATE_HZ = 30, 25, 48, 64, 48_000


def flip_bits(data: bytearray, rng: np.random.Generator, count: int) -> None:
    for at in rng.integers(len(data), size=count):
        data[at] ^= 1 << int(rng.integers(8))


def noise(data: bytearray, rng: np.random.Generator) -> None:
    first, last = _stretch(data, rng)
    data[first:last] = rng.bytes(last - first)


def zeros(data: bytearray, rng: np.random.Generator) -> None:
    first, last = _stretch(data, rng)
    data[first:last] = bytes(last - first)


def cut_end(data: bytearray, rng: np.random.Generator) -> None:
    del data[int(rng.integers(len(data))) :]


def cut_out(data: bytearray, rng: np.random.Generator) -> None:
    first, last = _stretch(data, rng)
    del data[first:last]


def repeat(data: bytearray, rng: np.random.Generator) -> None:
    first, last = _stretch(data, rng)
    data[last:last] = data[first:last]


def large_words(data: bytearray, rng: np.random.Generator) -> None:
    """Sizes and counts in headers are 32-bit words: make some of them huge."""
    for at in rng.integers(max(len(data) - 4, 1), size=4):
        data[at : at + 4] = b"\x7f\xff\xff\xff"


def header(data: bytearray, rng: np.random.Generator) -> None:
    start = bytearray(data[:600])
    flip_bits(start, rng, 8)
    data[:600] = start


def _stretch(data: bytearray, rng: np.random.Generator) -> tuple[int, int]:
    first = int(rng.integers(len(data)))
    return first, min(len(data), first + 1 + int(rng.integers(max(len(data) // 4, 1))))


DAMAGES: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (
    lambda data, rng: flip_bits(data, rng, 1),
    lambda data, rng: flip_bits(data, rng, max(1, len(data) // 1000)),
    noise,
    zeros,
    cut_end,
    cut_out,
    repeat,
    large_words,
    header,
)


def damaged(originals: list[bytes], number: int) -> bytes:
    """File `number`: always the same original, damaged in the same way."""
    rng = np.random.default_rng([2718, number])
    data = bytearray(originals[number % len(originals)])
    DAMAGES[number // len(originals) % len(DAMAGES)](data, rng)
    return bytes(data)


def write_original(path: Path, video_codec: str, sound_codec: str, gop: int) -> Path:
    """A short clip with moving pictures and a tone."""
    # Without the flag Matroska files get a random number of their own.
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        video: Any = container.add_stream(video_codec, rate=_FPS)
        video.width, video.height, video.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        video.codec_context.gop_size = gop
        video.codec_context.thread_count = 1
        audio: Any = container.add_stream(sound_codec, rate=_RATE_HZ, layout="mono")
        y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH]
        for i in range(_FRAMES):
            picture = np.stack([4 * x + 5 * i, 5 * y + 3 * i, x + y + 9 * i], -1).astype(np.uint8)
            frame: Any = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, _FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        t = np.arange(_RATE_HZ * _FRAMES // _FPS)
        tone = (8000 * np.sin(2 * np.pi * 440 / _RATE_HZ * t)).astype(np.int16)
        resampler = av.AudioResampler(
            format=audio.codec_context.format.name, rate=_RATE_HZ, frame_size=audio.frame_size or 0
        )
        sound = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        sound.sample_rate, sound.pts = _RATE_HZ, 0
        for block in [*resampler.resample(sound), *resampler.resample(None)]:
            container.mux(audio.encode(block))
        container.mux(audio.encode(None))
    return path


def write_originals(folder: Path) -> list[bytes]:
    """One good clip of each of `FORMATS`."""
    return [
        write_original(folder / f"{i}.{suffix}", video, sound, gop).read_bytes()
        for i, (suffix, video, sound, gop) in enumerate(FORMATS)
    ]


class Damaged(NamedTuple):
    number: int


class FuzzJob:
    """Reads damaged files as a loader does; see `avmae_fast.data.workers.Job`."""

    def __init__(self, folder: Path, originals: list[bytes], reader: str) -> None:
        self._folder = folder
        self._originals = originals
        self._reader = reader
        self._excluded: dict[int, ErrorKind] = {}

    def exclude(self, record: int, kind: ErrorKind, detail: str) -> None:
        self._excluded[record] = kind

    def path(self, record: int) -> Path:
        return self._folder / f"{record}.{FORMATS[record % len(FORMATS)][0]}"

    def run(self, task: Damaged, watch: Watch) -> str:
        if task.number in self._excluded:
            return self._excluded[task.number]
        path = self.path(task.number)
        path.write_bytes(damaged(self._originals, task.number))
        try:
            with watch(task.number):
                return self._read(path, np.random.default_rng([3141, task.number]))
        finally:
            path.unlink()

    def _read(self, path: Path, rng: np.random.Generator) -> str:
        first = int(rng.integers(12))
        try:
            with open_clip(path, self._reader) as clip:
                clip.read_video((first + 4 * np.arange(4)) / _FPS, 32)
                clip.read_audio(640 * first, 8000)
        except ClipError as error:
            return error.kind
        except Exception as error:
            return f"untyped: {type(error).__name__}: {error}"[:200]
        return "ok"


def fuzz(count: int, reader: str, timeout_s: float, workers: int = 1) -> dict[str, Any]:
    """What became of `count` damaged files."""
    with tempfile.TemporaryDirectory(prefix="avmae_fast-fuzz-") as name:
        folder = Path(name)
        job = FuzzJob(folder, write_originals(folder), resolve_reader(reader))
        pool = open_pool(job, workers, timeout_s)
        outcomes: Counter[str] = Counter()
        tasks = map(Damaged, range(count))
        began_s = time.perf_counter()
        try:
            for task in islice(tasks, 4 * max(workers, 1)):
                pool.submit(task)
            while outcomes.total() < count:
                for _, outcome in pool.wait():
                    outcomes[outcome or "cancelled"] += 1
                    for task in islice(tasks, 1):
                        pool.submit(task)
            seconds = time.perf_counter() - began_s
        finally:
            pool.close()
    return _summary(outcomes, seconds, reader, timeout_s)


def _summary(
    outcomes: Counter[str], seconds: float, reader: str, timeout_s: float
) -> dict[str, Any]:
    untyped = {name: n for name, n in outcomes.items() if name.startswith("untyped")}
    kinds = {name: n for name, n in sorted(outcomes.items()) if name not in untyped}
    return {
        "files": outcomes.total(),
        "formats": len(FORMATS),
        "damages": len(DAMAGES),
        "reader": reader,
        "timeout_s": timeout_s,
        "ok": kinds.pop("ok", 0),
        "hangs": kinds.pop("timeout", 0),
        "crashes": kinds.pop("crash", 0),
        "untyped": sum(untyped.values()),
        "untyped_errors": untyped,
        "failed": kinds,
        "ms_per_file": 1e3 * seconds / outcomes.total(),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.count < 1:
        raise harness.BenchmarkError(f"--count wants 1 or more, got {args.count}")
    return fuzz(args.count, args.reader, args.timeout_s, args.workers)


def main(argv: list[str] | None = None) -> int:
    options = harness.parser((__doc__ or "").partition("\n")[0])
    options.add_argument("--count", type=int, default=10_000, help="files (default 10000)")
    options.add_argument("--reader", default="pyav", help="pyav (default), torchcodec or decord")
    options.add_argument("--timeout-s", type=float, default=20.0, help="of the watchdog (20)")
    options.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    return harness.run(options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
