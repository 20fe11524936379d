"""Every installed reader gives the same pictures at the same times, and sound on the same clock."""

import importlib
import logging
import os
import sys
import types
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from conftest import VFR_TIMES_S
from media import picture, remux, shown_index, tone, truncate, write_clip

from avmae_fast.config import ConfigError
from avmae_fast.data import pyav_pictures, readers
from avmae_fast.data.clip import AUDIO_RATE_HZ, ClipError, resize, resized_shape, stacked
from avmae_fast.data.pictures import picture_of
from avmae_fast.data.readers import open_clip, read_clip, resolve_reader


def _if_installed(name):
    try:
        resolve_reader(name)
    except ConfigError as error:
        return pytest.param(name, marks=pytest.mark.skip(reason=str(error)))
    return pytest.param(name)


READERS = [_if_installed(name) for name in ("pyav", "torchcodec", "decord")]


def _shown(path, times_s, reader, size=None):
    return [
        shown_index(image) for image in read_clip(path, times_s, size=size, reader=reader).video
    ]


# --- pictures

# Names of files whose picture k is on display from k/25 s on, and the number of pictures.
CONSTANT_RATE = {
    "plain.mp4": 60,
    "gop.mp4": 100,
    "long_gop.mp4": 100,
    "late_sound.mp4": 60,
    "odd.mp4": 50,
    "one_frame.mp4": 1,
    "pcm44.mov": 50,
    "pcm48.mkv": 50,
    "opus.webm": 50,
    "av1.mp4": 50,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", CONSTANT_RATE)
def test_picture_on_display(media, name, reader):
    count = CONSTANT_RATE[name]
    rng = np.random.default_rng(len(name))
    # On the dot, anywhere between, out of order, repeated, and the whole last picture.
    wanted = np.concatenate([rng.integers(0, count, 6), [0, count - 1, count - 1]])
    within = np.concatenate([np.zeros(3), rng.uniform(0.05, 0.9, 4), [0.0, 0.9]])
    times_s = (wanted + within) / 25
    assert _shown(media(name), times_s, reader) == wanted.tolist()
    # And where decoding does not begin with a picture that is wanted.
    assert _shown(media(name), times_s[:2], reader) == wanted[:2].tolist()


@pytest.mark.parametrize("reader", READERS)
def test_variable_rate(media, reader):
    times_s = np.array([0.0, 0.037, 0.041, 0.39, 0.41, 0.89, 1.2, 1.49, 1.59])
    expected = np.searchsorted(VFR_TIMES_S, times_s, side="right") - 1
    assert _shown(media("vfr.mp4"), times_s, reader) == expected.tolist()


@pytest.mark.parametrize("reader", READERS)
def test_clock_starts_at_the_first_displayed_picture_of_a_cut(media, reader):
    # The cut at 1 s keeps pictures 0 to 24 in the file, only to decode the rest.
    assert _shown(media("cut.mp4"), np.array([0.0, 0.5, 2.96]), reader) == [25, 37, 99]


def _cut_between_keyframes(media, tmp_path):
    # Keyframes are 24 and 36: the cut at 1.32 s starts with picture 33.
    return remux(media("gop.mp4"), tmp_path / "cut.mp4", start_s=1.32)


@pytest.mark.parametrize("reader", [READERS[0], READERS[2]])
def test_cut_between_keyframes(media, tmp_path, reader):
    cut = _cut_between_keyframes(media, tmp_path)
    assert _shown(cut, np.array([0.0, 0.2, 1.0]), reader) == [33, 38, 58]


@pytest.mark.parametrize("reader", [READERS[1]])
def test_pictures_of_another_time_are_refused(media, tmp_path, reader):
    with pytest.raises(ClipError, match="decode.*missed its way"):
        read_clip(_cut_between_keyframes(media, tmp_path), np.array([0.0]), reader=reader)


@pytest.mark.parametrize("reader", [READERS[0], READERS[2]])
def test_transport_stream(media, reader):
    # Its clock starts at 80 ms and it has no index to seek by.
    times_s = np.array([0.0, 0.5, 1.0, 1.96])
    assert _shown(media("stream.ts"), times_s, reader) == [0, 12, 25, 49]


@pytest.mark.parametrize("reader", READERS)
def test_rotation_is_applied(media, reader):
    clip = read_clip(media("rotated.mp4"), np.array([0.4]), reader=reader)
    assert clip.video.shape == (1, 112, 80, 3)
    upright = read_clip(media("plain.mp4"), np.array([0.4]), reader=reader).video[0]
    assert shown_index(np.rot90(clip.video[0])) == shown_index(upright) == 10


@pytest.mark.parametrize("reader", READERS[1:])
@pytest.mark.parametrize("name", ["plain.mp4", "gop.mp4", "odd.mp4", "rotated.mp4"])
def test_pixels_are_the_same_in_every_reader(media, name, reader):
    times_s = np.array([0.1, 0.7, 1.3])
    ours = read_clip(media(name), times_s, size=48, reader="pyav").video
    theirs = read_clip(media(name), times_s, size=48, reader=reader).video
    np.testing.assert_array_equal(theirs, ours)


@pytest.mark.parametrize("name", ["gop.mp4", "long_gop.mp4", "cut.mp4", "vfr.mp4"])
def test_skipping_in_the_decoder_changes_no_pixel(media, name):
    with av.open(str(media(name))) as container:
        frames = list(container.decode(video=0))
    starts_s = np.array([float(frame.time or 0) for frame in frames])
    pictures = [picture_of(frame, VideoReformatter(), None, "rgb") for frame in frames]
    every = stacked((([i], p) for i, p in enumerate(pictures)), len(pictures))
    rng = np.random.default_rng(1)
    for _ in range(3):
        times_s = np.sort(rng.uniform(0, starts_s[-1], 8))
        expected = every[np.searchsorted(starts_s, times_s, side="right") - 1]
        video = read_clip(media(name), times_s, reader="pyav").video
        np.testing.assert_array_equal(video, expected)


def test_millisecond_timestamps_reach_their_picture(tmp_path):
    # Matroska stamps the picture due at 2/30 s with 67 ms.
    path = write_clip(tmp_path / "ms.mkv", frames=30, fps=30)
    assert _shown(path, np.arange(30) / 30, "pyav") == list(range(30))


def test_seeks_instead_of_reading_through(media, monkeypatch):
    packets = []
    demux = pyav_pictures.Pictures._demux
    monkeypatch.setattr(
        pyav_pictures.Pictures,
        "_demux",
        lambda self, last: packets.append(demux(self, last)) or packets[-1],
    )
    # 2.6 s lies in the GOP of pictures 60 to 71; 0.1 s in the first one.
    assert _shown(media("gop.mp4"), np.array([2.6, 2.7, 0.1]), "pyav") == [65, 67, 2]
    assert sum(len(read) for read, _ in packets) < 24


def test_resize():
    assert resized_shape(256, 340, 224) == (224, 297)
    assert resized_shape(340, 256, 224) == (297, 224)
    assert resized_shape(10, 20, (7, 9)) == (7, 9)
    image = picture(77, 64, 128)
    assert resize(image, None) is image
    small = resize(image, 32)
    assert small.shape == (32, 64, 3) and shown_index(small) == 77
    # A ramp stays a ramp through the middles of the pixels, away from the edges.
    ramp = np.tile(10 * np.arange(16, dtype=np.uint8)[None, :, None], (16, 1, 3))
    np.testing.assert_array_equal(resize(ramp, 8)[0, 1:-1, 0], 20 * np.arange(1, 7) + 5)


# --- sound


def _click(rate: int, at_s: float, seconds: float = 2.0) -> np.ndarray:
    sound = np.zeros(round(seconds * rate), np.float32)
    burst = np.arange(rate // 200)
    sound[round(at_s * rate) :][: burst.size] = 0.9 * np.cos(2 * np.pi * 2000 / rate * burst)
    return sound


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("suffix", "codec", "rate"),
    [(".mov", "pcm_s16le", 16000), (".mov", "pcm_s16le", 44100), (".mp4", "aac", 44100)],
)
def test_flash_and_click_come_together(tmp_path, suffix, codec, rate, reader):
    """A white picture and a click at 0.8 s are read at the same time, within 2 ms."""
    pictures = [np.full((80, 112, 3), 255 if i == 20 else 0, np.uint8) for i in range(50)]
    path = write_clip(
        tmp_path / f"sync{suffix}",
        pictures=pictures,
        sound=_click(rate, at_s=20 / 25),
        rate=rate,
        audio_codec=codec,
    )
    start_s = 0.3
    times_s = start_s + np.arange(100) / 100
    clip = read_clip(path, times_s, (start_s, 16000), reader=reader)
    flash_s = times_s[clip.video.mean(axis=(1, 2, 3)) > 128]
    assert flash_s[0] == pytest.approx(0.80) and flash_s[-1] == pytest.approx(0.83)
    loud = np.flatnonzero(np.abs(clip.waveform) > 10000)
    assert start_s + loud[0] / AUDIO_RATE_HZ == pytest.approx(0.8, abs=2e-3)


@pytest.mark.parametrize("reader", READERS)
def test_lossless_sound_is_exact(tmp_path, reader):
    sound = np.random.default_rng(0).integers(-20000, 20000, 32000).astype(np.float32) / 32768
    path = write_clip(tmp_path / "pcm.mov", sound=sound, audio_codec="pcm_s16le")
    expected = (sound * 32768).astype(np.int16)
    waveform = read_clip(path, None, (0.5, 8000), reader=reader).waveform
    np.testing.assert_array_equal(waveform, expected[8000:16000])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["pcm44.mov", "pcm48.mkv"])
