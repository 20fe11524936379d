"""The processes that pack: each takes a block of the manifest's rows after another."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from avmae_fast.data.clip import ClipError
from avmae_fast.data.manifest import SPLITS, FileManifest
from avmae_fast.data.pack_clips import (
    Listed,
    PackError,
    PackOptions,
    Segment,
    describe,
    pack_row,
)
from avmae_fast.data.pack_folder import block_state, shard_path
from avmae_fast.data.shard_encode import Packed
from avmae_fast.data.shard_writer import ShardWriter

# A block is the unit of work and becomes a shard: some hundred of them, neither tiny nor huge.
_BLOCKS = 256
_BLOCK_ROWS = (16, 1024)
# A block of long videos is cut into several shards of about this many bytes.
_SHARD_BYTES = 1 << 30

# How often a process looks whether its parent is still there.
_PARENT_CHECK_S = 0.5

_Item = tuple[Listed, int, Segment | None, Packed | ClipError]


@dataclass(frozen=True)
class Progress:
    """Rows of the manifest done, records and bytes written, and failures, by this job."""

    clips: int = 0
    records: int = 0
    bytes: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Job:
    """What a process needs to pack any block.

    parent: the process that started the job; one that has lost it stops.
    token: marks the temporary files of this job.
    """

    folder: Path
    manifest: FileManifest
    options: PackOptions
    parent: int
    token: str

    @property
    def block_rows(self) -> int:
        low, high = _BLOCK_ROWS
        return min(max(-(-len(self.manifest) // _BLOCKS), low), high)

    @property
    def blocks(self) -> int:
        return -(-len(self.manifest) // self.block_rows)

    def rows_of(self, block: int) -> range:
        """The numbers of a block's rows."""
        first = block * self.block_rows
        return range(first, min(first + self.block_rows, len(self.manifest)))

    def row(self, number: int) -> Listed:
        path, split = self.manifest.as_listed(number)
        labels = tuple(self.manifest.classes[label] for label in self.manifest.labels(number))
        return Listed(number, self.manifest[number], path, labels, split)


class _Counts:
    """Progress, shared by the processes of a job."""

    def __init__(self, shared: Any, report: Callable[[Progress], object] | None = None) -> None:
        self._shared = shared
        self._report = report

    def add(self, **counts: int) -> None:
        with self._shared.get_lock():
            for place, name in enumerate(Progress.__dataclass_fields__):
                self._shared[place] += counts.get(name, 0)
        if self._report is not None:
            self._report(self.progress)

    @property
    def progress(self) -> Progress:
        return Progress(*self._shared)


def pack_blocks(
    job: Job, blocks: list[int], jobs: int, report: Callable[[Progress], object]
) -> None:
    """Pack some blocks in `jobs` processes (1: in this one), reporting about twice a second.

    Raises:
        OSError: what a process met while writing.
        PackError: a process was killed.
    """
    context = multiprocessing.get_context("spawn")
    shared = context.Array("q", len(Progress.__dataclass_fields__))
    try:
        if jobs == 1 or len(blocks) == 1:
            for block in blocks:
                _pack_block(job, block, _Counts(shared, report))
            return
        _pack_in_pool(job, blocks, min(jobs, len(blocks)), shared, report)
    finally:
        for partial in job.folder.glob("*.partial-*"):
            partial.unlink()


def _pack_in_pool(
    job: Job, blocks: list[int], jobs: int, shared: Any, report: Callable[[Progress], object]
) -> None:
    others = set(multiprocessing.active_children())
    # Spawned, not forked: the caller may run threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_start_process, initargs=(shared, job.parent)
    )
    try:
        pending: set[Future[None]] = {pool.submit(_pack_in_process, job, b) for b in blocks}
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            report(_Counts(shared).progress)
            for future in done:
                future.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise PackError(
            "a process was killed, perhaps for want of memory: go on with --resume and a smaller -j"
        ) from error
    finally:
        # After an error or Ctrl-C: not at the end of the blocks they are at, but now.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
            process.join()
        pool.shutdown(cancel_futures=True)


_counts: _Counts | None = None


def _start_process(shared: Any, parent: int) -> None:
    """One thread, and Ctrl-C, which reaches the whole process group, left to the parent."""
    global _counts
    _counts = _Counts(shared)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent was killed: it would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)


def _pack_in_process(job: Job, block: int) -> None:
    assert _counts is not None
    _pack_block(job, block, _counts)


def _pack_block(job: Job, block: int, counts: _Counts) -> None:
    """Pack what is left of a block into one shard or, where it is large, several."""
    state = block_state(job.folder, block, job.rows_of(block).start)
    items = _items(job, block, state.row, state.part, counts)
    part = len(state.shards)
    while not _write_shard(job, shard_path(job.folder, block, part), items, counts):
        part += 1


def _items(job: Job, block: int, row: int, part: int, counts: _Counts) -> Iterator[_Item]:
    """The records of a block from a part of a row on."""
    for number in range(row, job.rows_of(block).stop):
        listed = job.row(number)
        for item in pack_row(listed, job.options, first=part if number == row else 0):
            # Its parent's lock is gone with it, and another job may be here.
            if os.getpid() != job.parent and os.getppid() != job.parent:
                raise PackError("the process that started this one has ended")
            yield listed, *item
        counts.add(clips=1)


def _write_shard(job: Job, path: Path, items: Iterator[_Item], counts: _Counts) -> bool:
    """Write items until the shard is full; returns whether they are at their end."""
    failures: list[dict[str, Any]] = []
    after = [0, 0]
    with ShardWriter(path, job.token) as shard:
        last = True
        for row, number, part, packed in items:
            after = [row.number, number + 1]
            if isinstance(packed, ClipError) or part is None:
                assert isinstance(packed, ClipError)
                failures.append(_failure(row, part, packed))
                counts.add(failed=1)
                continue
            before = shard.size
            _add(shard, job, row, number, part, packed)
            counts.add(records=1, bytes=shard.size - before)
            if shard.size >= _SHARD_BYTES:
                last = False
                break
        shard.finish({"failures": failures, "next": after, "last": last})
    return last


def _add(
    shard: ShardWriter, job: Job, row: Listed, number: int, part: Segment, packed: Packed
) -> None:
    shard.add(
        packed,
        describe(row, part, packed, job.options),
        job.manifest.labels(row.number),
        clip=row.number,
        segment=number,
        label=row.record.label,
        split=SPLITS.index(row.split),
        duration_s=part.end_s - part.start_s,
    )


def _failure(row: Listed, part: Segment | None, error: ClipError) -> dict[str, Any]:
    """A line of failed.jsonl."""
    span = {} if part is None else {"start_s": part.start_s, "end_s": part.end_s}
    found = {"row": row.number + 1, "path": row.path, "kind": error.kind, "detail": error.detail}
    return found | span
