"""Files that several tests of the data pipeline read; each is written once a session."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from media import remux, rotate, tone, truncate, write_clip, zero_middle

# Pictures of 25 per second unless stated; sound is a 440 Hz tone.
VFR_TIMES_S = [0.0, 0.04, 0.08, 0.4, 0.44, 0.9, 1.0, 1.5, 1.54, 1.58]
_SILENT = np.zeros(0, np.float32)

_WRITERS: dict[str, Callable[[Path], Path]] = {
    "plain.mp4": lambda p: write_clip(p, frames=60),
    "gop.mp4": lambda p: write_clip(p, frames=100, gop=12, rate=44100, channels=2),
    "long_gop.mp4": lambda p: write_clip(p, frames=100, gop=250),
    "vfr.mp4": lambda p: write_clip(p, times_s=VFR_TIMES_S),
    "cut.mp4": lambda p: remux(write_clip(p.with_stem("uncut"), frames=100), p, start_s=1.0),
    "late_sound.mp4": lambda p: write_clip(p, frames=60, sound=tone(1.4, 16000), sound_start_s=1.0),
    "rotated.mp4": lambda p: rotate(write_clip(p)),
    "odd.mp4": lambda p: write_clip(p, size=(65, 97), pix_fmt="yuv444p"),
    "one_frame.mp4": lambda p: write_clip(p, frames=1),
    "pcm44.mov": lambda p: write_clip(p, rate=44100, audio_codec="pcm_s16le"),
    "pcm48.mkv": lambda p: write_clip(p, rate=48000, audio_codec="pcm_s16le"),
    "opus.webm": lambda p: write_clip(
        p, codec="libvpx-vp9", audio_codec="libopus", rate=48000, options={"cpu-used": "8"}
    ),
    "av1.mp4": lambda p: write_clip(p, codec="libsvtav1", gop=20, options={"preset": "12"}),
    "stream.ts": lambda p: write_clip(p),
    "no_sound.mp4": lambda p: write_clip(p, sound=_SILENT),
    "sound_only.mp4": lambda p: write_clip(p, frames=0, sound=tone(2.0, 16000)),
    "truncated.mp4": lambda p: truncate(write_clip(p, frames=100)),
    "zeroed.mp4": lambda p: zero_middle(write_clip(p, frames=100)),
    "empty.mp4": lambda p: _write(p, b""),
    "random.mp4": lambda p: _write(p, np.random.default_rng(0).bytes(20000)),
    "text.mp4": lambda p: _write(p, b"<html>404 Not Found</html>"),
    "no_index.mp4": lambda p: truncate(write_clip(p, faststart=False), share=0.9),
}


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The path of a named file, which is written when it is first asked for."""
    folder = tmp_path_factory.mktemp("media")
    written: dict[str, Path] = {}

    def path_of(name: str) -> Path:
        if name not in written:
            written[name] = _WRITERS[name](folder / name)
        return written[name]

    return path_of


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder of ten clips of 1 to 2 s and bad ones, whose sound is the number of the sample."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(10):
        frames = 25 + 3 * i
        # Lossless, so that every sample says which one it is.
        ramp = np.arange(frames * 640, dtype=np.float32) / 65536
        path = folder / f"{i}.mov"
        write_clip(path, frames=frames, size=(64, 64), sound=ramp, audio_codec="pcm_s16le")
    write_clip(folder / "aac.mp4", size=(64, 80), rate=44100, channels=2)
    write_clip(folder / "no_sound.mp4", size=(64, 64), sound=np.zeros(0, np.float32))
    write_clip(folder / "sound_only.mov", frames=0, sound=tone(2, 16000), audio_codec="pcm_s16le")
    write_clip(folder / "one_frame.mov", frames=1, size=(64, 64), audio_codec="pcm_s16le")
    truncate(write_clip(folder / "truncated.mp4", frames=100, size=(64, 64)), 0.3)
    (folder / "random.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    return folder
