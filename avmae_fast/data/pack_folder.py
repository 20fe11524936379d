"""The folder that clips are packed into: whose it is, what is done, what is there at the end.

pack.json           options and digest of the manifest, written first
shard-BBBBB-PP.tar  part PP of the shard of block B of the manifest's rows
shard-BBBBB-PP.idx  its index, with what could not be packed
failed.jsonl        all that could not be packed: row, path, kind, detail
index.avmae         the index of all shards, written last: the folder is whole
.lock               who is packing
"""

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avmae_fast.data.label_sets import LabelSets
from avmae_fast.data.manifest import FileManifest
from avmae_fast.data.pack_clips import PackError, PackOptions
from avmae_fast.data.shard_index import INDEX_NAME, ROW, Index, read_index, write_whole
from avmae_fast.data.shard_writer import index_beside

_PACK = "pack.json"
_FAILED = "failed.jsonl"
_LOCK = ".lock"
# 1 kept one label a record.
_FORMAT = 2


@dataclass(frozen=True)
class BlockState:
    """How far a block is: its finished shards, and from where on (row, part) it is to be packed."""

    shards: list[Path]
    row: int
    part: int
    done: bool


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when this process ends, however it does.

    Raises:
        PackError: another process holds it.
    """
    with (folder / _LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise PackError(
                f"{folder} is being packed by {file.read().strip() or 'another process'}: wait for "
                "it, end it, or choose another folder"
            ) from error
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
        yield


def open_folder(
    folder: Path, manifest: FileManifest, options: PackOptions, *, resume: bool
) -> None:
    """Make the folder that of this job, and clear away what a killed one left half-written.

    Raises:
        PackError: it holds something else, or another job, or an unfinished one without `resume`.
    """
    job = {"format": _FORMAT, "manifest": digest(manifest), "options": options.stored()}
    record = folder / _PACK
    if record.exists():
        _require_same(record, job, options)
        if not resume and not (folder / INDEX_NAME).exists():
            raise PackError(f"{folder} is packed in part: add --resume to go on, or delete it")
    elif others := sorted(p.name for p in folder.iterdir() if not _is_ours(p.name)):
        raise PackError(f"{folder} is not a folder of packed clips: it holds {others[0]}")
    else:
        write_whole(record, json.dumps(job, indent=1, sort_keys=True).encode() + b"\n")
    for partial in folder.glob("*.partial-*"):
        partial.unlink()


def _is_ours(name: str) -> bool:
    """Whether a job that was killed before its first write was done may have left this behind."""
    return name == _LOCK or name.startswith(f"{_PACK}.partial-")


def _require_same(record: Path, job: dict[str, Any], options: PackOptions) -> None:
    try:
        found = json.loads(record.read_text())
        stored, manifest, version = found["options"], found["manifest"], found["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise PackError(f"{record} is damaged: delete its folder and pack again") from error
    if version != _FORMAT:
        raise PackError(
            f"{record.parent} was packed in format {version!r}, this program writes {_FORMAT}: "
            "choose another folder or delete this one; a finished one of format 1 can be used as "
            "it is, with one label a clip"
        )
    differ = options.differing(stored)
    if manifest != job["manifest"]:
        differ.append("the manifest lists other clips")
    if differ:
        raise PackError(
            f"{record.parent} was packed otherwise ({'; '.join(differ)}): choose another folder "
            "or delete this one"
        )


def digest(manifest: FileManifest) -> str:
    """SHA-256 of all that a manifest says, wherever it lies."""
    state = hashlib.sha256(json.dumps(manifest.classes).encode())
    for number, record in enumerate(manifest):
        labels = manifest.labels(number)
        row = (*manifest.as_listed(number), labels, record.start_s, record.end_s)
        state.update(json.dumps(row).encode())
    return state.hexdigest()


def shard_path(folder: Path, block: int, part: int) -> Path:
    return folder / f"shard-{block:05d}-{part:02d}.tar"


def block_state(folder: Path, block: int, first_row: int) -> BlockState:
    """What earlier jobs have finished of a block; they write its parts one after another."""
    shards: list[Path] = []
    row, part = first_row, 0
    while (shard := shard_path(folder, block, len(shards))).exists():
        shards.append(shard)
        header = read_index(index_beside(shard)).header
        row, part = header["next"]
        if header["last"]:
            return BlockState(shards, row, part, True)
    return BlockState(shards, row, part, False)


def finish(
    folder: Path, manifest: FileManifest, options: PackOptions, shards: Sequence[Path]
) -> Index:
    """Write failed.jsonl and the index of all shards; returns the index."""
    parts = [read_index(index_beside(shard)) for shard in shards]
    failures = [failure for part in parts for failure in part.header["failures"]]
    lines = [json.dumps(failure, sort_keys=True) + "\n" for failure in failures]
    write_whole(folder / _FAILED, "".join(lines).encode())
    header = {
        **options.stored(),
        "classes": manifest.classes,
        "clips": len(manifest),
        "failed": len(failures),
    }
    index = merged(header, [shard.name for shard in shards], parts)
    if not len(index.rows):
        raise PackError(f"none of {len(manifest)} clips could be packed: see {folder / _FAILED}")
    write_whole(folder / INDEX_NAME, index.to_bytes())
    return index


def merged(header: dict[str, Any], names: Sequence[str], parts: Sequence[Index]) -> Index:
    """One index of several shards: numbers of shards, decoders and offsets are made to fit."""
    decoders = list(dict.fromkeys(d for part in parts for d in part.header["decoders"]))
    shards: list[dict[str, Any]] = []
    rows, offsets = [np.zeros(0, ROW)], [np.zeros(0, np.uint32)]
    count = 0
    for name, part in zip(names, parts, strict=True):
        if not len(part.rows):
            continue
        own = part.rows.copy()
        places = np.array([decoders.index(d) for d in part.header["decoders"]])
        own["shard"] = len(shards)
        own["decoder"] = places[own["decoder"]]
        own["first_offset"] += count
        shards.append({"name": name, "bytes": part.header["bytes"]})
        rows.append(own)
        offsets.append(part.offsets)
        count += len(part.offsets)
    header = {**header, "shards": shards, "decoders": decoders}
    labels = LabelSets.joined([part.labels for part in parts])
    return Index(header, np.concatenate(rows), np.concatenate(offsets), labels)