def test_resampled_tone_keeps_level_and_phase(media, name, reader):
    waveform = read_clip(media(name), None, (0.5, 16000), reader=reader).waveform
    expected = tone(1.5, AUDIO_RATE_HZ)[8000:] * 32768
    # 440 Hz is far inside the pass band: what is left is the filter's ripple and the rounding.
    assert np.abs(waveform - expected).max() < 0.002 * 16384


@pytest.mark.parametrize("reader", READERS)
def test_channels_are_averaged(tmp_path, reader):
    path = write_clip(tmp_path / "stereo.mov", channels=2, audio_codec="pcm_s16le")
    with open_clip(path, reader) as clip:
        stereo = clip.read_audio(0, 16000)
    mono = write_clip(tmp_path / "mono.mov", channels=1, audio_codec="pcm_s16le")
    with open_clip(mono, reader) as clip:
        np.testing.assert_array_equal(stereo, clip.read_audio(0, 16000))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["plain.mp4", "gop.mp4", "pcm48.mkv"])
def test_samples_do_not_depend_on_the_window(media, name, reader):
    with open_clip(media(name), reader) as clip:
        whole = clip.read_audio(0, 32000)
        for start in (0, 1, 7777, 20000):
            np.testing.assert_array_equal(clip.read_audio(start, 8000), whole[start : start + 8000])


