"""Batches of training samples, the same for any number of ranks and workers, from any position on.

A sample is a function of (seed, position): `avmae_fast.data.order` says which record, window and
view a position stands for. Resuming needs nothing but the position.

One thing is not in a file's bytes: whether a reader hangs on it. A file on which it always hangs
(or always crashes) is never trained on, so the samples are the same in every run, before and after
it is found out. For one on which it hangs only sometimes no two runs need be alike; so that a
resumed run at least goes on as the first one did, it is given the files that were `excluded` there.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor

from avmae_fast.config import ConfigError, Run
from avmae_fast.data.bad_files import BadFiles, Substitution, TooManyBadFiles
from avmae_fast.data.cache import ram_cache
from avmae_fast.data.clip import ErrorKind
from avmae_fast.data.loading import Loaded, LoadJob, LoadTask
from avmae_fast.data.manifest import Manifest, ManifestError, load_manifest
from avmae_fast.data.order import Order
from avmae_fast.data.ring import Layout, Ring, Slots
from avmae_fast.data.samples import SampleSpec
from avmae_fast.data.shard_manifest import ShardManifest
from avmae_fast.data.shared import free_memory
from avmae_fast.data.workers import Pool, open_pool

Split = Literal["train", "val"]

# Batches that training may hold at a time: the one it works on, one that is being copied to the
# GPU and one whose copy has just ended. What is kept beyond that gets memory of its own.
_LENT = 3

# Batches that are filled ahead of the one that is due, so that a slow clip holds nobody up ...
_AHEAD = 2
# ... and records that wait for each worker while it reads one.
_WAITING = 2


@dataclass(frozen=True)
class Batch:
    """What the training loop gets for one micro-batch of B samples.

    video: uint8 [B, T, H, W, 3], or planes [B, T, 3H/2, W], cropped and flipped; None without.
    waveform: int16 [B, S], mono 16 kHz, S samples making audio.frames rows; None without audio.
    keys: int64 [B], the position of each sample; masks are drawn by it.
    labels: int64 [B], -1 where the manifest gives none, or several.
    has_audio: bool [B]; false where silence stands in for a missing track.
    records: int64 [B], the numbers in the manifest of what the samples were really cut from; empty
        where they come from no manifest.
    substituted: the files that could not be read, in the order in which they were tried.

    `video` and `waveform` look into memory that is used again when the last tensor that shares it
    is gone; a copy to a GPU that is not waited for must keep the batch until it is done.
    """

    video: Tensor | None
    waveform: Tensor | None
    keys: Tensor
    labels: Tensor
    has_audio: Tensor
    records: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    substituted: tuple[Substitution, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)


@dataclass
class _Filling:
    """A batch on its way: samples `first` to `first + count - 1` in a slot."""

    slot: int
    first: int
    count: int
    left: int = 0  # tasks
    bad: dict[int, Loaded] = field(default_factory=dict)  # by row
    wanted: bool = True


class ClipLoader:
    """Iterates over the batches of a configured run; a context manager.

    `train` goes on for ever; `val` goes once over its records, in order, with centred windows, and
    its last batch may be smaller. Every iteration starts at `start`; one at a time.

    With several ranks, each gets its part of every micro-batch: rank r of w has the samples
    `r * B .. r * B + B - 1` of the `w * B` that follow each other. At the end of `val` a rank may
    have a batch less than another.

    Workers are separate processes that import the main script, so a script that iterates with
    `data.workers > 0` needs the usual `if __name__ == "__main__":`. `data.workers` is per rank.

    Args:
        config: the run; `train.batch // train.accumulate` samples make a micro-batch of all ranks.
        split: which records, and how they are cut.
        start: the position of the first sample; to resume, the number of samples trained on.
        rank: which part of each micro-batch is loaded here.
        world: how many ranks there are.
        excluded: files that count as bad from the start, path and why: those on which an earlier
            part of the run hung or crashed.

    Attributes:
        start: the position of the first sample.
        manifest: the records of the split, and the class names.
        bad_files: what could not be read so far.

    Raises:
        ManifestError, ConfigError: the data cannot be used as configured.
        TooManyBadFiles: while iterating; `BadFiles` says when.
        LoaderStalled, WorkersDied: while iterating; the storage does not answer, or workers end.
    """

    def __init__(
        self,
        config: Run,
        split: Split = "train",
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        excluded: Mapping[str, tuple[ErrorKind, str]] | None = None,
    ) -> None:
        if start < 0:
            raise ValueError(f"start must be a position, at least 0, got {start}")
        data, spec = config.data, SampleSpec.of(config)
        self.start = start
        self.manifest = split_manifest(config, split)
        self.bad_files = BadFiles(data.max_bad_fraction)
        self._order = _order(config, split, len(self.manifest))
        self._plan = _Plan.of(config, self._order.repeat, split, len(self.manifest), rank, world)
        self._workers, self._timeout_s = data.workers, data.timeout_s
        self._ring = _ring(spec, self._plan.batch, self._order.repeat, data.workers)
        self._slots = Slots(self._ring.slots)
        self._cache = None
        if data.cache == "ram":
            self._cache = ram_cache(self.manifest, split, spec, data.workers, data.timeout_s)
        job = LoadJob(self.manifest, spec, self._order, self._ring, self._cache)
        self._job: LoadJob | None = job
        _exclude(job, self.manifest, excluded or {})
        self._pins = config.train.device != "cpu" and torch.cuda.is_available()
        self._pool: Pool[LoadTask, Loaded] | None = None
        self._filling: dict[int, _Filling] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        if self._job is None:
            raise ValueError("the loader is closed")
        if self._pool is None:
            if self._pins:
                self._ring.pin()
            self._pool = open_pool(self._job, self._workers, self._timeout_s)
        self._forget()
        return self._batches(self._pool)

    def close(self) -> None:
        """End the workers and free the cache. The loader cannot be used after."""
        if self._pool is not None:
            self._pool.close()
        self._pool = self._job = self._cache = None

    @property
    def ahead(self) -> int:
        """Batches that are filled before they are asked for."""
        return self._ring.slots - _LENT

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers; none before the first iteration and without workers."""
        return [] if self._pool is None else self._pool.pids()

    def seconds(self) -> dict[str, float]:
        """Seconds the workers spent in each of `STAGES`, and of processor time (`cpu`), so far."""
        return {} if self._pool is None else self._pool.seconds()

    def _batches(self, pool: Pool[LoadTask, Loaded]) -> Iterator[Batch]:
        spans = self._plan.spans(self.start)
        due: deque[_Filling] = deque()
        while True:
            self._begin(pool, spans, due)
            if not due:
                return
            while due[0].left:
                self._collect(pool)
                self._begin(pool, spans, due)
            yield self._deliver(due.popleft())

    def _begin(
        self, pool: Pool[LoadTask, Loaded], spans: Iterator[range], due: deque[_Filling]
    ) -> None:
        """Have the next batches filled, as far as there are free slots for them."""
        while len(due) < self.ahead and (slot := self._slots.take()) is not None:
            span = next(spans, None)
            if span is None:
                self._slots.drop(slot)
                return
            filling = _Filling(slot, span.start, len(span))
            self._filling[slot] = filling
            due.append(filling)
            for group in self._order.groups(span.start, len(span)):
                task = LoadTask(
                    slot, group.first - span.start, group.first, group.count, group.record
                )
                filling.left += 1
                pool.submit(task)

    def _collect(self, pool: Pool[LoadTask, Loaded]) -> None:
        """Wait for a worker and note what it has done; whatever it raises closes the loader."""
        try:
            replies = pool.wait()
        except Exception:
            self.close()
            raise
        for task, loaded in replies:
            filling = self._filling[task.slot]
            filling.left -= 1
            if loaded is not None and loaded.substituted:
                filling.bad[task.row] = loaded
            if not filling.wanted and not filling.left:
                del self._filling[task.slot]
                self._slots.drop(task.slot)

    def _forget(self) -> None:
        """Give up what is being filled for an iteration that was left."""
        assert self._pool is not None
        self._pool.cancel()
        for slot, filling in self._filling.items():
            filling.wanted = False
            if not filling.left:
                self._slots.drop(slot)
        self._filling = {slot: f for slot, f in self._filling.items() if f.left}
        # Batches that training still holds are not waited for; what workers still write is.
        while self._slots.count("filling"):
            self._collect(self._pool)

    def _deliver(self, filling: _Filling) -> Batch:
        del self._filling[filling.slot]
        substituted: tuple[Substitution, ...] = ()
        try:
            for _, loaded in sorted(filling.bad.items()):
                substituted += loaded.substituted
                if loaded.exhausted:
                    self.bad_files.give_up(substituted)
            self.bad_files.add(filling.count, substituted)
        except TooManyBadFiles:
            self._slots.drop(filling.slot)
            raise
        self._slots.filled(filling.slot)
        return self._lend(filling, substituted)

    def _lend(self, filling: _Filling, substituted: tuple[Substitution, ...]) -> Batch:
        """The batch in its slot; a copy of it where training keeps too many."""
        slot, count, layout = filling.slot, filling.count, self._ring.layout
        arrays = self._ring.arrays(slot)
        labels = torch.from_numpy(arrays.labels[:count].copy())
        records = torch.from_numpy(arrays.records[:count].copy())
        has_audio = torch.from_numpy(arrays.has_audio[:count].astype(bool))
        keep = self._slots.count("lent") >= _LENT
        self._slots.lend(slot)
        video, waveform = (t[:count] for t in self._ring.tensors(slot, self._slots))
        if keep:
            video, waveform = video.clone(), waveform.clone()
        return Batch(
            video=video if layout.frames else None,
            waveform=waveform if layout.samples else None,
            keys=torch.arange(filling.first, filling.first + count),
            labels=labels,
            has_audio=has_audio,
            records=records,
            substituted=substituted,
        )


