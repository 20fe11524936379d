"""Where the bytes of a media file are: a file of their own, or a member of a tar.

`shards/train-000.tar/clip.mp4` names a member of a plain tar, as webdataset writes them. A tar is
listed once in each process and its members are then read in place, in any order.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from avmae_fast.data.clip import ClipError, require_file
from avmae_fast.data.shard_file import ShardFile, forget, open_shard

_TAR = ".tar"
# Listings kept: some 100 bytes a member.
_MOST_TARS = 4096


class Member(NamedTuple):
    """A member of a tar: its name, the byte it begins at and how many it has."""

    name: str
    at: int
    bytes: int


@dataclass(frozen=True)
class _Listing:
    """What a tar held when it had `size` bytes and had last been written to at `stamp`."""

    members: dict[str, Member]
    size: int
    stamp: int


def open_source(path: Path) -> "str | MemberFile":
    """What a decoder is to open: the absolute path of a file, or the bytes of a member of a tar.

    Raises:
        ClipError: `open`, there is no such file or member; `decode`, the tar has been written to
            since it was listed.
    """
    tar = _tar_of(path)
    if tar is None:
        require_file(path)
        # An absolute path cannot be taken for a URL.
        return str(path.absolute())
    listing = _listing_for(tar, path)
    member = listing.members.get(path.relative_to(tar).as_posix())
    if member is None:
        raise ClipError("open", path, f"{tar.name} has no such member")
    shard = open_shard(tar, listing.size, path)
    if shard.stamp != listing.stamp:
        forget(tar)
        detail = f"{tar.name} has been written to since its members were listed"
        raise ClipError("decode", path, detail)
    return MemberFile(shard, member, path)


def tar_members(tar: Path) -> Iterator[Member]:
    """The files in a plain tar, in their order.

    Raises:
        OSError, tarfile.TarError: it cannot be read, or is compressed.
    """
    with tarfile.open(tar, "r:") as archive:
        for info in archive:
            if info.isreg() and not info.issparse():
                yield Member(info.name.removeprefix("./"), info.offset_data, info.size)


class MemberFile(io.RawIOBase):
    """A member of a tar as a file of its own, read in place."""

    def __init__(self, shard: ShardFile, member: Member, path: Path) -> None:
        super().__init__()
        self._shard, self._member, self._path = shard, member, path
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._member.bytes}
        self._position = max(0, base[whence] + offset)
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._member.bytes - self._position)
        count = left if size is None or size < 0 else min(size, left)
        if not count:
            return b""
        data = self._shard.read(self._member.at + self._position, count, self._path)
        self._position += count
        return data


def _tar_of(path: Path) -> Path | None:
    """The tar that `path` leads through; None for an ordinary file."""
    if _TAR not in str(path):
        return None
    return next((p for p in path.parents if p.suffix == _TAR and not p.is_dir()), None)


def _listing_for(tar: Path, path: Path) -> _Listing:
    try:
        return _listing(tar)
    except (OSError, tarfile.TarError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ClipError("open", path, f"{tar.name}: {reason}") from error


@lru_cache(_MOST_TARS)
def _listing(tar: Path) -> _Listing:
    before = tar.stat()
    members = {member.name: member for member in tar_members(tar)}
    return _Listing(members, before.st_size, before.st_mtime_ns)
