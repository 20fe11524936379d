"""Manifests: what is read, and that every mistake is named with its row, column and value."""

import json
import logging
import math
import pickle

import numpy as np
import pytest

from avmae_fast.data.manifest import ManifestError, load_manifest


def _write(tmp_path, text, name="clips.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv(tmp_path):
    path = _write(
        tmp_path,
        "\ufeffpath, label ,start,end,split,mine\n"
        "a/ü b.mp4,dog,1.5,4,train,x\n/abs/c.mp4,cat,,,val,\nd.mp4,,,7,,\n",
    )
    manifest = load_manifest(path)
    assert manifest.classes == ("cat", "dog")
    first, second, third = manifest
    assert (first.path, first.label) == (tmp_path / "a/ü b.mp4", 1)
    assert (first.start_s, first.end_s) == (1.5, 4.0)
    assert (str(second.path), second.label, second.end_s) == ("/abs/c.mp4", 0, math.inf)
    assert (third.label, third.start_s, third.end_s) == (-1, 0.0, 7.0)
    assert [r.path.name for r in manifest.select("train")] == ["ü b.mp4", "d.mp4"]
    assert [r.path.name for r in manifest.select("val")] == ["c.mp4"]
    assert len(manifest.select("test")) == 0


def test_json_lines(tmp_path):
    rows = [{"path": "a.mp4", "label": 3}, {"path": "b.mp4", "label": "0", "start": 2, "other": []}]
    path = _write(tmp_path, "\n\n".join(map(json.dumps, rows)) + "\n", "clips.jsonl")
    manifest = load_manifest(path)
    # Numbers are indices: the table reaches up to the largest.
    assert manifest.classes == ("0", "1", "2", "3")
    assert [record.label for record in manifest] == [3, 0]
    assert manifest[1].start_s == 2.0


def test_class_table_of_another_manifest(tmp_path):
    path = _write(tmp_path, "path,label\na.mp4,dog\n")
    assert load_manifest(path, classes=("cat", "dog"))[0].label == 1
    with pytest.raises(ManifestError, match="row 1, column label: 'dog' is not one of the 1 class"):
        load_manifest(path, classes=("cat",))


def test_travels_to_workers(tmp_path):
    path = _write(
        tmp_path, "path\n" + "".join(f"some/folder/clip{i:07}.mp4\n" for i in range(2000))
    )
    data = pickle.dumps(load_manifest(path))
    # Arrays, not two thousand objects: some sixty bytes a record.
    assert len(data) < 2000 * 80
    assert pickle.loads(data)[1999] == load_manifest(path)[1999]


def test_is_frozen(tmp_path):
    manifest = load_manifest(_write(tmp_path, "path\na.mp4\n"))
    with pytest.raises(AttributeError):
        manifest.classes = ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'path' in its first line, which is nothing"),
        ("file,label\na.mp4,1\n", "no column 'path' in its first line, which is 'file', 'label'"),
        ("path,label\n", "lists no clips"),
        ("path,label\na.mp4,1\n,2\n", "row 2, column path: None is not the path"),
        ("path,start\na.mp4,soon\n", "row 1, column start: 'soon' is not a number of seconds"),
        ("path,start\na.mp4,-1\n", "row 1, column start: '-1' is not a number of seconds"),
        ("path,end\na.mp4,nan\n", "row 1, column end: 'nan' is not a number of seconds"),
        ("path,start,end\na.mp4,3,2\n", "row 1, column end: '2' is not after the start at 3.0 s"),
        ("path,end\na.mp4,0\n", "row 1, column end: '0' is not after the start"),
        ("path,split\na.mp4,training\n", "row 1, column split: 'training' is not train, val or"),
        ("path\na.mp4,b,c\n", "row 1, column last: .* is not one of 1 columns"),
        ("path,label\na.mp4,99999999999\n", "column label: '99999999999' is not a class number"),
        (f"path,label\na.mp4,{'9' * 5000}\n", "column label: '9{40}' is not a class number"),
    ],
)
def test_bad_csv(tmp_path, text, message):
    path = _write(tmp_path, text)
    with pytest.raises(ManifestError, match=message) as error:
        load_manifest(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "a.mp4"}\n{"path": \n', "row 2 is not JSON"),
        ('["a.mp4"]\n', "row 1 is not a JSON object"),
        ('{"path": 7}\n', "row 1, column path: 7 is not the path"),
        ('{"label": 1}\n', "row 1, column path: None is not the path"),
        ('{"path": "a.mp4", "label": 1.5}\n', "row 1, column label: 1.5 is not a class name"),
        ('{"path": "a.mp4", "start": true}\n', "row 1, column start: True is not a number"),
        ('{"path": "a.mp4", "start": [1]}\n', r"row 1, column start: \[1\] is not a number"),
        (
            '{"path": "a.mp4", "end": 1' + "0" * 400 + "}\n",
            "row 1, column end: 10+ is not a number",
        ),
        ('{"path": "a.mp4", "end": ' + "1" * 5000 + "}\n", "row 1 is not JSON"),
        ('{"path": ' + "[" * 100_000 + "\n", "row 1 is not JSON"),
        (r'{"path": "\ud800"}' + "\n", "row 1, column path: .* is not the path"),
        (r'{"path": "a\u0000b"}' + "\n", "row 1, column path: .* is not the path"),
    ],
)
def test_bad_json(tmp_path, text, message):
    with pytest.raises(ManifestError, match=message):
        load_manifest(_write(tmp_path, text, "clips.jsonl"))