@pytest.mark.parametrize("reader", READERS[1:])
@pytest.mark.parametrize("name", ["plain.mp4", "gop.mp4", "cut.mp4", "late_sound.mp4", "opus.webm"])
def test_sound_is_the_same_in_every_reader(media, name, reader):
    ours = read_clip(media(name), None, (0.2, 24000), reader="pyav").waveform.astype(int)
    theirs = read_clip(media(name), None, (0.2, 24000), reader=reader).waveform.astype(int)
    # Two builds of FFmpeg decode in float32; Opus has no exact decoding at all.
    assert np.abs(ours - theirs).max() <= (40 if name == "opus.webm" else 2)


def test_clock_that_does_not_start_at_zero(tmp_path):
    path = write_clip(tmp_path / "sync.ts", sound=_click(44100, at_s=0.8), rate=44100)
    waveform = read_clip(path, None, (0.3, 16000), reader="pyav").waveform
    loud = np.flatnonzero(np.abs(waveform) > 10000)
    assert 0.3 + loud[0] / AUDIO_RATE_HZ == pytest.approx(0.8, abs=2e-3)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["plain.mp4", "gop.mp4"])
def test_sound_from_the_very_start(media, name, reader):
    # The packet before the first sample primes the decoder; left out, 448 samples are missing.
    waveform = read_clip(media(name), None, (0.0, 400), reader=reader).waveform.astype(int)
    for first in range(0, 400, 40):  # a period of the tone is 36 samples
        assert np.abs(waveform[first : first + 40]).max() > 12000


@pytest.mark.parametrize("reader", READERS)
def test_outside_the_track_is_silence(media, reader):
    waveform = read_clip(media("late_sound.mp4"), None, (-0.5, 80000), reader=reader).waveform
    assert np.abs(waveform[: 16000 + 6000]).max() == 0
    assert np.abs(waveform[8000 + 17000 : 8000 + 37000]).max() > 8000
    assert np.abs(waveform[8000 + 42000 :]).max() == 0


# --- what goes wrong

