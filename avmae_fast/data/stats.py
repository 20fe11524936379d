"""What a set of clips holds: log-mel mean and deviation, durations, labels."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from avmae_fast.data.clip import AUDIO_RATE_HZ, ClipError
from avmae_fast.data.manifest import Manifest, Record, load_manifest
from avmae_fast.data.readers import open_record
from avmae_kernels.logmel import log_mel

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)

# Shorter sound makes no row of a spectrogram.
_LEAST_SAMPLES = 400


@dataclass
class Moments:
    """Mean and variance of values that come in pieces, in float64 (Chan et al., 1979)."""

    count: int = 0
    mean: float = 0.0
    _squares: float = 0.0

    def add(self, values: np.ndarray) -> None:
        if not values.size:
            return
        mean = float(values.mean(dtype=np.float64))
        squares = float(np.square(values - mean, dtype=np.float64).sum())
        total, delta = self.count + values.size, mean - self.mean
        self._squares += squares + delta * delta * self.count * values.size / total
        self.mean += delta * values.size / total
        self.count = total

    @property
    def std(self) -> float:
        """With the biased variance, 0 where there is nothing."""
        return float(np.sqrt(self._squares / self.count)) if self.count else 0.0


@dataclass
class ClipStats:
    """log_mel: of the sound of records that have some; durations in seconds.

    labels: how many records have each; those that have none count as "none".
    """

    log_mel: Moments = field(default_factory=Moments)
    durations_s: list[float] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    silent: int = 0
    bad: list[ClipError] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report."""
        hours = sum(self.durations_s) / 3600
        quantiles = "no record could be read"
        if self.durations_s:
            values = np.quantile(self.durations_s, _QUANTILES)
            names = ("least", "quarter", "median", "three quarters", "most")
            pairs = zip(names, values, strict=True)
            quantiles = ", ".join(f"{name} {value:.2f} s" for name, value in pairs)
        count = len(self.durations_s)
        report = [
            f"records   {count} ({hours:.2f} hours; {self.silent} without sound, "
            f"{len(self.bad)} cannot be read)",
            f"duration  {quantiles}",
        ]
        if self.log_mel.count:
            mean, std = self.log_mel.mean, self.log_mel.std
            report += [
                f"log-mel   mean {mean:.4f}, standard deviation {std:.4f}",
                f"          --set model.audio.mean={mean:.3f} --set model.audio.std={std:.3f}",
            ]
        report += [f"label     {name}: {n}" for name, n in sorted(self.labels.items())]
        return report + [f"bad       {error}" for error in self.bad]


def clip_stats(
    manifest: Path | str, progress: Callable[[int, int], object] = lambda done, records: None
) -> ClipStats:
    """Read the sound of every record of a manifest or a folder of packed clips, one at a time.

    Args:
        progress: called with (records done, records) after each.

    Raises:
        ManifestError: the manifest cannot be used.
    """
    records = load_manifest(manifest)
    stats = ClipStats()
    for done, record in enumerate(records, start=1):
        try:
            _add(stats, record)
            stats.labels.update(_labels(records, done - 1))
        except ClipError as error:
            stats.bad.append(error)
        progress(done, len(records))
    return stats


def _labels(manifest: Manifest, record: int) -> list[str]:
    return [manifest.classes[label] for label in manifest.labels(record)] or ["none"]


def _add(stats: ClipStats, record: Record) -> None:
    with open_record(record) as clip:
        duration_s = min(record.end_s, clip.info.duration_s) - record.start_s
        if duration_s <= 0:
            raise ClipError("short", record.path, f"it starts at {record.start_s} s")
        samples = round(duration_s * AUDIO_RATE_HZ)
        if not clip.info.has_audio or samples < _LEAST_SAMPLES:
            stats.silent += 1
        else:
            sound = clip.read_audio(round(record.start_s * AUDIO_RATE_HZ), samples)
            stats.log_mel.add(log_mel(torch.from_numpy(sound)[None]).numpy())
        stats.durations_s.append(duration_s)
