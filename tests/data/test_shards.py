"""Training from packed clips: the windows of the media files, and what faults of shards do."""

import os
import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from media import shown_index, write_clip

from avmae_fast.cli import main
from avmae_fast.config import (
    AudioConfig,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    VideoConfig,
)
from avmae_fast.data import shard_decode, shard_file
from avmae_fast.data.clip import TIME_TOLERANCE_S, ClipError
from avmae_fast.data.loader import ClipLoader
from avmae_fast.data.manifest import ManifestError, load_manifest
from avmae_fast.data.pack import pack
from avmae_fast.data.pack_clips import PackOptions
from avmae_fast.data.pack_verify import verify
from avmae_fast.data.readers import open_clip, open_record
from avmae_fast.data.shard_index import read_index
from avmae_kernels.jpeg import JpegDecoder
from avmae_kernels.yuv import i420_to_rgb

FPS = 12.5  # every second picture of the files
VIDEO = VideoConfig(frames=4, height=64, width=64, tubelet=(2, 16, 16))
AUDIO = AudioConfig(frames=64)


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Ten clips of 1.6 to 2.7 s, whose sound is the number of the sample, and their manifest."""
    folder = tmp_path_factory.mktemp("raw")
    for i in range(10):
        frames = 40 + 3 * i
        ramp = np.arange(frames * 640, dtype=np.float32) / 65536
        path = folder / f"{i}.mov"
        write_clip(path, frames=frames, size=(64, 80), sound=ramp, audio_codec="pcm_s16le")
    rows = [f"{i}.mov,{i},{'val' if i > 7 else 'train'}" for i in range(10)]
    (folder / "clips.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
    return folder / "clips.csv"


@pytest.fixture(scope="session", params=["h264", "mjpeg"])
def shards(request, raw, tmp_path_factory):
    if request.param == "mjpeg":
        pytest.importorskip("simplejpeg")
    folder = tmp_path_factory.mktemp(request.param)
    pack(raw, folder, _options(request.param), jobs=1)
    return folder


@pytest.fixture
def copied(raw, tmp_path_factory, tmp_path):
    """A folder of H.264 shards that a test may damage."""
    pack(raw, tmp_path / "shards", _options("h264"), jobs=1)
    yield tmp_path / "shards"
    shard_file.forget(tmp_path / "shards" / "shard-00000-00.tar")


def _options(codec):
    return PackOptions(codec=codec, short_side=64, fps=FPS, crf=18, quality=90)


def _config(manifest, **data):
    defaults = {"workers": 0, "short_side": 64, "fps": FPS, "stride": 2, "max_bad_fraction": 0.9}
    return Config(
        model=ModelConfig.of_size("Ti", video=VIDEO, audio=AUDIO),
        data=DataConfig(manifest=manifest, **(defaults | data)),
        train=TrainConfig(out=manifest.parent, batch=4, steps=1),
    )


def _take(config, count, split="train", start=0):
    with ClipLoader(config, split, start) as loader:
        return list(islice(loader, count))


def _shown(pictures):
    return [shown_index(np.asarray(picture)) for picture in pictures]


# --- the windows of the media files


def test_pictures_and_sound_of_the_file(raw, shards):
    rng = np.random.default_rng(0)
    for record, packed in zip(load_manifest(raw), load_manifest(shards), strict=True):
        times_s = np.append(rng.uniform(0, 4, 12), 0.0)  # any order, some past the end
        with open_clip(record.path) as clip, open_record(packed) as ours:
            assert ours.info.duration_s == pytest.approx(clip.info.duration_s)
            # The picture on display at a time is that of the packed clock's last tick.
            ticks = np.floor((times_s + TIME_TOLERANCE_S) * FPS)
            ticks = np.minimum(ticks, len(packed.frame_offsets) - 2)
            expected = clip.read_video(ticks / FPS, 64)
            found = ours.read_video(times_s, 64)
            assert _shown(found) == _shown(expected)
            assert np.abs(found.astype(int) - expected).mean() < 6
            for start, samples in ((0, 10), (700, 30000), (-50, 100), (10**6, 5)):
                heard = ours.read_audio(start, samples)
                assert (heard == clip.read_audio(start, samples)).all()
            assert ours.read_video(np.zeros(0), None).shape == (0, 0, 0, 3)


def test_the_loader_gives_the_same_windows(raw, shards):
    # Flips and crops are drawn alike too, so what is left is what coding lost.
    for split in ("train", "val"):
        theirs = _take(_config(raw), 6, split)
        for ours, batch in zip(_take(_config(shards), 6, split), theirs, strict=True):
            assert torch.equal(ours.labels, batch.labels) and torch.equal(ours.keys, batch.keys)
            assert torch.equal(ours.waveform, batch.waveform)
            assert (ours.video.int() - batch.video.int()).abs().float().mean() < 6
            assert ours.substituted == ()


def test_any_number_of_workers_and_any_start(shards):
    config = _config(shards)
    expected = _take(config, 4)
    with_worker = _take(replace(config, data=replace(config.data, workers=1)), 4)
    resumed = _take(config, 2, start=8)
    for ours, batch in zip([*with_worker, *resumed], [*expected, *expected[2:]], strict=True):
        assert torch.equal(ours.video, batch.video) and torch.equal(ours.waveform, batch.waveform)


def test_cache_in_memory(shards):
    (ours,), (batch,) = _take(_config(shards, cache="ram"), 1), _take(_config(shards), 1)
    assert torch.equal(ours.video, batch.video) and torch.equal(ours.waveform, batch.waveform)


def test_other_size_than_packed(shards, caplog):
    with open_record(load_manifest(shards)[3]) as clip:
        pictures = clip.read_video(np.array([0.0, 0.8]), 32)
        assert pictures.shape == (2, 32, 40, 3) and _shown(pictures) == [0, 20]
        assert clip.read_video(np.array([0.8]), None).shape == (1, 64, 80, 3)
    with ClipLoader(_config(shards, short_side=128, fps=25.0, stride=3)):
        pass
    assert "resizing them costs more" in caplog.text
    assert "asks for pictures every 0.12 s" in caplog.text and "0.08 s apart" in caplog.text


def test_fitting_clock_is_not_warned_of(shards, caplog):
    with ClipLoader(_config(shards, fps=25.0, stride=4)):
        pass
    assert not caplog.records


@pytest.mark.parametrize("library", ["simplejpeg", "FFmpeg"])
def test_jpegs_by_other_decoders(shards, monkeypatch, library):
    record = load_manifest(shards)[0]
    if record.codec != "mjpeg":
        pytest.skip("H.264 is always decoded by FFmpeg")
    times_s = np.arange(8) / FPS
    with open_record(record) as clip:
        expected = clip.read_video(times_s, None)
        monkeypatch.setattr(JpegDecoder, "decode", lambda self, data: None)
        if library == "FFmpeg":
            monkeypatch.setattr(shard_decode, "_simplejpeg", lambda: None)
        found = clip.read_video(times_s, None)
    # Two decoders round their transforms apart.
    assert np.abs(found.astype(int) - expected).mean() < 2


def test_classes_of_another_manifest(shards):
    names = [f"c{i}" for i in range(3)] + [str(i) for i in range(10)]
    manifest = load_manifest(shards, names)
    assert [record.label for record in manifest] == list(range(3, 13))
    with pytest.raises(ManifestError, match="has the class '0', which is not one of the 1 known"):
        load_manifest(shards, ["a"])


# --- the index


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda data: data[:10], "too short"),
        (lambda data: b"x" + data[1:], "not an index"),
        (
            lambda data: data[:8] + b"\x07" + data[9:],
            "has format 7, this program reads 1 to 2: update avmae_fast",
        ),
        (lambda data: data[:-100], "its head says"),
    ],
)
def test_damaged_index(shards, tmp_path, damage, text):
    path = tmp_path / "index.avmae"
    path.write_bytes(damage((shards / "index.avmae").read_bytes()))
    with pytest.raises(ManifestError, match=text):
        load_manifest(path)


def test_damage_inside_the_index(shards, tmp_path):
    data = bytearray((shards / "index.avmae").read_bytes())
    data[-50] ^= 1
    (tmp_path / "index.avmae").write_bytes(data)
    read_index(tmp_path)
    with pytest.raises(ManifestError, match="its checksum is wrong"):
        verify(tmp_path)


def test_unfinished_folder(tmp_path):
    with pytest.raises(ManifestError, match="No such file.*`avmae pack` writes the index last"):
        load_manifest(tmp_path)


# --- faults of a shard


def _tar(folder):
    return folder / "shard-00000-00.tar"


def _kinds(folder):
    """What reading each record of a folder raises, by kind."""
    kinds = []
    for record in load_manifest(folder):
        try:
            with open_record(record) as clip:
                clip.read_video(np.arange(4) / FPS, None)
                clip.read_audio(0, 100)
        except ClipError as error:
            assert error.path.startswith(str(_tar(folder)))
            kinds.append(error.kind)
    return kinds


def test_shard_missing(copied):
    _tar(copied).unlink()
    assert _kinds(copied) == ["open"] * 10


def test_shard_of_another_size(copied):
    os.truncate(_tar(copied), 50_000)
    assert _kinds(copied) == ["open"] * 10


def test_shard_cut_under_a_running_job(copied):
    assert _kinds(copied) == []
    os.truncate(_tar(copied), 50_000)
    # It has been written to, so what is left is not to be trusted either.
    assert set(_kinds(copied)) == {"short", "decode"} and len(_kinds(copied)) == 10


def test_shard_overwritten_under_a_running_job(copied):
    assert _kinds(copied) == []
    with _tar(copied).open("r+b") as file:
        file.write(bytes(1000))
    os.utime(_tar(copied), (1, 1))
    assert _kinds(copied) == ["decode"] * 10


def test_shard_deleted_or_replaced_under_a_running_job(copied):
    assert _kinds(copied) == []
    # The open file is still the one that the index describes.
    data = _tar(copied).read_bytes()
    _tar(copied).unlink()
    assert _kinds(copied) == []
    _tar(copied).write_bytes(data[:-512])
    assert _kinds(copied) == []
    shard_file.forget(_tar(copied))
    assert _kinds(copied) == ["open"] * 10


def test_damaged_pictures_are_typed(copied):
    """Random bytes in the coded pictures: some other picture or an error, never anything else."""
    record = load_manifest(copied)[0]
    rng = np.random.default_rng(0)
    whole, kinds = _tar(copied).read_bytes(), set()
    first, last = record.video_at + record.frame_offsets[[0, -1]]
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(first, last, 20):
            data[at] = rng.integers(256)
        shard_file.forget(_tar(copied))
        _tar(copied).write_bytes(data)
        try:
            with open_record(record) as clip:
                assert clip.read_video(np.arange(16) / FPS, None).shape == (16, 64, 80, 3)
        except ClipError as error:
            kinds.add(error.kind)
    assert kinds == {"decode"}


def test_decoder_forgets_a_damaged_clip(copied):
    first, second = (load_manifest(copied)[i] for i in (0, 1))
    with open_record(second) as clip:
        expected = clip.read_video(np.arange(8) / FPS, None)
    damaged = replace(first, frame_offsets=first.frame_offsets + 3)
    with open_record(damaged) as clip, pytest.raises(ClipError):
        clip.read_video(np.arange(8) / FPS, None)
    with open_record(second) as clip:
        assert (clip.read_video(np.arange(8) / FPS, None) == expected).all()


def test_bad_shard_is_substituted(raw, copied, tmp_path):
    """Clips of a good shard stand in for those of a missing one, as for bad files."""
    folder = tmp_path / "two"
    many = tmp_path / "many.csv"
    rows = [f"{raw.parent / f'{i % 10}.mov'},{i % 10}" for i in range(32)]
    many.write_text("\n".join(["path,label", *rows]) + "\n")
    pack(many, folder, _options("h264"), jobs=1)
    (folder / "shard-00001-00.tar").unlink()
    batches = _take(_config(folder), 8)
    tried = [bad for batch in batches for bad in batch.substituted]
    assert len({bad.position for bad in tried}) == 16
    assert {bad.kind for bad in tried} == {"open"}
    assert all("shard-00001-00.tar/0000000" in bad.path for bad in tried)


# --- verify and stats


def test_verify_finds_nothing_wrong(shards, capsys):
    assert main(["verify", str(shards)]) == 0
    assert "10 records, 0.00 GiB, 1 decoded, 0 problems" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("member", "text"),
    [
        (".mp4", "000000004-0000.mp4 is damaged: its checksum is wrong"),
        (".wav", "000000004-0000.wav is damaged: its checksum is wrong"),
        (".json", "000000004-0000.json is missing or damaged"),
    ],
)
def test_verify_finds_a_flipped_bit(copied, capsys, member, text):
    data = bytearray(_tar(copied).read_bytes())
    at = data.index(f"000000004-0000{member}".encode()) + 512 + 60
    data[at] ^= 1
    _tar(copied).write_bytes(data)
    assert main(["verify", str(copied)]) == 1
    printed = capsys.readouterr().out
    assert f"BAD   shard-00000-00.tar: {text}" in printed and "1 problems" in printed


def test_verify_finds_what_does_not_belong(copied):
    data = bytearray(_tar(copied).read_bytes())
    _tar(copied).write_bytes(data[:-512])
    (problem, _) = verify(copied).problems
    assert "bytes, the index says" in problem
    at = data.index(b"000000004-0000.mp4")
    data[at : at + 9] = b"999999999"
    _tar(copied).write_bytes(data)
    assert any("cannot be read" in p or "not where" in p for p in verify(copied).problems)
    shutil.rmtree(copied / "none", ignore_errors=True)
    _tar(copied).unlink()
    assert "No such file" in verify(copied).problems[0]


def test_planes_of_packed_clips(shards):
    """H.264 is the same to the bit once it is RGB; JPEGs are planes of another range first."""
    record = load_manifest(shards)[0]
    times_s = np.array([0.3, 0.0, 0.3])
    with open_record(record) as clip:
        rgb = clip.read_video(times_s, None)
    with open_record(record, pixels="yuv420") as clip:
        planes = clip.read_video(times_s, None)
    height, width = rgb.shape[1] // 2 * 2, rgb.shape[2] // 2 * 2
    assert planes.shape == (3, height * 3 // 2, width)
    ours = i420_to_rgb(torch.from_numpy(planes)[None])[0].numpy()
    difference = np.abs(ours.astype(int) - rgb[:, :height, :width])
    assert np.percentile(difference, 99) <= (0 if record.codec == "h264" else 6)
