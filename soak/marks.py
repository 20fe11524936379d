"""Where a trainer is, in a file that whoever kills it can read: the part of the run it is in.

A part is left for `between` when it is done; a process that is killed leaves the mark as it was.
"""

import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

PARTS = ("start", "step", "between", "validation", "checkpoint", "report")
_NOW, _STEPS = 0, 1
_ENTRIES = 2
_SPENT_NS = _ENTRIES + len(PARTS)
_WORDS = _SPENT_NS + len(PARTS)


class Marks:
    """The marks in a file; every word of it is written by the trainer alone."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8 * _WORDS)
        self._words = np.frombuffer(self._memory, np.int64)
        self._since_ns = time.monotonic_ns()

    @classmethod
    def fresh(cls, path: Path) -> "Marks":
        """A new file of them, for a trainer that has not begun."""
        path.write_bytes(bytes(8 * _WORDS))
        marks = cls(path)
        marks._words[_ENTRIES] = 1
        return marks

    @property
    def part(self) -> str:
        """The part it is in."""
        return PARTS[self._words[_NOW]]

    @property
    def steps(self) -> int:
        """Steps that are done."""
        return int(self._words[_STEPS])

    def entries(self, part: str) -> int:
        """How often it has begun a part."""
        return int(self._words[_ENTRIES + PARTS.index(part)])

    def usual_s(self, part: str) -> float:
        """Mean time of a part, as far as it was left again."""
        spent_s = int(self._words[_SPENT_NS + PARTS.index(part)]) / 1e9
        return spent_s / max(1, self.entries(part))

    def enter(self, part: str) -> None:
        now_ns = time.monotonic_ns()
        self._words[_SPENT_NS + self._words[_NOW]] += now_ns - self._since_ns
        self._since_ns = now_ns
        self._words[_ENTRIES + PARTS.index(part)] += 1
        self._words[_NOW] = PARTS.index(part)

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """What a trainer does while it is in a part."""
        self.enter(part)
        yield
        if part == "step":
            self._words[_STEPS] += 1
        self.enter("between")
