"""All clips of a small data set decoded once and kept in memory, shared by the workers.

Every tick of every clip is kept, so a window cut from the cache has the bytes of a window read from
the file. Two exceptions: sound later than SOUND_FROM_START_S in a file may differ in the last bits,
and a file with any damage is left out, where reading single windows would only miss the damaged.
"""

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from avmae_fast.config import ConfigError
from avmae_fast.data.clip import ClipError, ErrorKind, Placed, resized_shape
from avmae_fast.data.manifest import Manifest
from avmae_fast.data.pictures import PlanesPicture, RgbPicture
from avmae_fast.data.planes import views
from avmae_fast.data.samples import FileSource, SampleSpec, open_source
from avmae_fast.data.shared import SharedBlock, aligned, free_memory
from avmae_fast.data.workers import Watch, open_pool

# Clips that wait for a worker while it decodes one.
_TASKS_AHEAD = 2

# The rest is left to the model, the workers and everything else.
_SHARE_OF_FREE_MEMORY = 0.8

# Caches in use in this process: several loaders over the same clips share one.
_CACHES: "weakref.WeakValueDictionary[tuple[object, ...], RamCache]" = weakref.WeakValueDictionary()


@dataclass
class CachedSource:
    """One clip of the cache; see `Source`."""

    video: NDArray[np.uint8]
    waveform: NDArray[np.int16]
    has_audio: bool

    def __post_init__(self) -> None:
        self.ticks = len(self.video)
        self.length = len(self.waveform)

    def pictures(self, ticks: NDArray[np.int64]) -> Iterator[Placed]:
        for place, tick in enumerate(ticks):
            pixels = self.video[tick]
            rgb = pixels.ndim == 3
            yield [place], RgbPicture(pixels) if rgb else PlanesPicture(views(pixels))

    def sound(self, start: int, samples: int) -> NDArray[np.int16]:
        return self.waveform[start : start + samples]


@dataclass(frozen=True)
class _Entry:
    """Where a clip lies in the cache, or why it is not there."""

    offset: int = 0
    video_shape: tuple[int, ...] = (0, 0, 0, 3)
    length: int = 0
    has_audio: bool = False
    error: tuple[ErrorKind, str, str] | None = None


class RamCache:
    """Decoded clips in one block of shared memory, freed with the last process that maps it."""

    def __init__(
        self, manifest: Manifest, spec: SampleSpec, workers: int, timeout_s: float
    ) -> None:
        """Decode every record of `manifest`, in `workers` processes (0: in this one).

        Raises:
            ConfigError: the clips would not fit in the memory that is free.
        """
        sizes = check_fits(manifest, spec)
        ends = np.cumsum(sizes).tolist()
        self._block = SharedBlock("clips", ends[-1])
        job = _WholeClips(manifest, spec, self._block)
        tasks = (
            _Room(record, end - size, size)
            for record, (size, end) in enumerate(zip(sizes, ends, strict=True))
        )
        self._entries = _decode_all(job, tasks, len(manifest), workers, timeout_s)

    def __getitem__(self, index: int) -> CachedSource:
        """The clip of record `index`; raises the ClipError that its decoding raised."""
        entry = self._entries[index]
        if entry.error is not None:
            raise ClipError(*entry.error)
        video, waveform = _arrays(self._block, entry.offset, entry.video_shape, entry.length)
        return CachedSource(video, waveform, entry.has_audio)


def ram_cache(
    manifest: Manifest, split: str, spec: SampleSpec, workers: int, timeout_s: float
) -> RamCache:
    """The cache of the records of a split: one that is in use in this process, or a new one."""
    key = (manifest.source.absolute(), split, spec)
    cache = _CACHES.get(key)
    if cache is None:
        cache = _CACHES[key] = RamCache(manifest, spec, workers, timeout_s)
    return cache


def _arrays(
    block: SharedBlock, offset: int, video_shape: tuple[int, ...], length: int
) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """A clip's pictures, and its sound behind them."""
    video = block.array(np.uint8, video_shape, offset)
    return video, block.array(np.int16, (length,), aligned(offset + video.size))


