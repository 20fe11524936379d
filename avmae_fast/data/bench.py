"""How fast clips come out of a loader, where the time goes, and how many cores a rate needs."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from avmae_fast.config import Config
from avmae_fast.data.bad_files import TooManyBadFiles
from avmae_fast.data.loader import ClipLoader
from avmae_fast.data.readers import resolve_reader
from avmae_kernels.masking import MaskSpec, sample_masks

logger = logging.getLogger(__name__)

# Columns of the table: stages of the workers, and drawing masks in the training process.
COLUMNS = ("open", "decode", "convert", "sound", "copy", "order", "queue", "mask")

_BATCH = 8
_MASK_CLIPS, _MASK_CALLS = 64, 20


@dataclass(frozen=True)
class Measurement:
    """One reader with one number of workers and one way of repeated sampling.

    clips_per_s: samples that came out of the loader while nobody else kept it waiting.
    cpu_ms: processor time of the workers for a sample.
    ms: time of a worker for a sample by `COLUMNS`; `queue` is what it waited for tasks.
    bad: samples whose own file could not be read.
    """

    reader: str
    workers: int
    repeat: int
    clips: int
    clips_per_s: float
    cpu_ms: float
    ms: dict[str, float]
    bad: int

    def cores(self, clips_per_s: float) -> float:
        """Cores that are kept busy by loading this many samples a second."""
        return clips_per_s * self.cpu_ms / 1e3


def measure(
    config: Config,
    *,
    readers: Sequence[str],
    workers: Sequence[int],
    repeats: Sequence[int],
    clips: int,
) -> Iterator[Measurement]:
    """Load `clips` samples of the training split in every combination.

    Args:
        config: says which files, and how samples are cut out of them; readers, workers and
            `repeat_windows` are replaced.

    Raises:
        ConfigError, ManifestError: as `ClipLoader` does.
    """
    mask_ms = mask_ms_of(config)
    for reader in map(resolve_reader, readers):
        for count in workers:
            for repeat in repeats:
                data = replace(
                    config.data,
                    reader=reader,
                    workers=count,
                    repeat_windows=repeat,
                    repeat_views=1,
                    cache="none",
                    max_bad_fraction=1.0,
                )
                train = replace(config.train, batch=_BATCH * repeat, accumulate=1)
                setting = replace(config, data=data, train=train)
                try:
                    yield _measure_one(setting, reader, clips, mask_ms)
                except TooManyBadFiles as error:
                    # Another reader may well read them.
                    logger.warning("no figures for %s: %.300s ...", reader, error)


def _measure_one(config: Config, reader: str, clips: int, mask_ms: float) -> Measurement:
    with ClipLoader(config) as loader:
        batches = iter(loader)
        # Workers start, and all that is filled ahead is filled, before anything is timed.
        for _ in range(loader.ahead + 1):
            next(batches)
        before, began_s, bad = loader.seconds(), time.perf_counter(), loader.bad_files.bad_samples
        done = 0
        while done < clips:
            done += len(next(batches))
        seconds = time.perf_counter() - began_s
        after = loader.seconds()
        bad = loader.bad_files.bad_samples - bad
    ms = {name: 1e3 * (after[name] - before[name]) / done for name in after}
    ms |= {"queue": ms["wait"], "mask": mask_ms}
    return Measurement(
        reader=reader,
        workers=config.data.workers,
        repeat=config.data.repeat_windows,
        clips=done,
        clips_per_s=done / seconds,
        cpu_ms=ms["cpu"],
        ms={name: ms[name] for name in COLUMNS},
        bad=bad,
    )


def mask_ms_of(config: Config) -> float:
    """Time to draw the masks of one sample, in the training process."""
    keys = np.arange(_MASK_CLIPS, dtype=np.int64)
    total_s = 0.0
    for m in config.model.modalities:
        field = config.model.input(m)
        spec = MaskSpec(field.mask, field.grid, field.mask_ratio)
        sample_masks(spec, keys, seed=0, modality=m)
        began_s = time.perf_counter()
        for _ in range(_MASK_CALLS):
            sample_masks(spec, keys, seed=0, modality=m)
        total_s += time.perf_counter() - began_s
    return 1e3 * total_s / (_MASK_CALLS * _MASK_CLIPS)


def table(rows: Sequence[Measurement]) -> Iterator[str]:
    """The lines of a table, a measurement a row."""
    names = ("reader", "workers", "repeat", "clips/s", "cpu ms", *COLUMNS)
    yield "  ".join(f"{name:>{_width(name)}}" for name in names)
    for row in rows:
        yield line(row)


def line(row: Measurement) -> str:
    """One row of the table."""
    texts = {
        "reader": row.reader,
        "workers": str(row.workers),
        "repeat": str(row.repeat),
        "clips/s": f"{row.clips_per_s:.1f}",
        "cpu ms": f"{row.cpu_ms:.2f}",
        **{name: f"{row.ms[name]:.3f}" for name in COLUMNS},
    }
    return "  ".join(f"{text:>{_width(name)}}" for name, text in texts.items())


def _width(name: str) -> int:
    return max(len(name), 10 if name == "reader" else 7)


def advice(rows: Sequence[Measurement], clips_per_s: float) -> Iterator[str]:
    """What a training step that takes `clips_per_s` samples a second needs, a line a setting."""
    best: dict[tuple[str, int], Measurement] = {}
    for row in rows:
        key = (row.reader, row.repeat)
        if key not in best or row.cpu_ms < best[key].cpu_ms:
            best[key] = row
    for (reader, repeat), row in best.items():
        windows = f"{repeat} windows a record" if repeat > 1 else "one window a record"
        yield (
            f"{clips_per_s:g} clips/s with {reader}, {windows}: {row.cores(clips_per_s):.1f} cores "
            "like these"
        )
