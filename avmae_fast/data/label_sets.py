"""Any number of labels for each record, held in two arrays: millions of records stay small."""

from collections.abc import Iterable, Sequence
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

    @classmethod
    def of_single(cls, labels: NDArray[np.signedinteger], none: int) -> Self:
        """One label a record, or no label where it is `none`."""
        known = labels != none
        return cls(labels[known].astype(np.int32), np.cumsum(known, dtype=np.int64))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The records of some sets, one after another."""
        counts = [np.diff(part.ends, prepend=0) for part in parts]
        ends = np.cumsum(np.concatenate([np.zeros(0, np.int64), *counts]))
        return cls(np.concatenate([np.zeros(0, np.int32), *(part.flat for part in parts)]), ends)

    def of_record(self, index: int) -> tuple[int, ...]:
        """The labels of one record, in the order in which they were given."""
        index = range(len(self.ends))[index]
        start = self.ends[index - 1] if index else 0
        return tuple(self.flat[start : self.ends[index]].tolist())

    def select(self, chosen: NDArray[np.bool_]) -> Self:
        """The labels of the chosen records."""
        counts = np.diff(self.ends, prepend=0)
        return type(self)(self.flat[np.repeat(chosen, counts)], np.cumsum(counts[chosen]))