def check_fits(manifest: Manifest, spec: SampleSpec) -> list[int]:
    """Bytes that each clip takes once it is decoded, 0 for one that cannot be opened.

    Sizes come from the files' headers; the count stops where the limit is passed.

    Raises:
        ConfigError: together they would take too much of the free memory.
    """
    limit = round(_SHARE_OF_FREE_MEMORY * free_memory())
    needed = 0
    sizes = []
    for number, record in enumerate(manifest, start=1):
        size = 0
        try:
            with FileSource(record, spec) as source:
                size = _decoded_bytes(source, spec)
        except ClipError:
            pass
        sizes.append(size)
        needed += size
        if needed > limit:
            raise ConfigError(
                f"data.cache = 'ram' does not fit: {number} of {len(manifest)} clips need "
                f"{needed / 2**30:.1f} GiB, of the free memory {limit / 2**30:.1f} GiB may be "
                "used; use data.cache = 'none', or a smaller data.short_side or data.fps"
            )
    return sizes


def _decoded_bytes(source: FileSource, spec: SampleSpec) -> int:
    video = waveform = 0
    if spec.frames:
        height, width = resized_shape(source.info.height, source.info.width, spec.short_side)
        video = source.ticks * height * width * 3 // (1 if spec.pixels == "rgb" else 2)
    if spec.samples and source.has_audio:
        waveform = source.length * 2
    return aligned(video) + aligned(waveform)


class _Room(NamedTuple):
    """The bytes of the block that are reserved for the clip of a record."""

    record: int
    offset: int
    size: int


class _WholeClips:
    """Decodes records from start to end into a block; see `avmae_fast.data.workers.Job`."""

    def __init__(self, manifest: Manifest, spec: SampleSpec, block: SharedBlock) -> None:
        self._manifest = manifest
        self._spec = spec
        self._block = block
        self._excluded: dict[int, tuple[ErrorKind, str]] = {}

    def exclude(self, record: int, kind: ErrorKind, detail: str) -> None:
        self._excluded[record] = (kind, detail)

    def path(self, record: int) -> Path:
        return self._manifest[record].path

    def run(self, task: _Room, watch: Watch) -> _Entry:
        try:
            if task.record in self._excluded:
                kind, detail = self._excluded[task.record]
                raise ClipError(kind, self.path(task.record), detail)
            with watch(task.record), open_source(self._manifest[task.record], self._spec) as source:
                return self._decode(source, task)
        except ClipError as error:
            return _Entry(error=(error.kind, error.path, error.detail))

    def _decode(self, source: FileSource, room: _Room) -> _Entry:
        length = source.length if self._spec.samples and source.has_audio else 0
        # Without video the ticks still say how long the clip is.
        video, waveform = self._arrays_in(room, (source.ticks, 0, 0, 3), length)
        if self._spec.frames:
            for places, picture in source.pictures(np.arange(source.ticks)):
                if not video.size:
                    shape = (source.ticks, *picture.shape)
                    video, waveform = self._arrays_in(room, shape, length)
                for place in places:
                    picture.write(video[place])
        if length:
            waveform[...] = source.sound(0, length)
        return _Entry(room.offset, video.shape, length, source.has_audio)

    def _arrays_in(
        self, room: _Room, video_shape: tuple[int, ...], length: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
        if aligned(math.prod(video_shape)) + aligned(length * 2) > room.size:
            raise ClipError("decode", self.path(room.record), "the header gives another size")
        return _arrays(self._block, room.offset, video_shape, length)


def _decode_all(
    job: _WholeClips, tasks: Iterator[_Room], count: int, workers: int, timeout_s: float
) -> list[_Entry]:
    """What became of each clip, in the order of the records."""
    entries: dict[int, _Entry] = {}
    pool = open_pool(job, workers, timeout_s)
    progress = tqdm(desc="decoding clips into memory", total=count, unit="clip", disable=None)
    try:
        with progress:
            for task in islice(tasks, _TASKS_AHEAD * max(workers, 1)):
                pool.submit(task)
            while len(entries) < count:
                for task, entry in pool.wait():
                    assert entry is not None  # nothing is cancelled here
                    entries[task.record] = entry
                    progress.update()
                    for following in islice(tasks, 1):
                        pool.submit(following)
    finally:
        pool.close()
    return [entries[record] for record in range(count)]
