"""Members of tars as media files: equal to the file they were made of, for every reader."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from media import truncate, write_clip

from avmae_fast.config import ConfigError
from avmae_fast.data.clip import ClipError
from avmae_fast.data.media import MemberFile, open_source, tar_members
from avmae_fast.data.readers import read_clip, resolve_reader

TIMES_S = np.array([0.2, 1.4])


@pytest.fixture
def clips(tmp_path: Path) -> tuple[Path, Path]:
    """A tar as webdataset writes it, and the folder of the files in it."""
    folder = tmp_path / "files"
    folder.mkdir()
    with webdataset.TarWriter(str(tmp_path / "a-000.tar")) as tar:
        for key in ("one", "two"):
            path = write_clip(folder / f"{key}.mp4", gop=10 if key == "one" else 50)
            tar.write({"__key__": key, "mp4": path.read_bytes(), "cls": 3})
    return tmp_path / "a-000.tar", folder


@pytest.mark.parametrize("reader", ["pyav", "torchcodec", "decord"])
def test_a_member_reads_as_its_file(clips, reader: str) -> None:
    try:
        resolve_reader(reader)
    except ConfigError as error:
        pytest.skip(str(error))
    tar, folder = clips
    for key in ("two.mp4", "one.mp4"):
        member = read_clip(tar / key, TIMES_S, (0.5, 8000), reader=reader)
        file = read_clip(folder / key, TIMES_S, (0.5, 8000), reader=reader)
        assert np.array_equal(member.video, file.video)
        assert np.array_equal(member.waveform, file.waveform)
        assert member.info == file.info


def test_a_member_reads_as_a_file_object(clips) -> None:
    tar, folder = clips
    member, data = open_source(tar / "two.mp4"), (folder / "two.mp4").read_bytes()
    assert isinstance(member, MemberFile) and member.readable() and member.seekable()
    assert member.read(10) == data[:10] and member.tell() == 10
    assert member.seek(-5, os.SEEK_END) == len(data) - 5 and member.read(100) == data[-5:]
    assert member.read() == b"" and member.seek(0) == 0 and member.read() == data
    assert [m.name for m in tar_members(tar)] == ["one.cls", "one.mp4", "two.cls", "two.mp4"]


def _error(path: Path) -> ClipError:
    with pytest.raises(ClipError) as caught:
        read_clip(path, TIMES_S, reader="pyav")
    assert caught.value.path == str(path)
    return caught.value


def test_faults_are_named(clips, tmp_path: Path) -> None:
    tar, _ = clips
    missing = _error(tar / "three.mp4")
    assert (missing.kind, missing.detail) == ("open", "a-000.tar has no such member")
    assert _error(tmp_path / "b.tar/one.mp4").detail == "b.tar: No such file or directory"
    (tmp_path / "c.tar").write_bytes(os.urandom(4096))
    assert _error(tmp_path / "c.tar/one.mp4").kind == "open"
    with tarfile.open(tmp_path / "z.tar", "w:gz") as zipped:
        zipped.add(tmp_path / "files/one.mp4", "one.mp4")
    assert _error(tmp_path / "z.tar/one.mp4").kind == "open"


def test_a_tar_that_changes_is_told(clips) -> None:
    tar, _ = clips
    read_clip(tar / "one.mp4", TIMES_S)
    member = open_source(tar / "one.mp4")
    with tar.open("r+b") as file:
        file.seek(2000)
        file.write(b"x")
    os.utime(tar, ns=(0, 1))
    with pytest.raises(ClipError, match="written to since it was opened") as caught:
        member.read(10)
    assert caught.value.kind == "decode"
    truncate(tar)
    assert _error(tar / "one.mp4").kind in ("short", "decode", "open")


def test_a_folder_may_be_called_tar(tmp_path: Path) -> None:
    folder = tmp_path / "clips.tar"
    folder.mkdir()
    clip = read_clip(write_clip(folder / "a.mp4", frames=5), np.array([0.0]))
    assert clip.video.shape[0] == 1
