"""Read packed clips again and say what is wrong with them."""

import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from avmae_fast.data.clip import ClipError
from avmae_fast.data.shard_encode import SUFFIXES, WAV_HEADER_BYTES
from avmae_fast.data.shard_index import Index, key_of, read_index
from avmae_fast.data.shard_manifest import ShardManifest
from avmae_fast.data.shard_reader import ShardReader

# Of so many records one is decoded, and the first of every shard.
_DECODED_EVERY = 50


@dataclass
class Verdict:
    """records: how many the index lists; decoded: how many were tried; what is wrong."""

    records: int = 0
    decoded: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)


def verify(out: Path | str, progress: Callable[[int], object] = lambda count: None) -> Verdict:
    """Check every byte of a folder of packed clips against its index, and decode some records.

    Args:
        out: the folder or its index file.
        progress: called with the number of records checked, after each shard.

    Raises:
        ManifestError: there is no index, or it is damaged.
    """
    manifest = ShardManifest.load(Path(out))
    index = read_index(manifest.source, checksum=True)
    verdict = Verdict(records=len(index.rows))
    for number, shard in enumerate(index.header["shards"]):
        path = manifest.source.parent / shard["name"]
        numbers = np.flatnonzero(index.rows["shard"] == number)
        verdict.problems += _check_shard(path, shard["bytes"], index, numbers)
        for record in numbers[::_DECODED_EVERY]:
            verdict.decoded += 1
            verdict.problems += _check_decodes(manifest, int(record))
        verdict.bytes += shard["bytes"]
        progress(len(numbers))
    return verdict


def _check_shard(path: Path, size: int, index: Index, numbers: np.ndarray) -> Iterator[str]:
    try:
        if (found := path.stat().st_size) != size:
            yield f"{path.name} has {found} bytes, the index says {size}"
            return
        with tarfile.open(path, "r:") as tar:
            members = {m.name: (m.offset_data, m.size) for m in tar}
        with path.open("rb") as file:
            for number in numbers:
                yield from _check_record(path, file, index, index.rows[number], members)
    except (OSError, tarfile.TarError) as error:
        yield f"{path.name} cannot be read: {error}"
        return
    if members:
        yield f"{path.name} has a member that the index does not know: {sorted(members)[0]}"


def _check_record(
    path: Path, file: BinaryIO, index: Index, row: np.void, members: dict[str, tuple[int, int]]
) -> Iterator[str]:
    """Compare one row with the tar; its members are taken out of `members`."""
    key = key_of(row)
    listed = {f"{key}.{SUFFIXES[index.header['codec']]}": _Part.of_video(row)}
    if row["samples"]:
        listed[f"{key}.wav"] = _Part.of_sound(row)
    for name, part in listed.items():
        found = members.pop(name, None)
        if found != (part.at - part.before, part.bytes + part.before):
            yield f"{path.name}: {name} is not where the index says"
        elif part.is_damaged(file):
            yield f"{path.name}: {name} is damaged: its checksum is wrong"
    at, size = members.pop(f"{key}.json", (0, 0))
    if _Part(at, size, 0, int(row["meta_crc"])).is_damaged(file):
        yield f"{path.name}: {key}.json is missing or damaged"
    offsets = index.frame_offsets(row)
    if (np.diff(offsets) <= 0).any() or offsets[-1] > row["video_bytes"]:
        yield f"{path.name}: the pictures of {key} are not where the index says"


@dataclass(frozen=True)
class _Part:
    """Bytes of a tar that the index bounds, `before` bytes after the start of a member."""

    at: int
    bytes: int
    before: int
    crc: int

    @classmethod
    def of_video(cls, row: np.void) -> "_Part":
        return cls(int(row["video_at"]), int(row["video_bytes"]), 0, int(row["video_crc"]))

    @classmethod
    def of_sound(cls, row: np.void) -> "_Part":
        size = 2 * int(row["samples"])
        return cls(int(row["sound_at"]), size, WAV_HEADER_BYTES, int(row["sound_crc"]))

    def is_damaged(self, file: BinaryIO) -> bool:
        file.seek(self.at)
        return zlib.crc32(file.read(self.bytes)) != self.crc


def _check_decodes(manifest: ShardManifest, number: int) -> Iterator[str]:
    record = manifest[number]
    try:
        with ShardReader(record) as reader:
            times_s = np.arange(len(record.frame_offsets) - 1) / record.fps
            reader.read_video(times_s, None)
            if record.samples:
                reader.read_audio(0, record.samples)
    except ClipError as error:
        yield str(error)
