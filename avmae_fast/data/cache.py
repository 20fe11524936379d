"""All clips of a small data set decoded once and kept in memory, shared by the workers.

Every tick of every clip is kept, so a window cut from the cache has the bytes of a window read from
the file. Two exceptions: sound later than SOUND_FROM_START_S in a file may differ in the last bits,
and a file with any damage is left out, where reading single windows would only miss the damaged.
"""

import mmap
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from avmae_fast.config import ConfigError
from avmae_fast.data.clip import ClipError, ErrorKind, resized_shape
from avmae_fast.data.manifest import Manifest
from avmae_fast.data.samples import FileSource, SampleSpec
from avmae_fast.data.workers import Feed, worker_options

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

    def pictures(self, ticks: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.video[ticks]

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
    """Decoded clips in one block of anonymous memory, freed with the last process that maps it."""

    def __init__(self, manifest: Manifest, spec: SampleSpec, workers: int) -> None:
        """Decode every record of `manifest`, in `workers` processes (0: in this one).

        Raises:
            ConfigError: the clips would not fit in the memory that is free.
        """
        check_fits(manifest, spec)
        self._file = os.memfd_create("avmae_fast clips")
        weakref.finalize(self, os.close, self._file)
        self._entries: list[_Entry] = []
        size = 0
        progress = tqdm(
            _decode_all(manifest, spec, workers),
            desc="decoding clips into memory",
            total=len(manifest),
            unit="clip",
            disable=None,
        )
        for decoded in progress:
            if isinstance(decoded, ClipError):
                self._entries.append(_Entry(error=(decoded.kind, decoded.path, decoded.detail)))
                continue
            video, waveform = decoded.video, decoded.waveform
            entry = _Entry(size, video.shape, len(waveform), decoded.has_audio)
            self._entries.append(entry)
            size = _append(self._file, size, video)
            size = _append(self._file, size, waveform)
        self._size = max(size, 1)
        os.ftruncate(self._file, self._size)

    def __getstate__(self) -> dict[str, Any]:
        # Works while a worker process is being started, which is when it is needed.
        return {"file": DupFd(self._file), "entries": self._entries, "size": self._size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._file = state["file"].detach()
        self._entries, self._size = state["entries"], state["size"]

    @cached_property
    def _memory(self) -> mmap.mmap:
        return mmap.mmap(self._file, self._size, access=mmap.ACCESS_READ)

    def __getitem__(self, index: int) -> CachedSource:
        """The clip of record `index`; raises the ClipError that its decoding raised."""
        entry = self._entries[index]
        if entry.error is not None:
            raise ClipError(*entry.error)
        count = int(np.prod(entry.video_shape))
        video = np.frombuffer(self._memory, np.uint8, count, entry.offset)
        at = _aligned(entry.offset + count)
        waveform = np.frombuffer(self._memory, np.int16, entry.length, at)
        return CachedSource(video.reshape(entry.video_shape), waveform, entry.has_audio)


def ram_cache(manifest: Manifest, split: str, spec: SampleSpec, workers: int) -> RamCache:
    """The cache of the records of a split: one that is in use in this process, or a new one."""
    key = (manifest.source.absolute(), split, spec)
    cache = _CACHES.get(key)
    if cache is None:
        cache = _CACHES[key] = RamCache(manifest, spec, workers)
    return cache


def _aligned(offset: int) -> int:
    return -(-offset // 64) * 64


def _append(file: int, offset: int, array: NDArray[Any]) -> int:
    """Write an array at an aligned offset; returns where the next one goes."""
    view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    written = 0
    while written < len(view):
        written += os.pwrite(file, view[written:], offset + written)
    return _aligned(offset + len(view))


def check_fits(manifest: Manifest, spec: SampleSpec) -> None:
    """Raise ConfigError if the decoded clips would take too much of the free memory.

    Sizes come from the files' headers; the count stops where the limit is passed.
    """
    limit = round(_SHARE_OF_FREE_MEMORY * free_memory())
    needed = 0
    for number, record in enumerate(manifest, start=1):
        try:
            with FileSource(record, spec) as source:
                needed += _decoded_bytes(source, spec)
        except ClipError:
            continue
        if needed > limit:
            raise ConfigError(
                f"data.cache = 'ram' does not fit: {number} of {len(manifest)} clips need "
                f"{needed / 2**30:.1f} GiB, of the free memory {limit / 2**30:.1f} GiB may be "
                "used; use data.cache = 'none', or a smaller data.short_side or data.fps"
            )


def _decoded_bytes(source: FileSource, spec: SampleSpec) -> int:
    video = waveform = 0
    if spec.frames:
        height, width = resized_shape(source.info.height, source.info.width, spec.short_side)
        video = source.ticks * height * width * 3
    if spec.samples and source.has_audio:
        waveform = source.length * 2
    return _aligned(video) + _aligned(waveform)


def free_memory() -> int:
    """Bytes that can be used without swapping, under the limit of the container if there is one."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or "max": no limit
        pass
    return max(free, 0)


class _WholeClips(Dataset["CachedSource | ClipError"]):
    """Decodes each record from its start to its end."""

    def __init__(self, manifest: Manifest, spec: SampleSpec) -> None:
        self._manifest = manifest
        self._spec = spec

    def __len__(self) -> int:
        return len(self._manifest)

    def __getitem__(self, index: int) -> CachedSource | ClipError:
        try:
            with FileSource(self._manifest[index], self._spec) as source:
                # Without video the ticks still say how long the clip is.
                video = np.zeros((source.ticks, 0, 0, 3), np.uint8)
                if self._spec.frames:
                    video = source.pictures(np.arange(source.ticks))
                waveform = np.zeros(0, np.int16)
                if self._spec.samples and source.has_audio:
                    waveform = source.sound(0, source.length)
                return CachedSource(video, waveform, source.has_audio)
        except ClipError as error:
            return error


def _decode_all(
    manifest: Manifest, spec: SampleSpec, workers: int
) -> Iterator[CachedSource | ClipError]:
    clips = DataLoader(_WholeClips(manifest, spec), batch_size=None, **worker_options(workers))
    feed = Feed(clips, spec.reader)
    del clips  # the feed alone decides when it ends
    try:
        feed.start()
        while (decoded := feed.next()) is not None:
            yield decoded
    finally:
        feed.close()
