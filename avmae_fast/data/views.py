"""All cuts of a clip that evaluation averages over, and what to do where a track is missing.

Temporal views begin at even distances from the clip's start to the last place where a window fits,
those of the sound at whole spectrogram frames; one alone is centred. Spatial views lie at both ends
and in the middle of the longer side of the picture. Source: the authors' loader (DMVR).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avmae_fast.data.clip import AUDIO_RATE_HZ, ClipError, ErrorKind
from avmae_fast.data.manifest import Manifest
from avmae_fast.data.samples import FileSource, SampleSpec, fill_sound, open_source
from avmae_fast.data.windows import centred_sound_start, centred_start, sound_spans, window_ticks
from avmae_fast.data.workers import Watch, open_pool

_HOP_SAMPLES = AUDIO_RATE_HZ // 100
# Records read ahead by each worker.
_AHEAD = 2


@dataclass(frozen=True)
class ClipViews:
    """The V views of one record, or why there are none.

    record: its number in the manifest.
    video: uint8 [V, T, H, W, 3], None where the clip has no picture or none is asked for.
    waveform: int16 [V, S], likewise.
    problem: why it could not be read; "" where it could.
    """

    record: int
    video: NDArray[np.uint8] | None
    waveform: NDArray[np.int16] | None
    problem: str = ""


def read_views(
    manifest: Manifest,
    spec: SampleSpec,
    temporal: int,
    spatial: int,
    *,
    workers: int,
    timeout_s: float,
) -> Iterator[ClipViews]:
    """The views of every record of a manifest, in order; `temporal * spatial` each.

    A clip that lacks a track has views of the other one. One that cannot be read at all is told and
    nothing takes its place.

    Args:
        workers: processes that read; 0 reads in this one.
        timeout_s: a worker that reads one record for longer is killed, and the record counts as
            one that cannot be read.
    """
    pool = open_pool(_ViewJob(manifest, spec, temporal, spatial), workers, timeout_s)
    try:
        done: dict[int, ClipViews] = {}
        submitted = 0
        for record in range(len(manifest)):
            while submitted < min(len(manifest), record + 1 + _AHEAD * workers):
                pool.submit(submitted)
                submitted += 1
            while record not in done:
                done |= {task: views for task, views in pool.wait() if views is not None}
            yield done.pop(record)
    finally:
        pool.close()


class _ViewJob:
    """Reads the views of a record; see `avmae_fast.data.workers.Job`."""

    def __init__(self, manifest: Manifest, spec: SampleSpec, temporal: int, spatial: int) -> None:
        self._manifest, self._temporal, self._spatial = manifest, temporal, spatial
        self._spec = replace(spec, missing_audio="silence", pixels="rgb")
        self._excluded: dict[int, str] = {}

    def exclude(self, record: int, kind: ErrorKind, detail: str) -> None:
        self._excluded[record] = f"{kind}: {detail}"

    def path(self, record: int) -> Path:
        return self._manifest[record].path

    def run(self, task: int, watch: Watch) -> ClipViews:
        if task in self._excluded:
            return ClipViews(task, None, None, self._excluded[task])
        with watch(task):
            try:
                return self._read(task, self._spec)
            except ClipError as error:
                if error.kind != "no_video" or not self._spec.samples:
                    return ClipViews(task, None, None, f"{error.kind}: {error.detail}")
            try:
                return self._read(task, replace(self._spec, frames=0))
            except ClipError as error:
                return ClipViews(task, None, None, f"{error.kind}: {error.detail}")

    def _read(self, record: int, spec: SampleSpec) -> ClipViews:
        with open_source(self._manifest[record], spec) as source:
            hears = bool(spec.samples) and source.has_audio
            if not spec.frames and not hears:
                raise ClipError("no_audio", self.path(record), "there is no audio track")
            video = self._pictures(source, spec) if spec.frames else None
            waveform = self._sound(source, spec) if hears else None
        return ClipViews(record, video, waveform)

    def _pictures(self, source: FileSource, spec: SampleSpec) -> NDArray[np.uint8]:
        shape = (self._temporal, self._spatial, spec.frames, *spec.crop, 3)
        out = np.empty(shape, np.uint8)
        extent = spec.frames * spec.stride
        centre = centred_start(source.ticks, spec.frames, spec.stride)
        for start, views in zip(
            _starts(source.ticks - extent, self._temporal, centre), out, strict=True
        ):
            ticks = window_ticks(start, source.ticks, spec.frames, spec.stride, spec.clip_end)
            for places, picture in source.pictures(ticks):
                corners = _corners(picture.shape, spec.crop, self._spatial)
                for (top, left), view in zip(corners, views, strict=True):
                    for place in places:
                        picture.write(view[place], top, left)
        return out.reshape(-1, *shape[2:])

    def _sound(self, source: FileSource, spec: SampleSpec) -> NDArray[np.int16]:
        out = np.zeros((self._temporal, self._spatial, spec.samples), np.int16)
        frames = (source.length - spec.samples) // _HOP_SAMPLES
        if self._temporal == 1:
            starts = [centred_sound_start(source.length, spec.samples)]
        else:
            starts = [_HOP_SAMPLES * frame for frame in _starts(frames, self._temporal, 0)]
        for start, views in zip(starts, out, strict=True):
            spans = sound_spans(start, spec.samples, source.length, spec.clip_end)
            fill_sound(views[0], source, list(spans))
            views[1:] = views[0]
        return out.reshape(-1, spec.samples)


def _starts(room: int, count: int, centre: int) -> list[int]:
    """Starts of `count` windows at even distances in 0..room; of one alone its centre."""
    if count == 1:
        return [centre]
    return [int(start) for start in np.linspace(0, max(0, room), count)]


def _corners(picture: tuple[int, ...], crop: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """Top and left of one central crop, or of three along the longer side."""
    room_y, room_x = picture[0] - crop[0], picture[1] - crop[1]
    centre = (room_y // 2, room_x // 2)
    if count == 1:
        return [centre]
    if room_y > room_x:
        return [(0, centre[1]), centre, (room_y, centre[1])]
    return [(centre[0], 0), centre, (centre[0], room_x)]
