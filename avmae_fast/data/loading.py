"""What a loader's worker does: read the samples of one record into their rows of a batch."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from avmae_fast.data.bad_files import Substitution
from avmae_fast.data.cache import RamCache
from avmae_fast.data.clip import ClipError, ErrorKind
from avmae_fast.data.manifest import Manifest
from avmae_fast.data.order import Group, Order
from avmae_fast.data.ring import Ring
from avmae_fast.data.samples import SampleSpec, Source, cut_into, open_source
from avmae_fast.data.stages import stage
from avmae_fast.data.workers import Watch

# Path, kind and detail of a ClipError. Kept itself, an error would keep the frames that it passed,
# and the pictures in them.
_Why = tuple[str, ErrorKind, str]


class LoadTask(NamedTuple):
    """Samples from position `first` on, all of one record, and the slot and first row they fill."""

    slot: int
    row: int
    first: int
    samples: int
    record: int


@dataclass(frozen=True)
class Loaded:
    """The files that could not be read on the way; `exhausted` if nothing took their place."""

    substituted: tuple[Substitution, ...]
    exhausted: bool


class LoadJob:
    """Reads the samples of a task; see `avmae_fast.data.workers.Job`.

    A sample is a function of (seed, position) and of the records that are excluded because they
    hang or crash their reader: for them, as for every bad file, the next candidate stands in.
    """

    def __init__(
        self,
        manifest: Manifest,
        spec: SampleSpec,
        order: Order,
        ring: Ring,
        cache: RamCache | None = None,
    ) -> None:
        self._manifest = manifest
        self._spec = spec
        self._order = order
        self._ring = ring
        self._cache = cache
        self._excluded: dict[int, tuple[ErrorKind, str]] = {}

    def exclude(self, record: int, kind: ErrorKind, detail: str) -> None:
        self._excluded[record] = (kind, detail)

    def path(self, record: int) -> Path:
        return self._manifest[record].path

    def run(self, task: LoadTask, watch: Watch) -> Loaded:
        with stage("order"):
            group = Group(task.first, task.samples, task.record)
            draws = self._order.draws(group)
            left = _windows(group, self._order.views)
        bad: list[Substitution] = []
        for record in self._order.candidates(group):
            with watch(record):
                errors = self._read(record, left, draws, task)
            left = [window for window in left if window in errors]
            for window, why in errors.items():
                bad += [Substitution(task.first + row, *why) for row in window]
            if not left:
                break
        return Loaded(tuple(bad), exhausted=bool(left))

    def _read(
        self,
        record: int,
        windows: list[range],
        draws: NDArray[np.float64] | None,
        task: LoadTask,
    ) -> dict[range, _Why]:
        """Fill the rows of some windows from a record; the windows that could not be read."""
        errors: dict[range, _Why] = {}
        try:
            with self._open(record) as source:
                for window in windows:
                    try:
                        self._fill(source, record, window, draws, task)
                    except ClipError as error:
                        errors[window] = _why(error)
        except ClipError as error:
            return dict.fromkeys(windows, _why(error))
        return errors

    def _open(self, record: int) -> AbstractContextManager[Source]:
        if record in self._excluded:
            kind, detail = self._excluded[record]
            raise ClipError(kind, self.path(record), detail)
        if self._cache is not None:
            return nullcontext(self._cache[record])
        return open_source(self._manifest[record], self._spec)

    def _fill(
        self,
        source: Source,
        record: int,
        window: range,
        draws: NDArray[np.float64] | None,
        task: LoadTask,
    ) -> None:
        """Cut one window into its rows of the slot, a row for each view."""
        slot = self._ring.arrays(task.slot)
        rows = slice(task.row + window.start, task.row + window.stop)
        of_window = None if draws is None else draws[window.start : window.stop]
        cut_into(source, self._spec, of_window, slot.video[rows], slot.waveform[rows])
        slot.labels[rows] = self._manifest[record].label
        slot.records[rows] = record
        slot.has_audio[rows] = source.has_audio


def _why(error: ClipError) -> _Why:
    return error.path, error.kind, error.detail


def _windows(group: Group, views: int) -> list[range]:
    """The samples of a group, counted from its first, by the window they are views of."""
    end = group.first + group.count
    cuts = [group.first, *range((group.first // views + 1) * views, end, views), end]
    return [range(a - group.first, b - group.first) for a, b in pairwise(cuts)]
