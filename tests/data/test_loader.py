"""Batches are a function of (seed, position) alone, and bad files cost nothing but themselves."""

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from itertools import islice
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from loader_cases import AUDIO, GOOD, ROWS, VIDEO
from loader_cases import assert_same as _assert_same
from loader_cases import make_config as _config
from loader_cases import take as _take
from media import shown_index

from avmae_fast.config import ConfigError
from avmae_fast.data import loader as loader_module
from avmae_fast.data.bad_files import TooManyBadFiles
from avmae_fast.data.loader import ClipLoader
from avmae_fast.data.manifest import ManifestError

# --- what a batch holds


def test_shapes_and_types(clips):
    (batch,) = _take(_config(clips, batch=3), 1)
    assert batch.video.shape == (3, 4, 64, 64, 3) and batch.video.dtype == torch.uint8
    assert batch.waveform.shape == (3, 63 * 160 + 400) and batch.waveform.dtype == torch.int16
    assert batch.keys.dtype == batch.labels.dtype == torch.int64
    assert batch.has_audio.tolist() == [True] * 3 and batch.substituted == ()
    assert len(batch) == 3


def test_pictures_and_sound_start_together(clips):
    starts = set()
    for batch in _take(_config(clips), 20):
        for video, waveform, label in zip(batch.video, batch.waveform, batch.labels, strict=True):
            shown = [shown_index(image.numpy()) for image in video]
            assert np.diff(shown).tolist() == [4, 4, 4]
            # The sound of sample n of clip i is n / 65536 (n / 2 of full scale 32768).
            length = (25 + 3 * int(label)) * 640
            position = (shown[0] * 640 + np.arange(len(waveform))) % length
            np.testing.assert_allclose(waveform.numpy(), position / 2, atol=1)
            starts.add(shown[0])
    # Windows are drawn from the whole clip, up to 52 - 12 in the longest.
    assert min(starts) < 4 and max(starts) > 30 and len(starts) > 20


def test_another_frame_rate_than_the_files(clips):
    for batch in _take(_config(clips, fps=10.0, stride=2), 3):
        for video in batch.video:
            shown = np.array([shown_index(image.numpy()) for image in video])
            first = shown[0] / 2.5
            assert shown.tolist() == [int((np.ceil(first) + 2 * k) * 2.5) for k in range(4)]


def test_crops_and_flips_vary(clips):
    model = {"video": replace(VIDEO, height=32, width=32), "audio": AUDIO}
    config = _config(clips, ["9.mov,0"], model=model, batch=16, flip=True)
    (batch,) = _take(config, 1)
    pictures = batch.video[:, 0].numpy()
    assert len({picture.tobytes() for picture in pictures}) > 12
    # Red rises from left to right in every picture, from right to left in a mirrored one.
    red = pictures[:, 30, :, 0].astype(int)
    mirrored = red[:, -1] < red[:, 0]
    assert 2 < mirrored.sum() < 14