BAD_FILES = {
    "missing.mp4": "open",
    "empty.mp4": "open",
    "random.mp4": "open",
    "text.mp4": "open",
    "no_index.mp4": "open",
    "zeroed.mp4": "decode",
    "truncated.mp4": "short",
    "sound_only.mp4": "no_video",
    "no_sound.mp4": "no_audio",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(media, name, reader):
    path = media(name) if name != "missing.mp4" else media("plain.mp4").with_name(name)
    with pytest.raises(ClipError) as error:
        read_clip(path, np.arange(16) * 0.2, (0.0, 16000), reader=reader)
    assert error.value.kind == BAD_FILES[name]
    assert error.value.path == str(path) and str(path) in str(error.value) and error.value.detail


@pytest.mark.parametrize("reader", READERS)
def test_what_is_left_of_a_truncated_file_is_read(media, reader):
    assert _shown(media("truncated.mp4"), np.array([0.0, 1.0]), reader) == [0, 25]


def test_truncated_sound_is_not_silence(tmp_path):
    path = write_clip(
        tmp_path / "half.mov", frames=0, sound=tone(4, 16000), audio_codec="pcm_s16le"
    )
    truncate(path)
    assert read_clip(path, None, (0.5, 8000)).waveform.any()
    with pytest.raises(ClipError, match="short: the sound ends at"):
        read_clip(path, None, (0.5, 50000))


def test_folder_and_pipe_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path, tmp_path / "pipe.mp4", tmp_path / ("x" * 300)):
        with pytest.raises(ClipError, match="open"):
            open_clip(path)


def test_timeout(media, monkeypatch):
    monkeypatch.setattr("avmae_fast.data.clip.READ_TIMEOUT_S", -1.0)
    with open_clip(media("plain.mp4"), "pyav") as clip:
        with pytest.raises(ClipError, match="timeout: still decoding"):
            clip.read_video(np.array([1.0]), None)
        with pytest.raises(ClipError, match="timeout"):
            clip.read_audio(0, 100)


@pytest.mark.parametrize(
    "times_s", [np.array([-0.1]), np.array([np.nan]), np.zeros((2, 2))], ids=["<0", "nan", "2-D"]
)
@pytest.mark.parametrize("reader", READERS)
def test_bad_times(media, reader, times_s):
    with pytest.raises(ValueError, match="times_s must be"):
        read_clip(media("plain.mp4"), times_s, reader=reader)


def test_memory_does_not_grow(media):
    resident = []
    for _ in range(3):
        for _ in range(40):
            read_clip(media("gop.mp4"), np.array([0.5, 3.0]), (0.0, 16000), size=48, reader="pyav")
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    # MiB; the first round warms up. A second of sound kept from each read would be 2.5.
    assert resident[-1] - resident[0] < 2.0


# --- the choice of a reader


def test_unknown_reader():
    with pytest.raises(ConfigError, match="reader = 'ffmpeg' is not valid: .*pyav, torchcodec"):
        resolve_reader("ffmpeg")


def _without(monkeypatch, *modules):
    def import_module(name):
        if name in modules:
            raise ImportError(f"No module named {name!r}")
        return importlib.import_module(name)

    monkeypatch.setattr(readers, "import_module", import_module)
    monkeypatch.setattr(readers, "_first_that_loads", readers._first_that_loads.__wrapped__)


def test_a_missing_reader_names_its_package(monkeypatch):
    _without(monkeypatch, "decord")
    with pytest.raises(
        ConfigError, match="'decord' needs the package decord2 .*pip install decord2"
    ):
        resolve_reader("decord")


def test_auto_prefers_pyav_and_says_so(monkeypatch, caplog):
    _without(monkeypatch)
    with caplog.at_level(logging.INFO):
        assert resolve_reader("auto") == "pyav"
    assert "media files are read by pyav" in caplog.text


def test_auto_falls_back_with_a_warning(monkeypatch, caplog):
    _without(monkeypatch, "av")
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    assert resolve_reader("auto") == "torchcodec"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "pip install av" in record.message


def test_no_reader_at_all(monkeypatch):
    _without(monkeypatch, "av", "torchcodec", "decord")
    with pytest.raises(ConfigError, match="no reader of media files is installed: .*install av"):
        resolve_reader("auto")


@pytest.mark.parametrize("reader", [READERS[2]])
def test_old_decord_is_warned_of_once(media, monkeypatch, caplog, reader):
    from avmae_fast.data import reader_decord

    monkeypatch.setattr(reader_decord.decord, "__version__", "0.6.0")
    reader_decord._warn_of_old_version.cache_clear()
    for _ in range(2):
        open_clip(media("plain.mp4"), reader).close()
    assert caplog.text.count("decord 0.6.0 can hang") == 1 and "decord2" in caplog.text
