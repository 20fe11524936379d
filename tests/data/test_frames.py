"""Clips of picture files and a sound file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from media import picture, shown_index, tone, write_clip, write_jpeg

from avmae_fast.data.clip import ClipError
from avmae_fast.data.manifest import FramesRecord, load_manifest
from avmae_fast.data.reader_frames import picture_files
from avmae_fast.data.readers import open_record
from avmae_kernels.yuv import i420_to_rgb


@pytest.fixture
def clip(tmp_path: Path) -> FramesRecord:
    """Twelve pictures, two a second, in folders as CAV-MAE's preparation makes them."""
    for index in range(12):
        write_jpeg(tmp_path / f"frame_{index}" / "a.jpg", picture(index, 64, 96))
    write_clip(tmp_path / "a.wav", frames=0, sound=tone(6, 16000), audio_codec="pcm_s16le")
    manifest = tmp_path / "clips.csv"
    manifest.write_text("path,sound,fps,label\nframe_*/a.jpg,a.wav,2,x\n")
    (record,) = load_manifest(manifest)
    assert isinstance(record, FramesRecord)
    return record


def test_pictures_and_sound(clip: FramesRecord) -> None:
    times_s = np.array([0.0, 0.49, 0.5, 5.1, 99.0, 1.0])
    with open_record(clip) as reader:
        assert reader.info.duration_s == 6.0 and reader.info.fps == 2.0
        assert (reader.info.height, reader.info.width) == (64, 96)
        pictures = reader.read_video(times_s, None)
        # frame_10 comes after frame_9, not after frame_1.
        assert [shown_index(p) for p in pictures] == [0, 0, 1, 10, 11, 2]
        assert reader.read_video(times_s, 32).shape == (6, 32, 48, 3)
        sound = reader.read_audio(8000, 1600)
    assert np.abs(sound - tone(6, 16000)[8000:9600] * 32768).max() <= 1
    with open_record(clip, pixels="yuv420") as reader:
        planes = reader.read_video(times_s, None)
    rgb = i420_to_rgb(torch.from_numpy(planes)[None])[0].numpy()
    assert np.percentile(np.abs(rgb.astype(int) - pictures), 99) <= 4


def test_without_sound(clip: FramesRecord) -> None:
    silent = FramesRecord(clip.path, -1, 0.0, 3.0, None, 2.0)
    with open_record(silent) as reader:
        assert not reader.info.has_audio
        with pytest.raises(ClipError, match="no_audio: no sound file is given"):
            reader.read_audio(0, 1)


def test_faults_are_named(clip: FramesRecord, tmp_path: Path) -> None:
    def opened(path: Path, sound: Path | None = None) -> ClipError:
        with pytest.raises(ClipError) as caught:
            open_record(FramesRecord(path, -1, 0.0, 3.0, sound, 2.0))
        return caught.value

    assert "no picture file has such a name" in opened(tmp_path / "frame_*/b.jpg").detail
    assert opened(clip.path, tmp_path / "b.wav").kind == "open"
    (tmp_path / "frame_3/a.jpg").write_bytes(b"not a picture")
    with open_record(clip) as reader, pytest.raises(ClipError) as caught:
        reader.read_video(np.array([1.5]), None)
    assert caught.value.kind == "decode"


def test_only_a_star_is_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "[a]?"
    folder.mkdir()
    for name in ("10.jpg", "9.jpg", "x.png"):
        (folder / name).touch()
    assert [f.name for f in picture_files(folder / "*.jpg")] == ["9.jpg", "10.jpg"]
