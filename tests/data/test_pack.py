"""Packing: what is written, that it is the same whatever happens, and what is refused."""

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import wave
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from media import shown_index, tone, truncate, write_clip

from avmae_fast.cli import main
from avmae_fast.data import pack as pack_module
from avmae_fast.data import pack_folder, pack_jobs, shard_writer
from avmae_fast.data.clip import ClipError
from avmae_fast.data.manifest import ManifestError, load_manifest
from avmae_fast.data.pack import pack
from avmae_fast.data.pack_clips import PackError, PackOptions, segments
from avmae_fast.data.pack_folder import locked
from avmae_fast.data.pack_jobs import Job
from avmae_fast.data.shard_index import key_of, read_index
from avmae_fast.data.shard_reader import ShardReader

OPTIONS = PackOptions(short_side=64, fps=10.0)

# Two blocks of 16 rows and one of 4.
ROWS = [f"{i % 4}.mov,{'abc'[i % 3]},{'val' if i % 5 == 0 else 'train'}" for i in range(34)]
ROWS += ["missing.mp4,a,train", "random.mp4,b,train"]


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder of small clips, bad ones among them, and its manifest."""
    folder = tmp_path_factory.mktemp("unpacked")
    for i in range(4):
        ramp = np.arange((10 + i) * 640, dtype=np.float32) / 65536
        path = folder / f"{i}.mov"
        write_clip(path, frames=10 + i, size=(64, 80), sound=ramp, audio_codec="pcm_s16le")
    write_clip(folder / "silent.mp4", frames=10, size=(64, 80), sound=np.zeros(0, np.float32))
    write_clip(folder / "sound_only.mov", frames=0, sound=tone(1, 16000), audio_codec="pcm_s16le")
    write_clip(folder / "long.mp4", frames=120, size=(64, 80), sound=tone(4.8, 16000))
    truncate(write_clip(folder / "truncated.mp4", frames=100, size=(64, 64)), 0.5)
    (folder / "random.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    _manifest(folder, ROWS)
    return folder


def _manifest(folder, rows, name="clips.csv"):
    (folder / name).write_text("\n".join(["path,label,split", *rows]) + "\n")
    return folder / name


@pytest.fixture(scope="session")
def packed(clips, tmp_path_factory):
    """The folder that packing `ROWS` in one process makes."""
    folder = tmp_path_factory.mktemp("packed")
    pack(clips / "clips.csv", folder, OPTIONS, jobs=1)
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock, which names its last holder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# --- what is written


def test_files_and_failures(packed):
    names = [f"shard-0000{i}-00.{kind}" for i in range(3) for kind in ("idx", "tar")]
    assert sorted(_contents(packed)) == sorted([*names, "failed.jsonl", "index.avmae", "pack.json"])
    failures = [json.loads(line) for line in (packed / "failed.jsonl").read_text().splitlines()]
    assert [(f["row"], f["path"], f["kind"]) for f in failures] == [
        (35, "missing.mp4", "open"),
        (36, "random.mp4", "open"),
    ]


def test_index_lists_every_clip(packed):
    manifest = load_manifest(packed)
    rows = manifest.index.rows
    assert rows["clip"].tolist() == list(range(34))
    assert manifest.classes == ("a", "b", "c")
    assert [record.label for record in manifest] == [i % 3 for i in range(34)]
    assert len(manifest.select("val")) == 7 and len(manifest.select("train")) == 27
    assert rows["duration_s"].tolist() == pytest.approx([(10 + i % 4) / 25 for i in range(34)])
    assert rows["frames"].tolist() == [4, 4, 4, 5] * 8 + [4, 4]
    assert rows["samples"].tolist() == [(10 + i % 4) * 640 for i in range(34)]


def test_webdataset_streams_the_shards(packed):
    webdataset = pytest.importorskip("webdataset")
    shards = [str(path) for path in sorted(packed.glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [key_of(r) for r in load_manifest(packed).index.rows]
    for number, sample in enumerate(samples):
        with av.open(io.BytesIO(sample["mp4"])) as video:
            shown = [shown_index(f.to_ndarray(format="rgb24")) for f in video.decode(video=0)]
        assert shown == [int(2.5 * k) for k in range(len(shown))]
        with wave.open(io.BytesIO(sample["wav"])) as sound:
            assert (sound.getframerate(), sound.getnchannels()) == (16000, 1)
            pcm = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
        np.testing.assert_allclose(pcm, np.arange(len(pcm)) / 2, atol=1)
        meta = json.loads(sample["json"])
        assert meta["source"] == f"{number % 4}.mov" and meta["label"] == "abc"[number % 3]


def test_mjpeg_streams_too(clips, tmp_path):
    pytest.importorskip("simplejpeg")
    options = PackOptions(codec="mjpeg", short_side=64, fps=10.0, quality=90)
    index = pack(_manifest(clips, ROWS[:1], "one.csv"), tmp_path, options, jobs=1)
    (shard,) = tmp_path.glob("*.tar")
    data = shard.read_bytes()[int(index.rows["video_at"][0]) :][: int(index.rows["video_bytes"][0])]
    with av.open(io.BytesIO(data), format="mjpeg") as video:
        shown = [shown_index(f.to_ndarray(format="rgb24")) for f in video.decode(video=0)]
    assert shown == [0, 2, 5, 7]


def test_long_clips_are_cut(clips, tmp_path):
    options = PackOptions(short_side=64, fps=10.0, clip_seconds=2.0)
    index = pack(_manifest(clips, ["long.mp4,a,train"], "long.csv"), tmp_path, options, jobs=1)
    assert index.rows["segment"].tolist() == [0, 1]
    assert index.rows["frames"].tolist() == [24, 24]
    assert index.rows["samples"].tolist() == [38400, 38400]


def test_part_of_a_damaged_clip_is_kept(clips, tmp_path):
    options = PackOptions(short_side=64, fps=10.0, clip_seconds=1.0)
    index = pack(_manifest(clips, ["truncated.mp4,a,train"], "cut.csv"), tmp_path, options, jobs=1)
    failures = [json.loads(line) for line in (tmp_path / "failed.jsonl").read_text().splitlines()]
    assert 0 < len(index.rows) < 4 and len(index.rows) + len(failures) == 4
    assert {failure["kind"] for failure in failures} <= {"short", "decode"}
    assert all(failure["end_s"] > failure["start_s"] for failure in failures)


def test_missing_tracks(clips, tmp_path):
    rows = ["silent.mp4,a,train", "sound_only.mov,a,train"]
    index = pack(_manifest(clips, rows, "tracks.csv"), tmp_path, OPTIONS, jobs=1)
    assert index.rows["clip"].tolist() == [0] and index.rows["samples"].tolist() == [0]
    assert json.loads((tmp_path / "failed.jsonl").read_text())["kind"] == "no_video"


@pytest.mark.parametrize(
    ("start_s", "end_s", "counts"),
    [(0.0, 10.007, [80]), (2.0, 31.9, [80, 79, 80]), (0.0, 0.01, [1]), (0.0, 15.1, [60, 60])],
)
def test_segments_are_equal_and_leave_nothing(start_s, end_s, counts):
    parts = segments(start_s, end_s, PackOptions())
    assert [part.frames for part in parts] == counts
    assert parts[0].start_s == start_s and parts[-1].end_s == end_s
    for part, after in zip(parts[:-1], parts[1:], strict=True):
        assert part.end_s == after.start_s == pytest.approx(part.start_s + part.frames / 8)


# --- the same bytes whatever happens


def test_any_number_of_processes(clips, packed, tmp_path):
    pack(clips / "clips.csv", tmp_path, OPTIONS, jobs=2)
    assert _contents(tmp_path) == _contents(packed)


def test_blocks_larger_than_a_shard(clips, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_jobs, "_SHARD_BYTES", 100_000)
    index = pack(clips / "clips.csv", tmp_path, OPTIONS, jobs=1)
    assert len(index.header["shards"]) > 6
    whole, parts = load_manifest(packed), load_manifest(tmp_path)
    for name in ("clip", "label", "split", "frames", "video_crc", "sound_crc"):
        assert (whole.index.rows[name] == parts.index.rows[name]).all()


class _Stopped(BaseException):
    """What stands for a kill: nothing catches it on purpose."""


@pytest.mark.parametrize("shard_bytes", [1 << 30, 300_000], ids=["a shard a block", "several"])
def test_stopped_at_every_write(clips, tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(pack_jobs, "_SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(pack_module, "_SAMPLED", 1)
    manifest = _manifest(clips, ROWS[:18], "some.csv")
    pack(manifest, tmp_path / "whole", OPTIONS, jobs=1)
    expected, stops, real = _contents(tmp_path / "whole"), 0, os.replace
    out = tmp_path / "stopped"
    finished: dict[str, int] = {}
    while True:

        def rename(source, target, stop_at=stops % 4):
            if rename.calls == stop_at:
                raise _Stopped
            rename.calls += 1
            real(source, target)

        rename.calls = 0
        monkeypatch.setattr(os, "replace", rename)
        try:
            pack(manifest, out, OPTIONS, jobs=1, resume=True)
            break
        except _Stopped:
            stops += 1
        for shard in out.glob("*.tar"):
            # A finished shard is never written again.
            assert finished.setdefault(shard.name, shard.stat().st_ino) == shard.stat().st_ino
        assert stops < 100
    assert stops >= 4 and _contents(out) == expected


_PACK = "import sys; from avmae_fast.cli import main; sys.exit(main())"


def _start(*argv: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PACK, "pack", *map(str, argv)]
    options = ["--short-side", "64", "--fps", "10"]
    return subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed(clips, packed, tmp_path, jobs):
    """kill -9 while the first shard is being written, then again in a later one."""
    kills = 0
    for wanted in ("shard-*.partial-*", "shard-*.tar"):
        process = _start(clips / "clips.csv", tmp_path, "-j", jobs, "--resume")
        while process.poll() is None and not any(tmp_path.glob(wanted)):
            time.sleep(0.002)
        if process.poll() is None:
            kills += 1
        process.kill()
        process.communicate()
    assert kills
    # Processes that have lost their parent stop by themselves; this job need not wait for them.
    pack(clips / "clips.csv", tmp_path, OPTIONS, jobs=1, resume=True)
    assert _contents(tmp_path) == _contents(packed)


def test_killed_at_the_very_start(clips, tmp_path):
    (tmp_path / "pack.json.partial-1").write_text("{")
    pack(_manifest(clips, ROWS[:1], "one.csv"), tmp_path, OPTIONS, jobs=1)
    assert "pack.json.partial-1" not in _contents(tmp_path)


def test_process_without_its_parent_stops(clips, tmp_path):
    manifest = load_manifest(clips / "clips.csv")
    job = Job(tmp_path, manifest, OPTIONS, parent=os.getpid() + 10**6, token="x")
    with pytest.raises(PackError, match="has ended"):
        pack_jobs.pack_blocks(job, [0], 1, lambda progress: None)
    assert not list(tmp_path.iterdir())


def test_disk_too_small(clips, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PackError, match="has 0.00 GiB free, the shards need about"):
        pack(clips / "clips.csv", tmp_path, OPTIONS, jobs=1)
    assert not list(tmp_path.glob("shard-*"))


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_disk_full(clips, packed, tmp_path, jobs):
    """No file can grow beyond 300 kB, as if the disk were full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(PackError, match="is full .* go on with --resume"):
            pack(clips / "clips.csv", tmp_path, OPTIONS, jobs=jobs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*.partial-*"))
    pack(clips / "clips.csv", tmp_path, OPTIONS, jobs=1, resume=True)
    assert _contents(tmp_path) == _contents(packed)


def test_disk_full_has_an_exit_code(clips, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(["pack", str(clips / "clips.csv"), str(tmp_path), "-j", "1"]) == 73
    assert "GiB free, the shards need about" in capsys.readouterr().err


def test_disk_full_at_the_last_write(clips, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_writer, "write_whole", full)
    with pytest.raises(PackError, match="is full"):
        pack(clips / "clips.csv", tmp_path, OPTIONS, jobs=1)
    assert sorted(_contents(tmp_path)) == ["pack.json"]


# --- what is refused


def test_two_packers(clips, tmp_path):
    with locked(tmp_path):
        with pytest.raises(PackError, match=f"being packed by process {os.getpid()} on .* since"):
            pack(clips / "clips.csv", tmp_path, OPTIONS)
    # The lock of a process that was killed is nobody's.
    code = "import os; from avmae_fast.data.pack_folder import locked; from pathlib import Path\n"
    code += f"with locked(Path({str(tmp_path)!r})): os.kill(os.getpid(), {int(signal.SIGKILL)})"
    subprocess.run([sys.executable, "-c", code], check=False)
    with locked(tmp_path):
        pass


def test_finished_is_left_alone(clips, packed):
    before = {path: path.stat().st_mtime_ns for path in packed.glob("*.*") if path.suffix}
    index = pack(clips / "clips.csv", packed, OPTIONS)
    assert len(index.rows) == 34
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_unfinished_needs_resume(clips, packed, tmp_path):
    shutil.copytree(packed, tmp_path / "out")
    (tmp_path / "out" / "index.avmae").unlink()
    with pytest.raises(PackError, match="packed in part: add --resume"):
        pack(clips / "clips.csv", tmp_path / "out", OPTIONS)


def test_another_job(clips, packed):
    with pytest.raises(PackError, match=r"crf = 26 there, 30 asked.*choose another folder"):
        pack(clips / "clips.csv", packed, PackOptions(short_side=64, fps=10.0, crf=30))
    with pytest.raises(PackError, match="the manifest lists other clips"):
        pack(_manifest(clips, ROWS[:3], "fewer.csv"), packed, OPTIONS)


def test_keyframes_of_another_distance(clips, packed, tmp_path):
    """A folder that an earlier version began is not gone on with: its index has one distance."""
    shutil.copytree(packed, tmp_path / "out")
    job = json.loads((tmp_path / "out" / "pack.json").read_text())
    job["options"]["gop"] *= 2
    (tmp_path / "out" / "pack.json").write_text(json.dumps(job))
    with pytest.raises(PackError, match=r"packed otherwise \(gop = 16 there, 8 asked\)"):
        pack(clips / "clips.csv", tmp_path / "out", OPTIONS, resume=True)


def test_other_folders(clips, packed, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(PackError, match="it holds mine.txt"):
        pack(clips / "clips.csv", tmp_path, OPTIONS)
    with pytest.raises(PackError, match="is packed already"):
        pack(packed, tmp_path / "again", OPTIONS)
    with pytest.raises(PackError, match="jobs = 0 is not valid"):
        pack(clips / "clips.csv", tmp_path / "x", OPTIONS, jobs=0)
    with pytest.raises(PackError, match="cannot be written"):
        pack(clips / "clips.csv", clips / "0.mov", OPTIONS)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "pack.json").write_text("{")
    with pytest.raises(PackError, match="pack.json is damaged"):
        pack(clips / "clips.csv", tmp_path / "damaged", OPTIONS)


def test_nothing_could_be_packed(clips, tmp_path):
    with pytest.raises(PackError, match="none of 1 clips could be packed: see .*failed.jsonl"):
        pack(_manifest(clips, ["random.mp4,a,train"], "bad.csv"), tmp_path, OPTIONS, jobs=1)
    assert not (tmp_path / pack_folder.INDEX_NAME).exists()


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"codec": "av1"}, "codec = 'av1' is not valid: it must be one of h264, mjpeg"),
        ({"fps": 0.5}, "fps = 0.5 is not valid: it must be in 1..120"),
        ({"short_side": 65}, "short_side = 65 is not valid: it must be even"),
        ({"crf": 52}, "crf = 52 is not valid: it must be in 0..51"),
        ({"quality": 0}, "quality = 0"),
        ({"clip_seconds": 0}, "clip_seconds = 0"),
        ({"fps": float("nan")}, "fps = nan"),
    ],
)
def test_bad_options(option, text):
    with pytest.raises(PackError, match=text):
        PackOptions(**option)


