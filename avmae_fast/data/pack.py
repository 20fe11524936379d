"""Pack the clips of a manifest into shards, once, so that training decodes little.

The rows are divided into blocks, whatever the number of processes; a process packs a block after
another, a block's rows in order. So equal input gives equal bytes, and a job that was killed goes
on after the last finished shard.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from avmae_fast.data.clip import ClipError
from avmae_fast.data.manifest import FileManifest, load_manifest
from avmae_fast.data.pack_clips import DiskFullError, PackError, PackOptions, count_parts, pack_row
from avmae_fast.data.pack_folder import block_state, finish, locked, open_folder
from avmae_fast.data.pack_jobs import Job, Progress, pack_blocks
from avmae_fast.data.shard_index import INDEX_NAME, Index, read_index

# Clips packed beforehand to say how long the job takes and how large its result is.
_SAMPLED = 8

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True)
class Estimate:
    """What packing the clips that are left will take."""

    clips: int
    seconds: float
    bytes: int


def _ignore(_: object) -> None:
    pass


def pack(
    manifest: Path | str,
    out: Path | str,
    options: PackOptions,
    *,
    jobs: int | None = None,
    resume: bool = False,
    announce: Callable[[Estimate], object] = _ignore,
    progress: Callable[[Progress], object] = _ignore,
) -> Index:
    """Pack every clip of a manifest into `out`, which can then stand for the manifest.

    Args:
        manifest: a .csv or .jsonl file; see `load_manifest`.
        out: a folder that is absent or empty, or holds this job unfinished; a finished one is
            left as it is.
        jobs: processes; by default one for each processor this process may use. More than one
            need the caller's script to guard its entry point (they are spawned).
        resume: go on with what is there.
        announce: told how long it will take and how large it gets, before the work.
        progress: told how far it is.

    Returns:
        The index that was written.

    Raises:
        ManifestError, PackError: nothing can be packed, or the disk is too small or full. What
            was finished stays; nothing is half-written under its own name.
    """
    clips = load_manifest(manifest)
    if not isinstance(clips, FileManifest):
        raise PackError(f"{clips.source} is packed already: give the manifest of the media files")
    jobs = len(os.sched_getaffinity(0)) if jobs is None else jobs
    if jobs < 1:
        raise PackError(f"jobs = {jobs!r} is not valid: it must be at least 1")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            open_folder(folder, clips, options, resume=resume)
            if (folder / INDEX_NAME).exists():
                return read_index(folder)
            token = f"{os.getpid()}-{time.time_ns():x}"
            return _run(Job(folder, clips, options, os.getpid(), token), jobs, announce, progress)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise DiskFullError(_disk_full(folder)) from error
        raise PackError(f"{folder} cannot be written: {error}") from error


def _run(
    job: Job,
    jobs: int,
    announce: Callable[[Estimate], object],
    progress: Callable[[Progress], object],
) -> Index:
    starts = [job.rows_of(block).start for block in range(job.blocks)]
    left = [b for b, start in enumerate(starts) if not block_state(job.folder, b, start).done]
    if left:
        estimate = _estimate(job, left, jobs)
        announce(estimate)
        _require_room(job.folder, estimate)
        pack_blocks(job, left, jobs, progress)
    states = [block_state(job.folder, block, start) for block, start in enumerate(starts)]
    shards = [shard for state in states for shard in state.shards]
    return finish(job.folder, job.manifest, job.options, shards)


def _estimate(job: Job, left: list[int], jobs: int) -> Estimate:
    """Pack the first part of some clips, spread over what is left, and scale it up."""
    rows = [number for block in left for number in job.rows_of(block)]
    count = min(_SAMPLED, -(-len(rows) // 16))
    seconds = size = 0.0
    for place in range(count):
        row = job.row(rows[place * len(rows) // count])
        start = time.perf_counter()
        try:
            parts = count_parts(row, job.options)
        except ClipError:
            continue
        for _, _, packed in pack_row(row, job.options, limit=1):
            if not isinstance(packed, ClipError):
                size += parts * (len(packed.video) + len(packed.sound or b""))
        seconds += parts * (time.perf_counter() - start)
    scale = len(rows) / count
    return Estimate(len(rows), seconds * scale / min(jobs, len(left)), round(size * scale))


def _require_room(folder: Path, estimate: Estimate) -> None:
    """Raise DiskFullError if the shards would not fit, by the estimate."""
    free = shutil.disk_usage(folder).free
    if estimate.bytes > free:
        raise DiskFullError(
            f"{folder} has {free / 2**30:.2f} GiB free, the shards need about "
            f"{estimate.bytes / 2**30:.2f} GiB: free {(estimate.bytes - free) / 2**30:.2f} GiB, or "
            "pack elsewhere, or with a larger --crf or smaller --short-side"
        )


def _disk_full(folder: Path) -> str:
    free = shutil.disk_usage(folder).free
    return (
        f"the disk of {folder} is full ({free / 2**20:.0f} MiB free) or its quota used up: free "
        "some, then go on with --resume, which first says how much is needed. Finished shards stay"
    )
