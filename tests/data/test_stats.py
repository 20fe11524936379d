"""Statistics of a set equal those of all its values at once."""

import numpy as np
import pytest
import torch
from media import tone, truncate, write_clip

from avmae_fast.cli import main
from avmae_fast.data.pack import pack
from avmae_fast.data.pack_clips import PackOptions
from avmae_fast.data.stats import Moments, clip_stats
from avmae_kernels.logmel import log_mel


def test_moments_of_pieces():
    rng = np.random.default_rng(0)
    # Far from zero, where the difference of two sums would lose the variance.
    pieces = [rng.normal(1e4, 0.1, n) for n in (1, 500, 0, 20)]
    moments = Moments()
    for piece in pieces:
        moments.add(piece)
    values = np.concatenate(pieces)
    assert moments.count == 521
    assert moments.mean == pytest.approx(values.mean(), rel=1e-14)
    assert moments.std == pytest.approx(values.std(), rel=1e-9)
    assert Moments().std == 0.0


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stats")
    for name, seconds, hz in (("a", 1.0, 300.0), ("b", 2.0, 2000.0)):
        path = folder / f"{name}.mov"
        sound = tone(seconds, 16000, hz)
        write_clip(path, frames=int(25 * seconds), size=(64, 64), sound=sound)
    write_clip(folder / "c.mp4", frames=20, size=(64, 64), sound=np.zeros(0, np.float32))
    truncate(write_clip(folder / "d.mp4", frames=20, size=(64, 64), faststart=False), 0.5)
    rows = ["a.mov,low", "b.mov,high", "c.mp4,", "d.mp4,low", "b.mov,high"]
    (folder / "clips.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    return folder / "clips.csv"


def test_of_files_and_of_shards(manifest, tmp_path, capsys):
    from avmae_fast.data.readers import open_clip

    spectrograms = []
    for name, seconds in (("a", 1), ("b", 2), ("b", 2)):
        with open_clip(manifest.parent / f"{name}.mov") as clip:
            sound = clip.read_audio(0, 16000 * seconds)
        spectrograms.append(log_mel(torch.from_numpy(sound)[None])[0])
    values = torch.cat(spectrograms).double()
    pack(manifest, tmp_path, PackOptions(short_side=64), jobs=1)
    for source, bad in ((manifest, 1), (tmp_path, 0)):
        stats = clip_stats(source)
        assert stats.log_mel.mean == pytest.approx(float(values.mean()), rel=1e-6)
        assert stats.log_mel.std == pytest.approx(float(values.std(correction=0)), rel=1e-6)
        assert stats.durations_s == pytest.approx([1.0, 2.0, 0.8, 2.0])
        assert stats.labels == {"low": 1, "high": 2, "none": 1}
        assert stats.silent == 1 and len(stats.bad) == bad
    assert main(["stats", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"--set model.audio.mean={values.mean():.3f}" in printed
    assert "label     high: 2" in printed and "1 without sound" in printed