@dataclass(frozen=True)
class _Plan:
    """How the sequence of samples is cut into the batches of one rank.

    batch: samples of this rank in a micro-batch. end: of the sequence, None where it has none.
    """

    batch: int
    rank: int
    world: int
    end: int | None

    @classmethod
    def of(
        cls, config: Run, repeat: int, split: Split, records: int, rank: int, world: int
    ) -> Self:
        if not 0 <= rank < world:
            raise ValueError(f"rank must be from 0 to world - 1 = {world - 1}, got {rank}")
        micro_batch = config.train.batch // config.train.accumulate
        if micro_batch % (world * repeat):
            raise ConfigError(
                f"train.batch // train.accumulate = {micro_batch} is not valid with {world} ranks: "
                f"it must be a multiple of {world * repeat}, their number times "
                "data.repeat_windows * data.repeat_views"
            )
        return cls(micro_batch // world, rank, world, records if split == "val" else None)

    def spans(self, start: int) -> Iterator[range]:
        """The positions of each batch, from a position of all ranks on."""
        while self.end is None or start < self.end:
            first = start + self.rank * self.batch
            after = first + self.batch if self.end is None else min(first + self.batch, self.end)
            if first < after:
                yield range(first, after)
            start += self.world * self.batch


def _order(config: Run, split: Split, records: int) -> Order:
    if split == "val":
        return Order(records, config.train.seed, shuffle=False)
    data = config.data
    return Order(records, config.train.seed, True, data.repeat_windows, data.repeat_views)


def _ring(spec: SampleSpec, batch: int, repeat: int, workers: int) -> Ring:
    """Room for the batches that training holds and for those that are filled meanwhile."""
    layout = Layout(batch, spec.frames, spec.picture, spec.samples)
    ahead = _AHEAD + math.ceil(workers * _WAITING * repeat / batch) if workers else 1
    needed, free = (ahead + _LENT) * layout.size, free_memory()
    if needed > free:
        raise ConfigError(
            f"the batches on their way from data.workers = {workers} processes need "
            f"{needed / 2**20:.0f} MiB of memory, {free / 2**20:.0f} MiB are free: use a larger "
            "train.accumulate, or fewer data.workers"
        )
    return Ring(layout, ahead + _LENT)


def _exclude(
    job: LoadJob, manifest: Manifest, excluded: Mapping[str, tuple[ErrorKind, str]]
) -> None:
    if not excluded:
        return
    for number, record in enumerate(manifest):
        if (why := excluded.get(str(record.path))) is not None:
            job.exclude(number, *why)


def split_manifest(config: Run, split: Split) -> Manifest:
    """The records of a split: rows of `data.manifest`, or `data.val_manifest` where it is set.

    A validation manifest counts whole unless some of its rows are marked val. Class names are the
    training manifest's.

    Raises:
        ManifestError: a manifest cannot be used, or has no record of the split.
    """
    manifest = load_manifest(config.data.manifest)
    if isinstance(manifest, ShardManifest):
        manifest.warn_unless_fit(config.data)
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
