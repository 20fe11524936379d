"""The index of packed clips: where each record's pictures and sound lie in the shards.

A file is a head (8 bytes of magic, then version, length of the header, number of rows and of
offsets as little-endian u32, u32, u64, u64), a JSON header padded to 64 bytes, the rows, the
offsets, and the CRC-32 of all that. Every shard has such a file beside it and the folder has one
of all shards. Rows and offsets are mapped, not read, so that workers share them.
"""

import json
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avmae_fast.data.manifest import ManifestError

INDEX_NAME = "index.avmae"
SHARD_SUFFIX = ".tar"

_MAGIC = b"AVMAEIDX"
_VERSION = 1
_HEAD = struct.Struct("<8sIIQQ")
_ALIGN = 64

# One record. `clip` and `segment` say which row of the manifest and which part of it this is;
# `video_at` and `sound_at` are bytes in the tar: of the video member, and of the first sample.
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


@dataclass(frozen=True, eq=False)
class Index:
    """header: what holds for all rows; rows: [R] of `ROW`; offsets: uint32 [O]."""

    header: dict[str, Any]
    rows: NDArray[np.void]
    offsets: NDArray[np.uint32]

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
        text = json.dumps(self.header, sort_keys=True).encode()
        text += b" " * (-(_HEAD.size + len(text)) % _ALIGN)
        head = _HEAD.pack(_MAGIC, _VERSION, len(text), len(self.rows), len(self.offsets))
        body = head + text + self.rows.tobytes() + self.offsets.tobytes()
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
            if os.fstat(file.fileno()).st_size < _HEAD.size:
                raise ManifestError(f"{path} is not an index of packed clips: it is too short")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        remedy = f"; is {path.parent} packed to the end? `avmae pack` writes the index last"
        raise ManifestError(f"{path} cannot be read: {error.strerror}{remedy}") from error
    magic, version, text, rows, offsets = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise ManifestError(f"{path} is not an index of packed clips")
    if version != _VERSION:
        raise ManifestError(f"{path} has format {version}, this program reads {_VERSION}")
    first = _HEAD.size + text
    end = first + rows * ROW.itemsize + offsets * 4
    if len(data) != end + 4:
        raise ManifestError(f"{path} has {len(data)} bytes, its head says {end + 4}: pack again")
    if checksum and zlib.crc32(memoryview(data)[:end]) != int.from_bytes(data[end:], "little"):
        raise ManifestError(f"{path} is damaged: its checksum is wrong")
    return Index(
        _header(path, data[_HEAD.size : first]),
        np.frombuffer(data, ROW, rows, first),
        np.frombuffer(data, np.uint32, offsets, first + rows * ROW.itemsize),
    )


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
