"""Which files could not be read, how often that cost a sample, and when it is too much."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Never

from avmae_fast.data.clip import ErrorKind

# Fewer bad samples than this never stop a run (unless no bad file is allowed at all) ...
MIN_BAD_SAMPLES = 5
# ... nor do more, until their number is this many standard deviations above the limit.
_DEVIATIONS = 3.0

_LISTED = 10


@dataclass(frozen=True)
class Substitution:
    """At `position` the file `path` could not be read, so another record was tried."""

    position: int
    path: str
    kind: ErrorKind
    detail: str


@dataclass(frozen=True)
class BadFile:
    """A file that could not be read: why at first, and how many times it was met."""

    path: str
    kind: ErrorKind
    detail: str
    count: int


class TooManyBadFiles(ValueError):
    """So many files cannot be read that the data set is not what the run was set up for."""


class BadFiles:
    """Counts samples and the bad files met on the way to them.

    A run stops when the share of samples whose own file was bad is above `max_fraction` by more
    than chance: at least `MIN_BAD_SAMPLES` of them, and three standard deviations above
    `max_fraction * samples`. With `max_fraction` 0 the first one stops it.
    """

    def __init__(self, max_fraction: float) -> None:
        self._max_fraction = max_fraction
        self._files: dict[str, BadFile] = {}
        self.samples = 0
        self.bad_samples = 0

    @property
    def files(self) -> tuple[BadFile, ...]:
        """Each bad file once, in the order in which they were met."""
        return tuple(self._files.values())

    @property
    def kinds(self) -> dict[str, int]:
        """How many times a file could not be read, by kind."""
        counts: Counter[str] = Counter()
        for file in self._files.values():
            counts[file.kind] += file.count
        return dict(counts)

    def add(self, samples: int, substituted: Sequence[Substitution]) -> None:
        """Count a batch.

        Raises:
            TooManyBadFiles: the limit is passed.
        """
        self.samples += samples
        self.bad_samples += len({bad.position for bad in substituted})
        for bad in substituted:
            self._count(bad)
        expected = self._max_fraction * self.samples
        limit = expected + _DEVIATIONS * math.sqrt(expected)
        least = MIN_BAD_SAMPLES if self._max_fraction > 0 else 1
        if self.bad_samples >= least and self.bad_samples > limit:
            share = self.bad_samples / self.samples
            raise TooManyBadFiles(
                f"{self.bad_samples} of {self.samples} samples ({share:.1%}) could not be read, "
                f"data.max_bad_fraction is {self._max_fraction:.1%}. {self._summary()}"
            )

    def give_up(self, substituted: Sequence[Substitution]) -> Never:
        """Raise TooManyBadFiles for a sample in whose place nothing could be read."""
        for bad in substituted:
            self._count(bad)
        tries = sum(bad.position == substituted[-1].position for bad in substituted)
        raise TooManyBadFiles(
            f"{tries} records in a row could not be read, the last being tried in the place of the "
            f"first. {self._summary()}"
        )

    def _count(self, bad: Substitution) -> None:
        known = self._files.get(bad.path)
        if known is None:
            log = logging.getLogger(__name__)
            log.warning("%s: %s: %s; another clip takes its place", bad.path, bad.kind, bad.detail)
        first = known or BadFile(bad.path, bad.kind, bad.detail, 0)
        self._files[bad.path] = BadFile(first.path, first.kind, first.detail, first.count + 1)

    def _summary(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        listed = "; ".join(f"{f.path} ({f.kind}: {f.detail})" for f in self.files[:_LISTED])
        more = len(self._files) - _LISTED
        text = f"By kind: {kinds}. Files: {listed}" + (f" and {more} more" if more > 0 else "")
        if "no_audio" in self.kinds:
            text += ". With data.missing_audio = 'silence' files without sound are used"
        return text
