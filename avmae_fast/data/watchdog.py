"""What each worker is reading and since when, seen from outside: how a hang gets its name."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from avmae_fast.data.shared import SharedBlock, aligned
from avmae_fast.data.stages import STAGES, take_seconds

_NOTHING = -1
_RECORD, _SINCE_NS = 0, 1


@dataclass(frozen=True)
class Reading:
    """A worker has been reading the record with the number `record` for `seconds`."""

    record: int
    seconds: float
    since_ns: int


_SECONDS = len(STAGES) + 1  # and the processor time


class Board:
    """A row for each worker, in shared memory: it says what it does without being asked.

    A worker writes its own row alone. Values are single words, which no process sees half-written.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._cpu_s = 0.0
        self._block = SharedBlock("board", aligned(16 * workers) + 64 + 8 * workers * _SECONDS)
        for worker in range(workers):
            self.clear(worker)

    @property
    def _rows(self) -> np.ndarray:
        return self._block.array(np.int64, (self._workers, 2))

    @property
    def _generation(self) -> np.ndarray:
        return self._block.array(np.int64, (1,), aligned(16 * self._workers))

    @property
    def _seconds(self) -> np.ndarray:
        offset = aligned(16 * self._workers) + 64
        return self._block.array(np.float64, (self._workers, _SECONDS), offset)

    def clear(self, worker: int) -> None:
        """A worker reads nothing: it is new, or done."""
        self._rows[worker, _RECORD] = _NOTHING

    @contextmanager
    def reading(self, worker: int, record: int) -> Iterator[None]:
        """What a worker does while it reads a record."""
        row = self._rows[worker]
        # The time first: a record is never seen with the time of an earlier one.
        row[_SINCE_NS] = time.monotonic_ns()
        row[_RECORD] = record
        try:
            yield
        finally:
            row[_RECORD] = _NOTHING

    def look(self, worker: int) -> Reading | None:
        """What a worker is reading, None where it reads nothing."""
        row = self._rows[worker]
        record, since_ns = int(row[_RECORD]), int(row[_SINCE_NS])
        if record == _NOTHING:
            return None
        return Reading(record, (time.monotonic_ns() - since_ns) / 1e9, since_ns)

    @property
    def generation(self) -> int:
        """Tasks of an earlier generation are not worth doing any more."""
        return int(self._generation[0])

    def advance(self) -> None:
        """Begin a new generation."""
        self._generation[0] += 1

    def note_seconds(self, worker: int) -> None:
        """Add the seconds of this process's stages, and its processor time, to a worker's row."""
        row = self._seconds[worker]
        row[:-1] += take_seconds()
        before_s, self._cpu_s = self._cpu_s, time.process_time()
        row[-1] += self._cpu_s - before_s

    def seconds(self) -> dict[str, float]:
        """Seconds in each stage and of processor time (`cpu`), over all workers."""
        totals = self._seconds.sum(axis=0)
        return dict(zip((*STAGES, "cpu"), totals.tolist(), strict=True))