def test_validation_is_centred_and_ends(clips):
    batches = _take(
        _config(clips, header="path,label,split", rows=[f"{r},val" for r in GOOD]), 9, "val"
    )
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch.labels for batch in batches]).tolist() == list(range(10))
    assert torch.cat([batch.keys for batch in batches]).tolist() == list(range(10))
    shown = [shown_index(video[0].numpy()) for batch in batches for video in batch.video]
    assert shown == [(25 + 3 * i - 16) // 2 for i in range(10)]


@pytest.mark.parametrize(
    ("clip_end", "shown"), [("wrap", [0, 10, 20, 5]), ("pad", [0, 10, 20, 24])]
)
def test_clip_shorter_than_a_window(clips, clip_end, shown):
    model = {"video": VIDEO, "audio": replace(AUDIO, frames=128)}
    config = _config(clips, ["0.mov,0"], stride=10, clip_end=clip_end, model=model, batch=1)
    (batch,) = _take(config, 1)
    assert [shown_index(image.numpy()) for image in batch.video[0]] == shown
    past_the_end = batch.waveform[0, 16000:].numpy()
    expected = np.arange(len(past_the_end)) / 2 if clip_end == "wrap" else 0.0
    np.testing.assert_allclose(past_the_end, np.broadcast_to(expected, past_the_end.shape), atol=1)


def test_one_frame_clip_stands_still(clips):
    (batch,) = _take(_config(clips, ["one_frame.mov,0"], batch=2), 1)
    assert [shown_index(image.numpy()) for image in batch.video[0]] == [0] * 4


def test_part_of_a_file(clips):
    config = _config(clips, ["9.mov,1,0.4,1.6"], header="path,label,start,end", batch=8)
    for batch in _take(config, 2):
        for video, waveform in zip(batch.video, batch.waveform, strict=True):
            shown = [shown_index(image.numpy()) for image in video]
            assert 10 <= shown[0] and shown[-1] < 40
            assert waveform[0] == pytest.approx(shown[0] * 320, abs=1)


@pytest.mark.parametrize("missing", ["video", "audio"])
def test_one_modality(clips, missing):
    model = {"video": VIDEO, "audio": AUDIO, missing: None, "fusion": "early"}
    rows = ["sound_only.mov,0"] if missing == "video" else ["no_sound.mp4,0"]
    for cache in ("none", "ram"):
        (batch,) = _take(_config(clips, rows, model=model, cache=cache, batch=2), 1)
        assert (batch.video is None) == (missing == "video")
        assert (batch.waveform is None) == (missing == "audio")
        assert batch.substituted == ()


# --- the same samples whatever happens


def test_each_record_once_an_epoch(clips):
    labels = torch.cat([batch.labels for batch in _take(_config(clips, batch=5), 6)]).reshape(3, 10)
    for epoch in labels:
        assert sorted(epoch.tolist()) == list(range(10))
    assert len({tuple(epoch.tolist()) for epoch in labels}) == 3


def test_seed_decides(clips):
    config = _config(clips)
    (first,), (again,) = _take(config, 1), _take(config, 1)
    _assert_same([first], [again])
    other = replace(config, train=replace(config.train, seed=43))
    assert not torch.equal(_take(other, 1)[0].video, first.video)


def test_any_number_of_workers_and_any_start(clips):
    config = _config(clips, ROWS)
    expected = _take(config, 8)
    assert any(batch.substituted for batch in expected)
    for count in (1, 2):
        there = replace(config, data=replace(config.data, workers=count))
        _assert_same(_take(there, 8), expected)
    _assert_same(_take(config, 3, start=20), expected[5:])
    # A start inside a batch: samples are the same, batches are cut elsewhere.
    shifted = _take(config, 2, start=6)
    assert torch.equal(shifted[0].video[:2], expected[1].video[2:])
    assert torch.equal(shifted[0].video[2:], expected[2].video[:2])


def test_iterating_again_starts_again(clips):
    config = _config(clips, workers=1)
    with ClipLoader(config) as loader:
        first = next(iter(loader))
        _assert_same([next(iter(loader))], [first])


# --- bad files


def test_substitutes(clips):
    config = _config(clips, ["0.mov,0", "random.mp4,1", "truncated.mp4,2", "missing.mp4,3"])
    with ClipLoader(config) as loader:
        batches = list(islice(loader, 12))
        bad = loader.bad_files
    seen = torch.cat([batch.labels for batch in batches])
    assert set(seen.tolist()) <= {0, 2}  # the truncated file can be read at its start
    kinds = {os.path.basename(file.path): file.kind for file in bad.files}
    assert kinds["random.mp4"] == kinds["missing.mp4"] == "open"
    assert kinds.get("truncated.mp4", "short") in ("short", "decode")
    tried = [s for batch in batches for s in batch.substituted]
    assert sum(file.count for file in bad.files) == len(tried)
    assert bad.samples == 48 and bad.bad_samples == len({s.position for s in tried})
    # Every sample of a bad file is replaced, none of a good one.
    assert bad.bad_samples >= 24


def test_no_substitute_left(clips):
    config = _config(clips, ["random.mp4,1", "missing.mp4,3"])
    with pytest.raises(
        TooManyBadFiles, match="2 records in a row .* By kind: 2 open. Files: .*mp4"
    ):
        _take(config, 1)


def test_no_substitute_left_in_a_worker(clips):
    with pytest.raises(TooManyBadFiles, match="9 records in a row could not be read"):
        _take(_config(clips, [f"missing{i}.mp4,0" for i in range(30)], workers=1), 1)


def test_too_many_bad_files_stop_the_run(clips):
    rows = [*GOOD, *(f"missing{i}.mp4,0" for i in range(5))]
    with pytest.raises(TooManyBadFiles, match="of .* samples .* data.max_bad_fraction is 1.0%"):
        _take(_config(clips, rows, max_bad_fraction=0.01), 10)


def test_record_after_the_end_of_its_file(clips):
    rows = ["0.mov,0,,", "1.mov,1,7.5,9"]
    config = _config(clips, rows, header="path,label,start,end")
    batches = _take(config, 2)
    (bad, *_) = [s for batch in batches for s in batch.substituted]
    assert bad.kind == "short" and "starts at 7.5 s, the file ends at 1.12 s" in bad.detail


def test_missing_sound(clips):
    rows = ["no_sound.mp4,5", "0.mov,0"]
    for batch in _take(_config(clips, rows), 3):
        assert batch.has_audio.all() and not batch.labels.any()
        assert all(bad.kind == "no_audio" for bad in batch.substituted)
    for batch in _take(_config(clips, rows, missing_audio="silence"), 3):
        assert batch.substituted == ()
        assert torch.equal(batch.has_audio, batch.labels == 0)
        assert not batch.waveform[~batch.has_audio].any()
        assert batch.waveform[batch.has_audio].any(dim=1).all()


# --- the cache


@pytest.mark.parametrize("data", [{}, {"fps": 10.0, "stride": 2}, {"clip_end": "pad"}], ids=str)
def test_cache_changes_no_byte(clips, data):
    config = _config(clips, ROWS[:-3] + ["random.mp4,8"], missing_audio="silence", **data)
    cached = replace(config, data=replace(config.data, cache="ram"))
    _assert_same(_take(cached, 10), _take(config, 10))


def test_cache_is_shared_with_workers_and_freed(clips, monkeypatch):
    from avmae_fast.data import cache as cache_module

    config = _config(clips, ROWS[:-3], cache="ram", workers=1)
    with ClipLoader(config) as loader:
        shared = loader._cache
        with ClipLoader(config, start=4) as other:
            assert other._cache is shared
        uncached = replace(config, data=replace(config.data, cache="none", workers=0))
        batches = list(islice(loader, 3))
        _assert_same(batches, _take(uncached, 3))
        file = shared._block._file
        os.fstat(file)
    del shared
    assert not cache_module._CACHES
    with pytest.raises(OSError):
        os.fstat(file)


def test_cache_that_does_not_fit(clips, monkeypatch):
    # Ten clips of 385 pictures in all: 4.7 MB of pictures and 0.5 MB of sound.
    monkeypatch.setattr("avmae_fast.data.cache.free_memory", lambda: 2**21)
    config = _config(clips, cache="ram")
    with pytest.raises(ConfigError, match="data.cache = 'ram' does not fit: 5 of 10 clips need"):
        ClipLoader(config)
    monkeypatch.setattr("avmae_fast.data.cache.free_memory", lambda: 2**23)
    ClipLoader(config).close()


# --- splits and settings


def test_splits(clips):
    header = "path,label,split"
    rows = ["0.mov,a,train", "1.mov,b,val", "2.mov,c,", "3.mov,c,test"]
    config = _config(clips, rows, header=header)
    assert [r.path.name for r in ClipLoader(config).manifest] == ["0.mov", "2.mov"]
    assert [r.path.name for r in ClipLoader(config, "val").manifest] == ["1.mov"]
    held_out = _config(clips, ["5.mov,c", "6.mov,b"]).data.manifest
    with_file = replace(config, data=replace(config.data, val_manifest=held_out))
    manifest = ClipLoader(with_file, "val").manifest
    assert manifest.classes == ("a", "b", "c") and [r.label for r in manifest] == [2, 1]
    with pytest.raises(ManifestError, match="no clips of the split val; mark rows val .*val_mani"):
        ClipLoader(_config(clips), "val")


def test_settings_that_cannot_work(clips, monkeypatch):
    with pytest.raises(
        ConfigError, match="data.short_side = 48 is not .* the crop, video.height x .* = 64 x 64"
    ):
        ClipLoader(_config(clips, short_side=48))
    with pytest.raises(ValueError, match="start must be a position, at least 0, got -4"):
        ClipLoader(_config(clips), start=-4)
    with pytest.raises(ValueError, match="rank must be from 0 to world - 1 = 1, got 2"):
        ClipLoader(_config(clips), rank=2, world=2)
    with pytest.raises(ConfigError, match="train.accumulate = 4 is not valid with 3 ranks"):
        ClipLoader(_config(clips), world=3)
    monkeypatch.setattr(loader_module, "free_memory", lambda: 2**16)
    with pytest.raises(ConfigError, match="data.workers = 2 .* MiB of memory, 0 MiB are free"):
        ClipLoader(_config(clips, workers=2))
    monkeypatch.undo()
    loader = ClipLoader(_config(clips))
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(iter(loader))


# --- processes


def test_workers_outlive_signals_and_end_with_the_loader(clips):
    before = set(active_children())
    with ClipLoader(_config(clips, workers=1)) as loader:
        batches = iter(loader)
        next(batches)
        (worker,) = set(active_children()) - before
        os.kill(worker.pid, 2)
        worker.terminate()
        for _ in range(6):  # more than had been fetched ahead
            next(batches)
        assert worker.is_alive()
    assert not worker.is_alive()


def _run_script(clips, config, body):
    """Runs a script with a `loader` of one worker; its output and how long it took."""
    script = clips / "script.py"
    text = f"""
        import os, signal
        from multiprocessing import active_children
        from pathlib import Path
        from avmae_fast.config import *
        from avmae_fast.data.loader import ClipLoader
        config = Config(
            model=ModelConfig.of_size("Ti", video={VIDEO!r}, audio={AUDIO!r}),
            data=DataConfig(manifest=Path({str(config.data.manifest)!r}), short_side=64, workers=1),
            train=TrainConfig(out=Path("."), batch=4, steps=1),
        )
        if __name__ == "__main__":
            loader = ClipLoader(config)
            print(len(next(iter(loader))))
            {body}
        """
    script.write_text(textwrap.dedent(text))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=90
    )
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


def test_a_script_that_forgets_to_close_ends(clips):
    _run_script(clips, _config(clips), body="pass")


@pytest.mark.slow
def test_a_hung_worker_does_not_keep_a_script_alive(clips):
    stop = "[os.kill(worker.pid, signal.SIGSTOP) for worker in active_children()]"
    _run_script(clips, _config(clips), body=stop)
