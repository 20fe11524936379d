"""Any number of labels for each record, held in two arrays: millions of records stay small."""

from collections.abc import Iterable
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray


class LabelSets(NamedTuple):
    """The labels of record i are `flat[ends[i - 1] : ends[i]]`.

    flat: int32, the labels of all records.
    ends: int64 [R].
    """

    flat: NDArray[np.int32]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, sets: Iterable[Iterable[int]]) -> Self:
        lists = [list(labels) for labels in sets]
        flat = np.array([label for labels in lists for label in labels], np.int32)
        return cls(flat, np.cumsum([len(labels) for labels in lists], dtype=np.int64))

    def of_record(self, index: int) -> tuple[int, ...]:
        """The labels of one record, in the order in which they were given."""
        index = range(len(self.ends))[index]
        start = self.ends[index - 1] if index else 0
        return tuple(self.flat[start : self.ends[index]].tolist())

    def select(self, chosen: NDArray[np.bool_]) -> Self:
        """The labels of the chosen records."""
        counts = np.diff(self.ends, prepend=0)
        return type(self)(self.flat[np.repeat(chosen, counts)], np.cumsum(counts[chosen]))