def test_bad_file(tmp_path):
    with pytest.raises(ManifestError, match="cannot be read"):
        load_manifest(tmp_path / "missing.csv")
    with pytest.raises(ManifestError, match="a manifest is a .csv or a .jsonl file"):
        load_manifest(_write(tmp_path, "path\n", "clips.txt"))
    (tmp_path / "binary.csv").write_bytes(np.random.default_rng(0).bytes(500))
    with pytest.raises(ManifestError, match=r"binary.csv"):
        load_manifest(tmp_path / "binary.csv")


def test_misspelt_column_is_pointed_out(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load_manifest(_write(tmp_path, "path,Label,weather\na.mp4,1,fine\n"))
    assert "column 'Label' is ignored; did you mean 'label'?" in caplog.text
    assert "weather" not in caplog.text


def test_several_labels(tmp_path):
    path = _write(tmp_path, "path,labels\na.mp4,dog | cat\nb.mp4,\nc.mp4,cat\nd.mp4,dog|dog\n")
    manifest = load_manifest(path)
    assert manifest.classes == ("cat", "dog")
    assert [manifest.labels(i) for i in range(4)] == [(1, 0), (), (0,), (1,)]
    # A clip of several classes has no single one.
    assert [record.label for record in manifest] == [-1, -1, 0, 1]
    rows = [{"path": "a", "labels": ["x|y", 3]}, {"path": "b", "label": "z", "split": "val"}]
    manifest = load_manifest(_write(tmp_path, "\n".join(map(json.dumps, rows)), "clips.jsonl"))
    assert manifest.classes == ("3", "x|y", "z") and manifest.labels(0) == (1, 0)
    chosen = manifest.select("val")
    assert chosen.labels(0) == chosen.labels(-1) == (2,) and chosen[0].label == 2


def test_class_names_beside_a_manifest(tmp_path):
    path = _write(tmp_path, "path,label\na.mp4,cat\n")
    _write(tmp_path, "dog\ncat\nemu\n", "clips.classes.txt")
    manifest = load_manifest(path)
    assert manifest.classes == ("dog", "cat", "emu") and manifest[0].label == 1
    assert load_manifest(path, classes=("cat",))[0].label == 0
    _write(tmp_path, "dog\ndog\n", "clips.classes.txt")
    with pytest.raises(ManifestError, match="one a line and none twice"):
        load_manifest(path)
    _write(tmp_path, "dog\n", "clips.classes.txt")
    with pytest.raises(ManifestError, match="'cat' is not one of the 1 classes: dog"):
        load_manifest(path)


def test_picture_files(tmp_path):
    path = _write(tmp_path, "path,sound,fps\nf/*.jpg,a.wav,2.5\ng/*.jpg,,1\nh.mp4,,\n")
    first, second, third = load_manifest(path)
    assert (first.path, first.sound, first.fps) == (tmp_path / "f/*.jpg", tmp_path / "a.wav", 2.5)
    assert second.sound is None and not hasattr(third, "fps")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "a", "labels": "b"}, "column labels: 'b' is not to be given beside a label"),
        ({"labels": "a||b"}, "column labels: 'a\\|\\|b' is not a class name"),
        ({"labels": ["a", None]}, "column labels: .* is not a class name"),
        ({"fps": 2}, r"column fps: 2 is not for picture files, whose path holds a \*"),
        ({"sound": "a.wav"}, r"column sound: 'a.wav' is not for picture files"),
        ({"path": "*.jpg"}, "column fps: None is not a number of pictures a second"),
        ({"path": "*.jpg", "fps": 0}, "column fps: 0 is not above 0"),
        ({"path": "*.jpg", "fps": 1, "sound": 3}, "column sound: 3 is not the path"),
    ],
)
def test_bad_labels_and_picture_files(tmp_path, row, message):
    path = _write(tmp_path, json.dumps({"path": "a.mp4", **row}), "clips.jsonl")
    with pytest.raises(ManifestError, match=message):
        load_manifest(path)
