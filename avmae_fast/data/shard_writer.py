"""Write a shard: a plain tar that any webdataset reader streams, and the index rows beside it."""

import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from avmae_fast.data.label_sets import LabelSets
from avmae_fast.data.shard_encode import WAV_HEADER_BYTES, Packed
from avmae_fast.data.shard_index import ROW, Index, key_of, sync_folder, write_whole

_BLOCK = 512
# tar ends with two blocks of zeros and fills up to 20 blocks.
_RECORD = 20 * _BLOCK


@dataclass
class ShardWriter:
    """A tar under a temporary name until `finish` gives it its own; a context manager.

    job: part of the temporary name, so that a process left over from a killed job cannot touch
        the files of the next.
    """

    path: Path
    job: str
    rows: list[np.ndarray] = field(default_factory=list)
    size: int = 0

    def __post_init__(self) -> None:
        self._partial = self.path.with_name(f"{self.path.name}.partial-{self.job}")
        self._offsets: list[np.ndarray] = []
        self._offset_count = 0
        self._decoders: list[str] = []
        self._labels: list[Sequence[int]] = []
        # Unbuffered: a full disk is met where something is written, not when the file is closed.
        self._file = self._partial.open("wb", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def add(self, packed: Packed, meta: bytes, labels: Sequence[int], **columns: object) -> None:
        """Append one record; `columns` are those fields of its row that the packer knows."""
        row = np.zeros((), ROW)
        for name, value in columns.items():
            row[name] = value
        key = key_of(row)
        decoder = packed.decoder.hex()
        if decoder not in self._decoders:
            self._decoders.append(decoder)
        row["decoder"] = self._decoders.index(decoder)
        row["height"], row["width"] = packed.shape
        row["frames"] = len(packed.offsets) - 1
        row["first_offset"] = self._offset_count
        row["video_bytes"], row["video_crc"] = len(packed.video), zlib.crc32(packed.video)
        row["video_at"] = self._member(f"{key}.{packed.suffix}", packed.video)
        if packed.sound is not None:
            row["sound_at"] = self._member(f"{key}.wav", packed.sound) + WAV_HEADER_BYTES
            row["samples"] = (len(packed.sound) - WAV_HEADER_BYTES) // 2
            row["sound_crc"] = zlib.crc32(memoryview(packed.sound)[WAV_HEADER_BYTES:])
        row["meta_crc"] = zlib.crc32(meta)
        self._member(f"{key}.json", meta)
        self._offsets.append(packed.offsets)
        self._offset_count += len(packed.offsets)
        self._labels.append(labels)
        self.rows.append(row)

    def _member(self, name: str, data: bytes) -> int:
        """Append a file; returns where its content begins."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        at = self.size
        self._write(data + bytes(-len(data) % _BLOCK))
        return at

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while len(view):
            written = self._file.write(view)
            self.size += written or 0
            view = view[written:]

    def finish(self, header: dict[str, Any]) -> None:
        """Give index and tar their names, in this order: a tar that has its name is complete."""
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self.size % _RECORD))
        os.fsync(self._file.fileno())
        header = header | {"bytes": self.size, "decoders": self._decoders}
        offsets = np.concatenate([np.zeros(0, np.uint32), *self._offsets]).astype(np.uint32)
        rows = np.array(self.rows, ROW)
        index = Index(header, rows, offsets, LabelSets.of(self._labels))
        write_whole(index_beside(self.path), index.to_bytes())
        os.replace(self._partial, self.path)
        sync_folder(self.path.parent)


def index_beside(shard: Path) -> Path:
    """The index of one shard."""
    return shard.with_suffix(".idx")