def test_command(clips, tmp_path, capsys):
    argv = ["pack", str(clips / "clips.csv"), str(tmp_path), "--short-side", "64", "-j", "1"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "36 clips: about 0.00 GiB, a minute" in printed
    assert "34 records of 36 clips in 3 shards" in printed and "2 could not be packed" in printed
    assert main([*argv, "--crf", "99"]) == 2
    assert "crf = 99 is not valid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("classes", 3), ("codec", None), ("fps", 0), ("gop", "8"), ("gop", 8.0), ("decoders", {}),
        ("shards", {}), ("shards", [{"name": "a.tar"}]),
    ],
)  # fmt: skip
def test_header_of_no_index(packed, tmp_path, field, value):
    index = read_index(packed)
    index.header[field] = value
    (tmp_path / "index.avmae").write_bytes(index.to_bytes())
    with pytest.raises(ManifestError, match="index.avmae is damaged: the header is not as it was"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("shard", 9), ("decoder", 999), ("label", 77), ("duration_s", np.nan), ("duration_s", 0.0),
        ("first_offset", 2**63), ("frames", 2**31),
    ],
)  # fmt: skip
def test_row_of_no_index(packed, tmp_path, column, value):
    index = read_index(packed)
    rows = index.rows.copy()
    rows[column][3] = value
    damaged = replace(index, rows=rows)
    (tmp_path / "index.avmae").write_bytes(damaged.to_bytes())
    manifest = load_manifest(tmp_path)
    assert manifest[2].label == 2
    with pytest.raises(ManifestError, match="index.avmae is damaged: row 3"):
        manifest[3]


@pytest.mark.parametrize("value", [2**40, 2**63])
def test_record_beyond_its_shard(packed, tmp_path, value):
    shutil.copytree(packed, tmp_path / "packed")
    index = read_index(packed)
    rows = index.rows.copy()
    rows["sound_at"][0] = value
    damaged = replace(index, rows=rows).to_bytes()
    (tmp_path / "packed" / "index.avmae").write_bytes(damaged)
    with ShardReader(load_manifest(tmp_path / "packed")[0]) as clip:
        with pytest.raises(ClipError, match="ends at byte .*, the record at"):
            clip.read_audio(0, 100)
