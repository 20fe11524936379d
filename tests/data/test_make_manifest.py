"""Manifests of public data sets: which file is found for which row, what is said of the rest."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import webdataset
from layouts import LAYOUTS, listing

from avmae_fast.cli import main
from avmae_fast.data.folder_index import FolderIndex, youtube_name
from avmae_fast.data.make_manifest import match_webdataset
from avmae_fast.data.manifest import FramesRecord, ManifestError, load_manifest
from avmae_fast.data.pack import pack
from avmae_fast.data.pack_clips import PackOptions
from avmae_fast.data.readers import open_record

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def _make(name: str, root: Path, *more: str) -> tuple[dict[str, list], list[dict]]:
    """Rows of the manifest by file name, as (labels, start, end, split); the report."""
    arguments = LAYOUTS[name](root)
    assert main(["manifest", *arguments, "--out", str(root / "clips.csv"), *more]) == 0
    manifest = load_manifest(root / "clips.csv")
    rows: dict[str, list] = {}
    for split in ("train", "val", "test"):
        chosen = manifest.select(split)
        for i, record in enumerate(chosen):
            labels = [manifest.classes[label] for label in chosen.labels(i)]
            row = (labels, record.start_s, record.end_s, split)
            rows.setdefault(record.path.name, []).append(row)
    report = (root / "clips.report.jsonl").read_text().splitlines()
    return rows, [json.loads(line) for line in report]


def _kinds(report: list[dict]) -> list[tuple[str, str]]:
    return [(finding["kind"], finding["where"]) for finding in report]


def test_vggsound(tmp_path: Path) -> None:
    rows, report = _make("vggsound", tmp_path)
    whole = (0.0, np.inf)
    assert rows == {
        "---g-f_I2yQ_000001.mp4": [(["people marching"], *whole, "test")],
        "--0PQM4-hqg_000030.mp4": [(["waterfall burbling"], *whole, "train")],
        "_0m_YMpQayA_000168.mp4": [(["female speech, woman speaking"], *whole, "train")],
    }
    assert _kinds(report) == [
        ("bad_time", "vggsound.csv row 6"),
        ("no_file", "A-missing__ from 20 s"),
        ("duplicate_row", "--0PQM4-hqg from 30 s"),
        ("no_row", "notes/ZZZZZZZZZZZ_000000.mp4"),
    ]
    # Classes of rows without a file keep their numbers.
    assert "dog barking" in load_manifest(tmp_path / "clips.csv").classes


def test_audioset(tmp_path: Path) -> None:
    rows, report = _make("audioset", tmp_path)
    whole = (0.0, np.inf)
    assert rows == {
        "Y--PJHxphWEs.wav": [(["Speech", "Male speech, man speaking"], *whole, "train")],
        "--aE2O5G5WE_0_10.mp4": [(["Car"], *whole, "train")],
        "Y-0Abcdefgh1_30000_40000.mp4": [(["Keys jangling", "Car"], *whole, "train")],
        "-0RWZT-miFs.mp4": [(["Keys jangling", "Car"], *whole, "test")],
    }
    assert _kinds(report) == [("bad_label", "balanced_train_segments.csv row 4")]
    classes = load_manifest(tmp_path / "clips.csv").classes
    assert classes == ("Speech", "Male speech, man speaking", "Keys jangling", "Car")


def test_whole_videos_and_another_split(tmp_path: Path) -> None:
    rows, _ = _make("audioset", tmp_path, "--whole-videos", "--split", "val")
    assert rows["-0RWZT-miFs.mp4"][0][1:] == (420.0, 430.0, "val")
    assert rows["--aE2O5G5WE_0_10.mp4"][0][1:] == (0.0, np.inf, "val")


def test_audioset_without_class_names(tmp_path: Path) -> None:
    arguments = LAYOUTS["audioset"](tmp_path)[:-2]
    assert main(["manifest", *arguments]) == 0
    manifest = load_manifest(tmp_path / "clips" / "manifest.csv")
    assert manifest.classes == ("/m/00000", "/m/03v3yw", "/m/05zppz", "/m/09x0r", "/m/0k4j")


def test_kinetics(tmp_path: Path) -> None:
    rows, report = _make("kinetics", tmp_path)
    whole = (0.0, np.inf)
    assert rows == {
        "0347ZoDXyP0_000095_000105.mp4": [(["abseiling"], *whole, "train")],
        "-4wsuPCjDBc_000005_000015.mp4": [(["air drumming"], *whole, "val")],
        "--6bJUbfpnQ_000017_000027.mp4": [([], *whole, "test")],
    }
    assert report == []


def test_epic_kitchens(tmp_path: Path) -> None:
    rows, report = _make("epic-kitchens", tmp_path)
    assert rows == {
        "P01_01.MP4": [
            (["verb/open", "noun/door"], 0.14, 0.37, "train"),
            (["verb/take", "noun/light"], 0.37, 0.9, "train"),
        ],
        "P01_101.MP4": [(["verb/take", "noun/cup"], 0.2, 0.8, "val")],
        "P02_12.MP4": [([], 0.0, 0.5, "test")],
    }
    assert _kinds(report) == [("bad_time", "EPIC_100_train.csv row 3")]
    classes = load_manifest(tmp_path / "clips.csv").classes
    assert classes[:5] == ("verb/take", "verb/put", "verb/wash", "verb/open", "noun/cup")


def test_cav_mae(tmp_path: Path) -> None:
    rows, report = _make("cav-mae", tmp_path)
    assert rows == {
        "0347ZoDXyP0.jpg": [(["Speech", "Car"], 0.0, np.inf, "train")],
        "-4wsuPCjDBc.jpg": [(["Car"], 0.0, np.inf, "train")],
    }
    assert _kinds(report) == [("no_file", "train.json row 3")]
    record = load_manifest(tmp_path / "clips.csv")[0]
    assert isinstance(record, FramesRecord) and record.fps == 1.0


def test_webdataset(tmp_path: Path) -> None:
    rows, report = _make("webdataset", tmp_path)
    whole = (0.0, np.inf)
    one, two = (["cat"], *whole, "train"), (["dog", "cat"], *whole, "train")
    assert rows == {
        "clip00.mp4": [one], "clip01.mp4": [one], "clip10.mp4": [two], "clip11.mp4": [two]
    }  # fmt: skip
    assert report == []


def test_webdataset_with_a_list_of_labels_beside_the_only_one(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for key, labels in (("two", ["b", "a"]), ("one", ["c"]), ("none", [])):
            only = labels[0] if len(labels) == 1 else None
            fields = {"label": only, "labels": labels}
            tar.write({"__key__": key, "mp4": b"", "json": fields})
    made = match_webdataset(tmp_path, tmp_path / "clips.csv")
    assert [row.labels for row in made.rows] == [(), ("c",), ("b", "a")]


def test_packed_clips_need_no_manifest(tmp_path: Path) -> None:
    _make("webdataset", tmp_path)
    pack(tmp_path / "clips.csv", tmp_path / "packed", PackOptions(), jobs=1)
    with pytest.raises(ManifestError, match="packed holds packed clips: the folder itself is a"):
        match_webdataset(tmp_path / "packed", tmp_path / "again.csv")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_row_can_be_read(name: str, tmp_path: Path) -> None:
    _make(name, tmp_path)
    for record in load_manifest(tmp_path / "clips.csv"):
        with open_record(record, "pyav") as clip:
            assert clip.info.has_video and clip.info.has_audio
            assert clip.read_video(np.array([record.start_s]), None).shape == (1, 64, 96, 3)
            assert clip.read_audio(0, 100).shape == (100,)


@pytest.mark.parametrize("name", ["cav-mae", "webdataset"])
def test_every_row_can_be_packed(name: str, tmp_path: Path) -> None:
    rows, _ = _make(name, tmp_path)
    index = pack(tmp_path / "clips.csv", tmp_path / "packed", PackOptions(), jobs=1)
    assert len(index.rows) == len(rows)
    listed, packed = (load_manifest(tmp_path / source) for source in ("clips.csv", "packed"))
    assert packed.classes == listed.classes
    for i in range(len(rows)):
        assert packed.labels(i) == listed.labels(i)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_page_shows_these_layouts(name: str, tmp_path: Path) -> None:
    """docs/data.md holds the listing of each layout and the manifest that is made of it."""
    root = tmp_path / name
    root.mkdir()
    arguments = LAYOUTS[name](root)
    blocks = [listing(root)]
    # Below the folder with the annotations, so that paths are short.
    assert main(["manifest", *arguments, "--out", str(root / "clips.csv")]) == 0
    blocks.append((root / "clips.csv").read_text().rstrip())
    relative = [a.replace(str(root), ".").removeprefix("./") for a in arguments]
    blocks.append(" ".join(["avmae manifest", *relative, "--out clips.csv"]))
    page = DOCS.read_text()
    missing = [block for block in blocks if f"```\n{block}\n```" not in page]
    assert not missing, "docs/data.md lacks:\n\n" + "\n\n".join(missing)


@pytest.mark.parametrize(
    ("stem", "found"),
    [
        ("---g-f_I2yQ_000001", ("---g-f_I2yQ", 1.0)),
        ("Y--PJHxphWEs", ("--PJHxphWEs", None)),
        ("YAbcd_efgh-", ("YAbcd_efgh-", None)),
        ("YAbcd_efgh-_000030", ("YAbcd_efgh-", 30.0)),
        ("abcdefgh_12_000030_000040", ("abcdefgh_12", 30.0)),
        ("0347ZoDXyP0.30-40", ("0347ZoDXyP0", 30.0)),
        ("short", None),
        ("0347ZoDXyP0_highlights", None),
    ],
)
def test_names_of_youtube_clips(stem: str, found: tuple | None) -> None:
    assert list(youtube_name(stem)) == ([] if found is None else [found])


def test_the_better_of_two_files(tmp_path: Path) -> None:
    for name in ("0347ZoDXyP0.mp4", "0347ZoDXyP0_000095.wav", "b/0347ZoDXyP0_000095.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    index = FolderIndex(tmp_path, youtube_name)
    found = [file.path for file in index.find("0347ZoDXyP0", 95.0)]
    assert found == ["b/0347ZoDXyP0_000095.mp4", "0347ZoDXyP0_000095.wav", "0347ZoDXyP0.mp4"]
    assert [file.path for file in index.find("0347ZoDXyP0", 7.0)] == ["0347ZoDXyP0.mp4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["vggsound", "nowhere", "x.csv"], "x.csv is not an annotation file as published"),
        (["kinetics", ".", "vggsound.csv"], "wanted a column 'youtube_id', got the columns ---g-f"),
        (["vggsound", "empty", "vggsound.csv"], "nothing to write to .* 4 rows without a file"),
        (["vggsound", "nowhere", "vggsound.csv"], "nowhere is not a folder of media files"),
        (["cav-mae", ".", "vggsound.csv"], "wanted a JSON object with the rows in `data`"),
        (["webdataset", "broken"], "a.tar cannot be read as an uncompressed tar"),
        (["vggsound", "video", "vggsound.csv", "--out", "vggsound.csv"], "is there already"),
        (["vggsound", "video", "vggsound.csv", "--out", "x.txt"], "is a .csv file"),
    ],
)
def test_bad_input_is_named(
    change: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    LAYOUTS["vggsound"](tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.tar").write_bytes(b"x" * 2000)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["manifest", *change]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert sorted(tmp_path.rglob("*")) == before
