"""Which record, window and view each position of the endless sequence of samples stands for.

Everything here is a pure function of (seed, position), so the sequence is the same for any number
of ranks, workers and micro-batches, and the position is all that a resumed run needs to know.

Positions count samples. A record gives `repeat = windows * views` samples in a row: `windows`
stretches of time drawn independently, of each of which `views` crops (and flips, and masks) are
taken. One pass over the records is `records * repeat` positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avmae_kernels.masking import keyed_uniform, permute

# Records tried in place of a bad one.
MAX_SUBSTITUTES = 8

# Uniform draws that place one sample: start, top, left, flip.
DRAWS = 4

# Streams of keyed randomness; 0 and 1 are the masks of video and audio.
_WINDOW_STREAM, _SUBSTITUTE_STREAM = 2, 3


@dataclass(frozen=True)
class Group:
    """Samples `first` to `first + count - 1`, all of the record with the number `record`."""

    first: int
    count: int
    record: int


@dataclass(frozen=True)
class Order:
    """The order of the samples of `records` records; each once a pass.

    shuffle: draw the order of each pass, the windows, crops and flips (training); otherwise records
        come in their own order and windows are centred (validation).
    """

    records: int
    seed: int
    shuffle: bool
    windows: int = 1
    views: int = 1

    @property
    def repeat(self) -> int:
        """Samples that a record gives in a row."""
        return self.windows * self.views

    def groups(self, first: int, count: int) -> list[Group]:
        """The samples from `first` on, cut where the record changes."""
        end = first + count
        numbers = np.arange(first // self.repeat, (end - 1) // self.repeat + 1)
        groups = []
        for number, record in zip(numbers.tolist(), self._records_of(numbers), strict=True):
            begin = max(first, number * self.repeat)
            until = min(end, (number + 1) * self.repeat)
            groups.append(Group(begin, until - begin, record))
        return groups

    def _records_of(self, numbers: NDArray[np.int64]) -> list[int]:
        """The record of each group, by ascending number of the group."""
        epochs, indices = np.divmod(numbers, self.records)
        if not self.shuffle:
            return indices.tolist()
        records: list[int] = []
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            of_epoch = indices[epochs == epoch]
            records += permute(of_epoch, self.records, key=epoch, seed=self.seed).tolist()
        return records

    def candidates(self, group: Group) -> Iterator[int]:
        """The group's record, then those that stand in for it where it cannot be read, in turn."""
        yield group.record
        # By the first position of the record, so that all its samples have the same substitutes.
        key = np.array([group.first - group.first % self.repeat], np.int64)
        draws = keyed_uniform(self.seed, key, _SUBSTITUTE_STREAM, MAX_SUBSTITUTES)[0]
        tried = [group.record]
        for u in draws[: self.records - 1]:
            tried.append(_pick_another(u, self.records, tried))
            yield tried[-1]

    def draws(self, group: Group) -> NDArray[np.float64] | None:
        """`DRAWS` uniform numbers for each sample of a group, [count, DRAWS]; None: centred."""
        if not self.shuffle:
            return None
        keys = np.arange(group.first, group.first + group.count)
        draws = keyed_uniform(self.seed, keys, _WINDOW_STREAM, DRAWS)
        if self.views > 1:
            # Views of a window begin where its first one does.
            leaders = keys - keys % self.views
            draws[:, 0] = keyed_uniform(self.seed, leaders, _WINDOW_STREAM, 1)[:, 0]
        return draws


def _pick_another(u: float, records: int, tried: list[int]) -> int:
    """A record that has not been tried, uniformly."""
    index = int(u * (records - len(tried)))
    for other in sorted(tried):
        index += index >= other
    return index
