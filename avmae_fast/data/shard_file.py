"""Open shards of this process, and the faults of a file that others may move, cut or overwrite."""

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avmae_fast.data.clip import ClipError

# A limit of 1024 open files is common, and a process opens other files too.
_MOST = 256

_SHARDS: "OrderedDict[Path, ShardFile]" = OrderedDict()


@dataclass
class ShardFile:
    """An open tar; `stamp` is when it was last written to, in nanoseconds."""

    path: Path
    descriptor: int
    stamp: int

    def read(self, at: int, count: int, record: Path) -> bytes:
        """`count` bytes from `at` on; raises as `read_array`."""
        return self.read_array(at, count, record).tobytes()

    def read_array(self, at: int, count: int, record: Path) -> NDArray[np.uint8]:
        """`count` bytes from `at` on.

        Raises:
            ClipError: `short` where the shard has been cut off, `decode` where it has been
                written to since this process opened it, `open` where the storage fails.
        """
        try:
            # A damaged index may ask for more than any file has, or than memory holds.
            whole = at + count <= os.fstat(self.descriptor).st_size
            data = np.empty(count if whole else 0, np.uint8)
            found = os.preadv(self.descriptor, [data.data], at) if data.size else 0
            now = os.fstat(self.descriptor)
        except OSError as error:
            forget(self.path)
            raise ClipError("open", record, str(error)) from error
        if not whole or found < count:
            detail = f"{self.path.name} ends at byte {now.st_size}, the record at {at + count}"
            raise ClipError("short", record, detail)
        if now.st_mtime_ns != self.stamp:
            detail = f"{self.path.name} has been written to since it was opened"
            raise ClipError("decode", record, detail)
        return data


def open_shard(path: Path, size: int, record: Path) -> ShardFile:
    """The shard at `path`, which had `size` bytes when it was packed.

    Raises:
        ClipError: `open`, it is missing, cannot be read or has another size.
    """
    shard = _SHARDS.get(path)
    if shard is None:
        shard = _SHARDS[path] = _open(path, size, record)
        if len(_SHARDS) > _MOST:
            forget(next(iter(_SHARDS)))
    _SHARDS.move_to_end(path)
    return shard


def forget(path: Path) -> None:
    """Close a shard; it is opened anew when it is next wanted."""
    shard = _SHARDS.pop(path, None)
    if shard is not None:
        os.close(shard.descriptor)


def _open(path: Path, size: int, record: Path) -> ShardFile:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ClipError("open", record, f"{path.name}: {error.strerror}") from error
    found = os.fstat(descriptor)
    if found.st_size != size:
        os.close(descriptor)
        detail = f"{path.name} has {found.st_size} bytes, the index says {size}"
        raise ClipError("open", record, detail)
    return ShardFile(path, descriptor, found.st_mtime_ns)
