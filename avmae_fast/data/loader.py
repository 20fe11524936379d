"""Batches of training samples, the same for any number of workers and from any position on.

A sample is a function of (seed, position): the position says which record of which epoch it is,
and keys the draws of window, crop, flip and, where a file is bad, of the record that stands in.
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from avmae_fast.config import Config, ConfigError
from avmae_fast.data.bad_files import BadFiles, Substitution
from avmae_fast.data.cache import RamCache, ram_cache
from avmae_fast.data.clip import ClipError
from avmae_fast.data.manifest import Manifest, ManifestError, load_manifest
from avmae_fast.data.samples import DRAWS, FileSource, Sample, SampleSpec, cut
from avmae_fast.data.workers import Feed, worker_options
from avmae_kernels.masking import keyed_uniform, permute

Split = Literal["train", "val"]

# Records tried in place of a bad one.
MAX_SUBSTITUTES = 8

# Streams of keyed randomness; 0 and 1 are the masks of video and audio.
_WINDOW_STREAM, _SUBSTITUTE_STREAM = 2, 3

# Batches that a worker prepares ahead.
_PREFETCH = 2


@dataclass(frozen=True)
class Batch:
    """What the training loop gets for one micro-batch of B samples.

    video: uint8 [B, T, H, W, 3], cropped and flipped; None without video.
    waveform: int16 [B, S], mono 16 kHz, S samples making audio.frames rows; None without audio.
    keys: int64 [B], the position of each sample; masks are drawn by it.
    labels: int64 [B], -1 where the manifest gives none.
    has_audio: bool [B]; false where silence stands in for a missing track.
    substituted: the files that could not be read, in the order in which they were tried.
    """

    video: Tensor | None
    waveform: Tensor | None
    keys: Tensor
    labels: Tensor
    has_audio: Tensor
    substituted: tuple[Substitution, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> Self:
        """The batch in page-locked memory, from which copies to the GPU need not wait."""
        return replace(
            self,
            video=None if self.video is None else self.video.pin_memory(),
            waveform=None if self.waveform is None else self.waveform.pin_memory(),
            keys=self.keys.pin_memory(),
            labels=self.labels.pin_memory(),
            has_audio=self.has_audio.pin_memory(),
        )


@dataclass(frozen=True)
class _Exhausted:
    """A sample for which neither its record nor any substitute could be read."""

    substituted: tuple[Substitution, ...]


class ClipDataset(Dataset[Batch]):
    """Samples by position. `dataset.__getitems__(positions)` is a batch."""

    def __init__(
        self,
        manifest: Manifest,
        spec: SampleSpec,
        split: Split,
        seed: int,
        cache: RamCache | None = None,
    ) -> None:
        self._manifest = manifest
        self._spec = spec
        self._split = split
        self._seed = seed
        self._cache = cache

    def record_index(self, position: int) -> int:
        """Which record a position stands for: each once an epoch, shuffled in training."""
        records = len(self._manifest)
        epoch, index = divmod(position, records)
        if self._split == "val":
            return index
        return permute(index, records, key=epoch, seed=self._seed)

    def __getitems__(self, positions: list[int]) -> Batch | _Exhausted:
        batch = self._empty_batch(positions)
        substituted: list[Substitution] = []
        for row, position in enumerate(positions):
            loaded = self._load(position, substituted)
            if loaded is None:
                return _Exhausted(tuple(substituted))
            index, sample = loaded
            if batch.video is not None:
                batch.video.numpy()[row] = sample.video
            if batch.waveform is not None:
                batch.waveform.numpy()[row] = sample.waveform
            batch.labels[row] = self._manifest[index].label
            batch.has_audio[row] = sample.has_audio
        return replace(batch, substituted=tuple(substituted))

    def _empty_batch(self, positions: list[int]) -> Batch:
        spec, count = self._spec, len(positions)
        height, width = spec.crop
        video = torch.empty(count, spec.frames, height, width, 3, dtype=torch.uint8)
        return Batch(
            video=video if spec.frames else None,
            waveform=torch.empty(count, spec.samples, dtype=torch.int16) if spec.samples else None,
            keys=torch.tensor(positions, dtype=torch.int64),
            labels=torch.empty(count, dtype=torch.int64),
            has_audio=torch.empty(count, dtype=torch.bool),
        )

    def _load(self, position: int, bad: list[Substitution]) -> tuple[int, Sample] | None:
        """(record index, sample), None if all substitutes are bad too; what failed joins `bad`."""
        key = np.array([position], np.int64)
        draws = None
        if self._split == "train":
            draws = keyed_uniform(self._seed, key, _WINDOW_STREAM, DRAWS)[0]
        spare = keyed_uniform(self._seed, key, _SUBSTITUTE_STREAM, MAX_SUBSTITUTES)[0]
        index = self.record_index(position)
        tried: list[int] = []
        for u in [*spare, None]:
            try:
                return index, self._read(index, draws)
            except ClipError as error:
                bad.append(Substitution(position, error.path, error.kind, error.detail))
            tried.append(index)
            if u is None or len(tried) == len(self._manifest):
                break
            index = _pick_another(u, len(self._manifest), tried)
        return None

    def _read(self, index: int, draws: NDArray[np.float64] | None) -> Sample:
        if self._cache is not None:
            return cut(self._cache[index], self._spec, draws)
        with FileSource(self._manifest[index], self._spec) as source:
            return cut(source, self._spec, draws)


def _pick_another(u: float, records: int, tried: list[int]) -> int:
    """A record that has not been tried, uniformly."""
    index = int(u * (records - len(tried)))
    for other in sorted(tried):
        index += index >= other
    return index


class _Positions:
    """Sample positions in batches: from `start` on, up to `end` if there is one."""

    def __init__(self, start: int, batch: int, end: int | None) -> None:
        self._start, self._batch, self._end = start, batch, end

    def __iter__(self) -> Iterator[list[int]]:
        position = self._start
        while self._end is None or position < self._end:
            after = position + self._batch
            yield list(range(position, after if self._end is None else min(after, self._end)))
            position = after


class ClipLoader:
    """Iterates over the batches of a configured run; a context manager.

    `train` goes on for ever, epoch after epoch; `val` goes once over its records, in order, with
    centred windows, and its last batch may be smaller. Every iteration starts at `start`.

    Workers are separate processes that import the main script, so a script that iterates with
    `data.workers > 0` needs the usual `if __name__ == "__main__":`.

    Args:
        config: the run; `train.batch // train.accumulate` samples make a batch.
        split: which records, and how they are cut.
        start: the position of the first sample; to resume, the number of samples trained on.

    Attributes:
        start: the position of the first sample.
        manifest: the records of the split, and the class names.
        bad_files: what could not be read so far.

    Raises:
        ManifestError, ConfigError: the data cannot be used as configured.
        TooManyBadFiles: while iterating; `BadFiles` says when.
        LoaderStalled: while iterating; no batch came for minutes.
    """

    def __init__(self, config: Config, split: Split = "train", start: int = 0) -> None:
        if start < 0:
            raise ValueError(f"start must be a position, at least 0, got {start}")
        spec = SampleSpec.of(config)
        workers = config.data.workers
        batch = config.train.batch // config.train.accumulate
        self.start = start
        self.manifest = split_manifest(config, split)
        self.bad_files = BadFiles(config.data.max_bad_fraction)
        if workers:
            _require_shared_memory(spec, batch * _PREFETCH * workers)
        self._cache = None
        if config.data.cache == "ram":
            self._cache = ram_cache(self.manifest, split, spec, workers)
        end = None if split == "train" else len(self.manifest)
        loader: DataLoader[Batch] = DataLoader(
            ClipDataset(self.manifest, spec, split, config.train.seed, self._cache),
            batch_sampler=_Positions(start, batch, end),
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=_PREFETCH if workers else None,
            persistent_workers=workers > 0,
            **worker_options(workers),
        )
        self._feed = Feed(loader, spec.reader)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        self._feed.start()
        while (batch := self._feed.next()) is not None:
            if isinstance(batch, _Exhausted):
                self.bad_files.give_up(batch.substituted)
            self.bad_files.add(len(batch), batch.substituted)
            yield batch

    def close(self) -> None:
        """End the workers and free the cache. The loader cannot be used after."""
        self._feed.close()
        self._cache = None


def split_manifest(config: Config, split: Split) -> Manifest:
    """The records of a split: rows of `data.manifest`, or `data.val_manifest` where it is set.

    A validation manifest counts whole unless some of its rows are marked val. Class names are the
    training manifest's.

    Raises:
        ManifestError: a manifest cannot be used, or has no record of the split.
    """
    manifest = load_manifest(config.data.manifest)
    if split == "val" and config.data.val_manifest is not None:
        manifest = load_manifest(config.data.val_manifest, manifest.classes or None)
        marked = manifest.select("val")
        return marked if len(marked) else manifest
    chosen = manifest.select(split)
    if not len(chosen):
        remedy = "; mark rows val in its column split, or set data.val_manifest"
        raise ManifestError(
            f"{manifest.source} has no clips of the split {split}" + remedy * (split == "val")
        )
    return chosen


def _require_shared_memory(spec: SampleSpec, samples: int) -> None:
    """Raise ConfigError if the batches on their way from the workers would not fit.

    Without this check a worker dies of a bus error, as it does in a container by default.
    """
    folder = Path("/dev/shm")
    needed = samples * (math.prod(spec.crop) * spec.frames * 3 + spec.samples * 2)
    if folder.is_dir() and needed > (free := shutil.disk_usage(folder).free):
        raise ConfigError(
            f"the batches of data.workers processes need {needed / 2**20:.0f} MiB of shared "
            f"memory, {folder} has {free / 2**20:.0f} MiB free: use fewer data.workers or a larger "
            "train.accumulate, or start the container with a larger --shm-size"
        )


def _as_it_is(batch: Any) -> Any:
    return batch
