"""The index of packed clips: where each record's pictures and sound lie in the shards.

A file is a head (8 bytes of magic, then version, length of the header, number of rows, of offsets
and of labels as little-endian u32, u32, u64, u64, u64), a JSON header padded to 64 bytes, the rows,
where the labels of each end (i64), the offsets (u32), the labels (i32), and the CRC-32 of all that.
Every shard has such a file beside it and the folder has one of all shards. All but the header is
mapped, not read, so that workers share it.

Version 1 keeps one label a record: neither labels nor their number are in it. It is still read.
"""

import json
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avmae_fast.data.label_sets import LabelSets
from avmae_fast.data.manifest import UNKNOWN_LABEL, ManifestError

INDEX_NAME = "index.avmae"
SHARD_SUFFIX = ".tar"

_MAGIC = b"AVMAEIDX"
_VERSION = 2
_HEADS = {1: struct.Struct("<8sIIQQ"), 2: struct.Struct("<8sIIQQQ")}
# What all heads begin with: magic and version.
_START = struct.Struct("<8sI")
_ALIGN = 64

# One record. `clip` and `segment` say which row of the manifest and which part of it this is;
# `video_at` and `sound_at` are bytes in the tar: of the video member, and of the first sample.
# `label` is the class of a record that has one alone, else -1.
# `frames + 1` offsets from number `first_offset` on bound the coded pictures inside the member.
# The CRC-32 of a video or of the json is of the whole member, that of a sound of its samples.
ROW = np.dtype(
    [
        ("clip", "<u4"),
        ("segment", "<u4"),
        ("shard", "<u4"),
        ("label", "<i4"),
        ("split", "<u2"),
        ("decoder", "<u2"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("duration_s", "<f8"),
        ("video_at", "<u8"),
        ("sound_at", "<u8"),
        ("first_offset", "<u8"),
        ("video_bytes", "<u4"),
        ("video_crc", "<u4"),
        ("samples", "<u4"),
        ("sound_crc", "<u4"),
        ("meta_crc", "<u4"),
        ("frames", "<u4"),
    ],
    align=False,
)

_KINDS = {
    "rows": ROW,
    "label_ends": np.dtype("<i8"),
    "offsets": np.dtype("<u4"),
    "labels": np.dtype("<i4"),
}
_ARRAYS = {1: ("rows", "offsets"), 2: ("rows", "label_ends", "offsets", "labels")}


@dataclass(frozen=True, eq=False)
class Index:
    """header: what holds for all rows; rows: [R] of `ROW`; offsets: uint32 [O]; labels: of rows."""

    header: dict[str, Any]
    rows: NDArray[np.void]
    offsets: NDArray[np.uint32]
    labels: LabelSets

    def frame_offsets(self, row: np.void) -> NDArray[np.int64]:
        """Where the coded pictures of a record begin in its video member, and where they end.

        Raises:
            ValueError: the row is damaged.
        """
        first, frames = int(row["first_offset"]), int(row["frames"])
        offsets = self.offsets[first : first + frames + 1].astype(np.int64)
        if frames and (len(offsets) <= frames or (np.diff(offsets) < 0).any()):
            raise ValueError(f"no {frames} pictures lie at offset {first}")
        return offsets

    def to_bytes(self) -> bytes:
        head = _HEADS[_VERSION]
        text = json.dumps(self.header, sort_keys=True).encode()
        text += b" " * (-(head.size + len(text)) % _ALIGN)
        counts = (len(text), len(self.rows), len(self.offsets), len(self.labels.flat))
        arrays = (self.rows, self.labels.ends, self.offsets, self.labels.flat)
        body = head.pack(_MAGIC, _VERSION, *counts) + text
        body += b"".join(array.tobytes() for array in arrays)
        return body + zlib.crc32(body).to_bytes(4, "little")


def key_of(row: np.ndarray | np.void) -> str:
    """The name that a record's members share in the tar, before the dot."""
    return f"{int(row['clip']):09d}-{int(row['segment']):04d}"


def is_index(path: Path) -> bool:
    """Whether `path` is a folder of shards or an index file."""
    return path.suffix == ".avmae" or path.is_dir()


def index_file(path: Path) -> Path:
    """The index file that `path`, a folder or the file itself, stands for."""
    return path / INDEX_NAME if path.is_dir() else path


def read_index(path: Path, *, checksum: bool = False) -> Index:
    """Map an index file, or the index of a folder of shards.

    Raises:
        ManifestError: it is missing, of another version, damaged or cut off. That its content is
            intact is only checked with `checksum`: it means reading all of it.
    """
    path = index_file(path)
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < _HEADS[_VERSION].size:
                raise ManifestError(f"{path} is not an index of packed clips: it is too short")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        remedy = f"; is {path.parent} packed to the end? `avmae pack` writes the index last"
        raise ManifestError(f"{path} cannot be read: {error.strerror}{remedy}") from error
    magic, version = _START.unpack_from(data)
    if magic != _MAGIC:
        raise ManifestError(f"{path} is not an index of packed clips")
    if version not in _HEADS:
        raise ManifestError(
            f"{path} has format {version}, this program reads 1 to {_VERSION}: update avmae_fast, "
            "or pack again"
        )
    return _read(path, data, version, checksum)


def _read(path: Path, data: mmap.mmap, version: int, checksum: bool) -> Index:
    head, names = _HEADS[version], _ARRAYS[version]
    _, _, text, rows, offsets, labels = (*head.unpack_from(data), 0)[:6]
    counts = {"rows": rows, "label_ends": rows, "offsets": offsets, "labels": labels}
    first = head.size + text
    places = accumulate((_KINDS[name].itemsize * counts[name] for name in names), initial=first)
    *starts, end = places
    if len(data) != end + 4:
        raise ManifestError(f"{path} has {len(data)} bytes, its head says {end + 4}: pack again")
    if checksum and zlib.crc32(memoryview(data)[:end]) != int.from_bytes(data[end:], "little"):
        raise ManifestError(f"{path} is damaged: its checksum is wrong")
    found = {
        name: np.frombuffer(data, _KINDS[name], counts[name], start)
        for name, start in zip(names, starts, strict=True)
    }
    if version == 1:
        sets = LabelSets.of_single(found["rows"]["label"], UNKNOWN_LABEL)
    else:
        sets = LabelSets(found["labels"], found["label_ends"])
    return Index(_header(path, data[head.size : first]), found["rows"], found["offsets"], sets)


def _header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is damaged: its header is not JSON") from error
    if not isinstance(header, dict):
        raise ManifestError(f"{path} is damaged: its header is not a JSON object")
    return header


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever is killed when."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
