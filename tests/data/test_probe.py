"""Probing a folder: one line a file, whatever is in it."""

import os

import pytest

from avmae_fast.config import ConfigError
from avmae_fast.data.probe import print_report, probe_folder


@pytest.fixture
def folder(media, tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("plain.mp4", "rotated.mp4", "no_sound.mp4", "sound_only.mp4"):
        os.link(media(name), tmp_path / "deep" / name)
    for name in ("zeroed.mp4", "random.mp4", "empty.mp4"):
        os.link(media(name), tmp_path / name)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "gone.mkv").symlink_to("nowhere")
    (tmp_path / "notes.txt").write_text("not media")
    # A name that is not text, and one in capitals.
    os.link(media("empty.mp4"), os.fsencode(tmp_path) + b"/\xff.MP4")
    return tmp_path


def test_report(folder):
    lines = []
    bad = print_report(folder, "pyav", lines.append)
    *files, last = lines
    status = {line.split()[1].rstrip(":"): line for line in files}
    assert len(files) == 10 and "notes.txt" not in status
    assert "2.40 s, 112x80, 25.00 fps, h264, sound 16000 Hz" in status["deep/plain.mp4"]
    assert "80x112" in status["deep/rotated.mp4"]
    assert "no sound" in status["deep/no_sound.mp4"]
    assert "no video" in status["deep/sound_only.mp4"]
    assert "decode" in status["zeroed.mp4"]
    assert "not a regular file" in status["folder.mp4"]
    assert "no such file" in status["gone.mkv"]
    assert status[r"\xff.MP4"].startswith("BAD")
    assert all(line.startswith("ok ") for name, line in status.items() if "deep/" in name)
    assert bad == 6
    assert "10 files: 4 readable" in last and "1 without sound, 1 without video" in last
    assert "bad: 1 decode, 5 open" in last


def test_nothing_to_probe(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        probe_folder(tmp_path / "missing")
    with pytest.raises(ConfigError, match="holds no media file; the suffixes looked for are"):
        probe_folder(tmp_path)
    with pytest.raises(ConfigError, match="reader = 'other' is not valid"):
        probe_folder(tmp_path, "other")
