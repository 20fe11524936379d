"""The cuts evaluation averages over: where they are, and what becomes of a missing track."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from avmae_fast.data.clip import AUDIO_RATE_HZ
from avmae_fast.data.manifest import Manifest, load_manifest
from avmae_fast.data.samples import SampleSpec
from avmae_fast.data.synth import synthesise
from avmae_fast.data.views import _corners, _starts, read_views

SPEC = SampleSpec(
    frames=4,
    crop=(16, 16),
    samples=8000,
    fps=10,
    stride=2,
    short_side=24,
    flip=True,
    clip_end="wrap",
    missing_audio="substitute",
    reader="pyav",
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("views") / "set"
    return synthesise(out, clips=3, classes=3, seconds=2.0, size=32, fps=10, workers=1)


def _listed(folder: Path, *paths: Path) -> Manifest:
    manifest = folder / "clips.csv"
    manifest.write_text("path\n" + "\n".join(map(str, paths)) + "\n")
    return load_manifest(manifest)


def test_starts_are_the_released_ones() -> None:
    """Four views of the sound of VGGSound: 800 of 1000 frames."""
    assert _starts(1000 - 800, 4, 100) == [0, 66, 133, 200]
    assert _starts(1000 - 800, 1, 100) == [100]
    assert _starts(-50, 4, 0) == [0, 0, 0, 0]  # shorter than a window


def test_corners() -> None:
    assert _corners((24, 40), (16, 16), 3) == [(4, 0), (4, 12), (4, 24)]
    assert _corners((40, 24), (16, 16), 3) == [(0, 4), (12, 4), (24, 4)]
    assert _corners((24, 40), (16, 16), 1) == [(4, 12)]


def test_views_of_a_clip(clips: Path) -> None:
    """Times first, then crops; crops of one time share their sound."""
    manifest = load_manifest(clips)
    shared = {"workers": 0, "timeout_s": 60.0}
    many = list(read_views(manifest, SPEC, 3, 3, **shared))
    assert [clip.record for clip in many] == [0, 1, 2]
    clip = many[0]
    assert clip.video is not None and clip.waveform is not None
    assert clip.video.shape == (9, 4, 16, 16, 3) and clip.waveform.shape == (9, 8000)
    assert (clip.waveform[0] == clip.waveform[2]).all()
    assert not (clip.waveform[0] == clip.waveform[8]).all()
    (one, *_) = read_views(manifest, SPEC, 1, 1, **shared)
    assert one.video is not None and one.video.shape == (1, 4, 16, 16, 3)
    # Its window is the middle one of three.
    np.testing.assert_array_equal(one.video[0], clip.video[4])


def test_sound_of_the_last_view_ends_the_clip(clips: Path) -> None:
    manifest = load_manifest(clips)
    spec = replace(SPEC, frames=0, samples=AUDIO_RATE_HZ)
    (first, *_) = read_views(manifest, spec, 2, 1, workers=0, timeout_s=60.0)
    whole = replace(spec, samples=2 * AUDIO_RATE_HZ)
    (all_of_it, *_) = read_views(manifest, whole, 1, 1, workers=0, timeout_s=60.0)
    assert first.waveform is not None and all_of_it.waveform is not None
    np.testing.assert_array_equal(first.waveform.reshape(-1), all_of_it.waveform[0])
    assert first.video is None


def test_missing_tracks_and_bad_files(clips: Path, tmp_path: Path) -> None:
    """A clip without a track has views of the other; one that is damaged has a reason."""
    import av

    whole = clips.parent / "clips/clip-00000.mp4"
    for kind in ("video", "audio"):
        with av.open(str(whole)) as source, av.open(str(tmp_path / f"{kind}.mp4"), "w") as target:
            stream = source.streams.get({kind: 0})[0]
            copy = target.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.dts is not None:
                    packet.stream = copy
                    target.mux(packet)
    (tmp_path / "broken.mp4").write_bytes(b"no media file")
    paths = [tmp_path / f"{name}.mp4" for name in ("video", "audio", "broken", "absent")]
    manifest = _listed(tmp_path, *paths, whole)
    found = list(read_views(manifest, SPEC, 2, 1, workers=0, timeout_s=60.0))
    has = [(clip.video is not None, clip.waveform is not None) for clip in found]
    assert has == [(True, False), (False, True), (False, False), (False, False), (True, True)]
    assert [bool(clip.problem) for clip in found] == [False, False, True, True, False]
    (deaf, *_) = read_views(manifest, replace(SPEC, frames=0), 1, 1, workers=0, timeout_s=60.0)
    assert deaf.problem == "no_audio: there is no audio track"


def test_workers_change_nothing(clips: Path) -> None:
    manifest = load_manifest(clips)
    alone = list(read_views(manifest, SPEC, 2, 1, workers=0, timeout_s=60.0))
    shared = list(read_views(manifest, SPEC, 2, 1, workers=2, timeout_s=60.0))
    for a, b in zip(alone, shared, strict=True):
        assert a.record == b.record and a.video is not None and a.waveform is not None
        np.testing.assert_array_equal(a.video, b.video)
        np.testing.assert_array_equal(a.waveform, b.waveform)
