"""Memory that this process and its workers share, without a name that could outlive them."""

import mmap
import os
import weakref
from functools import cached_property
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

# Arrays start at multiples of this: a cache line, and the width of the widest vectors.
ALIGNMENT = 64


def aligned(offset: int) -> int:
    """The first multiple of `ALIGNMENT` that is not below `offset`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


class SharedBlock:
    """`size` bytes of zeros that are freed with the last process that maps them, however it ends.

    A block travels to a process that is being started, and only then. It lies outside /dev/shm, so
    neither a small one (as in containers) nor a killed run matters.
    """

    def __init__(self, name: str, size: int) -> None:
        self.size = max(size, 1)
        self._adopt(os.memfd_create(f"avmae_fast {name}"))
        os.ftruncate(self._file, self.size)

    def _adopt(self, file: int) -> None:
        self._file = file
        weakref.finalize(self, os.close, file)

    def __getstate__(self) -> dict[str, Any]:
        return {"file": DupFd(self._file), "size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.size = state["size"]
        self._adopt(state["file"].detach())

    @cached_property
    def memory(self) -> mmap.mmap:
        """The block in this process's memory, writable."""
        return mmap.mmap(self._file, self.size)

    def array(self, dtype: DTypeLike, shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """Part of the block, `offset` bytes from its start; it keeps the memory mapped."""
        count = int(np.prod(shape))
        return np.frombuffer(self.memory, dtype, count, offset).reshape(shape)


def free_memory() -> int:
    """Bytes that can be used without swapping, under the limit of the container if there is one."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or "max": no limit
        pass
    return max(free, 0)
