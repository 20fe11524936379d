"""Labels of a manifest's rows in packed clips: one, several, verb and noun, none."""

import json
import pickle
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from media import tone, write_clip

from avmae_fast.data import pack_jobs
from avmae_fast.data.label_sets import LabelSets
from avmae_fast.data.manifest import Manifest, ManifestError, load_manifest
from avmae_fast.data.pack import pack
from avmae_fast.data.pack_clips import PackError, PackOptions
from avmae_fast.data.pack_verify import verify
from avmae_fast.data.shard_index import Index, read_index
from avmae_fast.data.stats import clip_stats

OPTIONS = PackOptions(short_side=64, fps=10.0)

AUDIOSET = ["Speech|Car", "", "Car", "Keys, jangling|Speech|Car", "Speech"]
EPIC = ["verb/take|noun/cup", "verb/open|noun/door", "verb/take|noun/door", "", "verb/open"]
# 18 rows: two blocks, the second of which has labels of its own.
MANY = [("a|b", "c", "", "b|a", "d|c|a")[i % 5] for i in range(16)] + ["e|a", "b|e"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short clip, a longer one and no media file."""
    folder = tmp_path_factory.mktemp("labelled")
    write_clip(folder / "short.mp4", frames=10, size=(64, 64))
    write_clip(folder / "long.mp4", frames=100, size=(64, 64), sound=tone(4.0, 16000))
    (folder / "bad.mp4").write_bytes(b"no media file")
    return folder


def _manifest(folder: Path, name: str, *rows: str) -> Path:
    path = folder / name
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def _of_short(folder: Path, name: str, labels: Sequence[str]) -> Path:
    rows = [f'short.mp4,"{label}",{"val" if i % 4 == 0 else ""}' for i, label in enumerate(labels)]
    return _manifest(folder, f"{name}.csv", "path,labels,split", *rows)


def _labels(manifest: Manifest) -> list[tuple[int, ...]]:
    return [manifest.labels(i) for i in range(len(manifest))]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def _members(packed: Path) -> list[dict]:
    webdataset = pytest.importorskip("webdataset")
    shards = [str(path) for path in sorted(packed.glob("*.tar"))]
    return [json.loads(s["json"]) for s in webdataset.WebDataset(shards, shardshuffle=False)]


@pytest.mark.parametrize("labels", [AUDIOSET, EPIC, ["a", "b", "", "b", "a"]], ids="-".join)
def test_labels_are_those_of_the_manifest(
    folder: Path, tmp_path: Path, labels: Sequence[str]
) -> None:
    source = _of_short(folder, "some", labels)
    pack(source, tmp_path, OPTIONS, jobs=1)
    listed, packed = load_manifest(source), load_manifest(tmp_path)
    assert packed.classes == listed.classes and _labels(packed) == _labels(listed)
    assert [r.label for r in packed] == [r.label for r in listed]
    for split in ("train", "val"):
        ours, theirs = packed.select(split), listed.select(split)
        assert _labels(ours) == _labels(theirs)
        assert _labels(pickle.loads(pickle.dumps(ours))) == _labels(theirs)
    with pytest.raises(IndexError):
        packed.labels(len(packed))
    # Numbered as another manifest, say that of training, numbers them.
    names = ["first", *reversed(listed.classes)]
    assert _labels(load_manifest(tmp_path, names)) == _labels(load_manifest(source, names))
    with pytest.raises(ManifestError, match="which is not one of the 1 known"):
        load_manifest(tmp_path, names[:1])
    assert clip_stats(tmp_path).labels == clip_stats(source).labels
    assert verify(tmp_path).problems == []


def test_other_programs_find_all_labels(folder: Path, tmp_path: Path) -> None:
    pack(_of_short(folder, "tar", ["b|a", "", "c"]), tmp_path, OPTIONS, jobs=1)
    found = [(meta["label"], meta["labels"]) for meta in _members(tmp_path)]
    assert found == [(None, ["b", "a"]), (None, []), ("c", ["c"])]


def test_histogram_counts_each_label(folder: Path, tmp_path: Path) -> None:
    pack(_of_short(folder, "stats", AUDIOSET), tmp_path, OPTIONS, jobs=1)
    stats = clip_stats(tmp_path)
    assert stats.labels == {"Speech": 3, "Car": 3, "Keys, jangling": 1, "none": 1}
    assert "label     Keys, jangling: 1" in stats.lines()


def test_parts_of_a_long_video_have_its_labels(folder: Path, tmp_path: Path) -> None:
    rows = ["long.mp4,0,4,verb/take|noun/cup", "bad.mp4,0,4,verb/cut|noun/cup", "long.mp4,1,3,"]
    source = _manifest(folder, "long.csv", "path,start,end,labels", *rows)
    index = pack(source, tmp_path, replace(OPTIONS, clip_seconds=1.0), jobs=1)
    assert index.rows["clip"].tolist() == [0] * 4 + [2] * 2
    manifest = load_manifest(tmp_path)
    assert manifest.classes == ("noun/cup", "verb/cut", "verb/take")
    assert _labels(manifest) == [(2, 0)] * 4 + [()] * 2
    assert [meta["labels"] for meta in _members(tmp_path)][:4] == [["verb/take", "noun/cup"]] * 4


def test_the_same_bytes_however_it_is_packed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _of_short(folder, "many", MANY)
    whole = tmp_path / "whole"
    pack(source, whole, OPTIONS, jobs=1)
    pack(source, tmp_path / "two", OPTIONS, jobs=2)
    assert _contents(tmp_path / "two") == _contents(whole)
    # As a job leaves it that was killed in its second block.
    pack(source, tmp_path / "again", OPTIONS, jobs=1)
    for name in ("shard-00001-00.tar", "index.avmae", "failed.jsonl"):
        (tmp_path / "again" / name).unlink()
    pack(source, tmp_path / "again", OPTIONS, jobs=1, resume=True)
    assert _contents(tmp_path / "again") == _contents(whole)
    monkeypatch.setattr(pack_jobs, "_SHARD_BYTES", 50_000)
    index = pack(source, tmp_path / "parts", OPTIONS, jobs=1)
    assert len(index.header["shards"]) > 3
    assert _labels(load_manifest(tmp_path / "parts")) == _labels(load_manifest(source))


def test_other_labels_are_another_job(folder: Path, tmp_path: Path) -> None:
    pack(_of_short(folder, "one", ["a|b", "a|c"]), tmp_path, OPTIONS, jobs=1)
    with pytest.raises(PackError, match="the manifest lists other clips"):
        pack(_of_short(folder, "other", ["a|b", "b|c"]), tmp_path, OPTIONS, jobs=1)


# --- what a manifest may say, or not


def test_kinds_of_rows_may_be_mixed(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"path": "short.mp4", "label": "x|y"},
        {"path": "short.mp4", "labels": ["verb/take", "noun/cup"]},
        {"path": "short.mp4", "labels": []},
        {"path": "short.mp4"},
        {"path": "short.mp4", "labels": [7, "7", "x|y"]},
    ]
    source = _manifest(folder, "mixed.jsonl", *map(json.dumps, rows))
    pack(source, tmp_path, OPTIONS, jobs=1)
    manifest = load_manifest(tmp_path)
    assert manifest.classes == ("7", "noun/cup", "verb/take", "x|y")
    assert _labels(manifest) == [(3,), (2, 1), (), (), (0, 3)]
    assert [record.label for record in manifest] == [3, -1, -1, -1, -1]


def test_without_labels(folder: Path, tmp_path: Path) -> None:
    pack(_manifest(folder, "none.csv", "path", "short.mp4", "short.mp4"), tmp_path, OPTIONS, jobs=1)
    manifest = load_manifest(tmp_path)
    assert manifest.classes == () and _labels(manifest) == [(), ()]
    assert clip_stats(tmp_path).labels == {"none": 2}


def test_classes_that_do_not_occur_keep_their_numbers(folder: Path, tmp_path: Path) -> None:
    source = _of_short(folder, "listed", ["c|a"])
    _manifest(folder, "listed.classes.txt", "d", "c", "b", "a")
    pack(source, tmp_path, OPTIONS, jobs=1)
    manifest = load_manifest(tmp_path)
    assert manifest.classes == ("d", "c", "b", "a") and _labels(manifest) == [(1, 3)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["path,labels", "short.mp4,a|z"], "'z' is not one of the 2 classes: a, b"),
        (["path,labels", "short.mp4,a||b"], "'a||b' is not a class name or a whole number"),
        (["path,label,labels", "short.mp4,a,b"], "one or the other"),
    ],
)
def test_bad_labels_leave_nothing(
    folder: Path, tmp_path: Path, rows: list[str], message: str
) -> None:
    source = _manifest(folder, "bad.csv", *rows)
    _manifest(folder, "bad.classes.txt", "a", "b")
    with pytest.raises(ManifestError) as caught:
        pack(source, tmp_path / "out", OPTIONS, jobs=1)
    assert message in str(caught.value) and not (tmp_path / "out").exists()


# --- other formats, and damage


def _version_1(index: Index) -> bytes:
    """An index as it was before records had several labels."""
    text = json.dumps(index.header).encode()
    text += b" " * (-(32 + len(text)) % 64)
    counts = (len(text), len(index.rows), len(index.offsets))
    body = struct.pack("<8sIIQQ", b"AVMAEIDX", 1, *counts) + text
    body += index.rows.tobytes() + index.offsets.tobytes()
    return body + zlib.crc32(body).to_bytes(4, "little")


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    pack(_of_short(folder, "old", AUDIOSET), tmp_path / "packed", OPTIONS, jobs=1)
    return tmp_path / "packed"


def test_folders_of_the_first_format(folder: Path, packed: Path) -> None:
    expected = load_manifest(packed)
    index = read_index(packed)
    (packed / "index.avmae").write_bytes(_version_1(index))
    manifest = load_manifest(packed)
    assert manifest.classes == expected.classes
    assert [r.label for r in manifest] == [r.label for r in expected] == [-1, -1, 0, -1, 2]
    assert _labels(manifest) == [(), (), (0,), (), (2,)]
    assert _labels(manifest.select("val")) == [(), (2,)]
    assert verify(packed).problems == [] and clip_stats(packed).labels["none"] == 3
    # The job is not this program's any more, finished or not.
    job = json.loads((packed / "pack.json").read_text())
    (packed / "pack.json").write_text(json.dumps(job | {"format": 1}))
    for name in ("index.avmae", "shard-00000-00.tar"):
        with pytest.raises(PackError, match="was packed in format 1, this program writes 2"):
            pack(folder / "old.csv", packed, OPTIONS, jobs=1, resume=True)
        (packed / name).unlink()


@pytest.mark.parametrize("flat", [[2, 0, 0, 1, 2, 0, 3], [-1, 0, 0, 1, 2, 0, 2], [0] * 6, [0] * 8])
def test_labels_of_no_index(packed: Path, flat: list[int]) -> None:
    index = read_index(packed)
    labels = LabelSets(np.array(flat, np.int32), index.labels.ends)
    (packed / "index.avmae").write_bytes(replace(index, labels=labels).to_bytes())
    with pytest.raises(ManifestError, match="is damaged: the list of labels is not as it was"):
        load_manifest(packed)


@pytest.mark.parametrize("ends", [[2, 1, 3, 6, 7], [-1, 2, 3, 6, 7], [2, 2, 3, 6, 2**62]])
def test_ends_of_labels_of_no_index(packed: Path, ends: list[int]) -> None:
    index = read_index(packed)
    labels = LabelSets(index.labels.flat, np.array(ends, np.int64))
    (packed / "index.avmae").write_bytes(replace(index, labels=labels).to_bytes())
    with pytest.raises(ManifestError, match="is damaged: the list of labels is not as it was"):
        load_manifest(packed)


def test_a_flipped_label_does_not_verify(packed: Path) -> None:
    data = bytearray((packed / "index.avmae").read_bytes())
    data[-8] ^= 2  # the last label, now another one that exists
    (packed / "index.avmae").write_bytes(data)
    load_manifest(packed)
    with pytest.raises(ManifestError, match="its checksum is wrong"):
        verify(packed)
