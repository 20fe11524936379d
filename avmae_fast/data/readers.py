"""Choose a reader, open a clip, read one window of it."""

import logging
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from avmae_fast.config import ConfigError
from avmae_fast.data.clip import AUDIO_RATE_HZ, Clip, ClipError, ClipReader, Pixels, Size
from avmae_fast.data.manifest import FramesRecord, Record
from avmae_fast.data.shard_manifest import ShardRecord

ReaderName = Literal["pyav", "torchcodec", "decord"]

# In the order in which `auto` tries them: module, package to install.
_PACKAGES: dict[ReaderName, tuple[str, str]] = {
    "pyav": ("av", "av"),
    "torchcodec": ("torchcodec", "torchcodec"),
    "decord": ("decord", "decord2"),
}


def resolve_reader(name: str = "auto", pixels: Pixels = "rgb") -> ReaderName:
    """The reader to use; `auto` takes the first of pyav, torchcodec, decord that imports.

    Raises:
        ConfigError: the name is unknown, its package is missing or does not load, or it does not
            deliver `pixels`.
    """
    if name != "auto":
        # Before its package is asked for: what cannot help need not be installed.
        _require_pixels(name, pixels)
        return _named(name)
    reader = _first_that_loads()
    _require_pixels(reader, pixels)
    return reader


def _require_pixels(reader: str, pixels: Pixels) -> None:
    if pixels == "yuv420" and reader in _PACKAGES and reader != "pyav":
        raise ConfigError(
            f"data.pixels = 'yuv420' needs reader = 'pyav' (pip install av), got {reader!r}, which "
            "gives RGB only"
        )


def _named(name: str) -> ReaderName:
    if name not in _PACKAGES:
        raise ConfigError(
            f"reader = {name!r} is not valid: it must be auto, {', '.join(_PACKAGES)}"
        )
    reader: ReaderName = name
    problem = _import_problem(reader)
    if problem:
        package = _PACKAGES[reader][1]
        raise ConfigError(
            f"reader = {name!r} needs the package {package} ({problem}): pip install {package}"
        )
    return reader


@cache
def _first_that_loads() -> ReaderName:
    log = logging.getLogger(__name__)
    problems: list[str] = []
    for reader, (_, package) in _PACKAGES.items():
        problem = _import_problem(reader)
        if problem is None:
            level = logging.WARNING if problems else logging.INFO
            missing = "".join(f"; not {p}" for p in problems)
            log.log(level, "media files are read by %s%s", reader, missing)
            return reader
        problems.append(f"{reader} ({problem}; pip install {package})")
    raise ConfigError("no reader of media files is installed: " + ", ".join(problems))


def _import_problem(reader: ReaderName) -> str | None:
    module, _ = _PACKAGES[reader]
    try:
        import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        # Long texts name every library that was tried; the first line says what is the matter.
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None


def reader_problems() -> dict[ReaderName, str | None]:
    """What keeps each reader from being used, None where nothing does."""
    return {
        reader: problem and f"{problem}; pip install {package}"
        for reader, (_, package) in _PACKAGES.items()
        for problem in (_import_problem(reader),)
    }


def open_clip(path: Path | str, reader: str = "auto", pixels: Pixels = "rgb") -> ClipReader:
    """An open file, to be closed after use (a context manager).

    Args:
        path: a media file.
        reader: auto, pyav, torchcodec or decord.
        pixels: `rgb`, or `yuv420` for pictures as planes (see `avmae_fast.data.planes`).

    Raises:
        ConfigError: the reader is not installed, or does not deliver `pixels`.
        ClipError: the file cannot be opened.
    """
    match resolve_reader(reader, pixels):
        case "pyav":
            from avmae_fast.data.reader_pyav import PyavReader

            return PyavReader(Path(path), pixels)
        case "torchcodec":
            from avmae_fast.data.reader_torchcodec import TorchcodecReader

            return TorchcodecReader(Path(path))
        case "decord":
            from avmae_fast.data.reader_decord import DecordReader

            return DecordReader(Path(path))


def open_record(record: Record, reader: str = "auto", pixels: Pixels = "rgb") -> ClipReader:
    """A record of a manifest, open: its media file by `reader`, a packed clip from its shard."""
    if isinstance(record, FramesRecord):
        from avmae_fast.data.reader_frames import FramesReader

        return FramesReader(record, pixels)
    if isinstance(record, ShardRecord):
        from avmae_fast.data.shard_reader import ShardReader

        return ShardReader(record, pixels)
    return open_clip(record.path, reader, pixels)


def read_clip(
    path: Path | str,
    times_s: NDArray[np.float64] | None,
    audio: tuple[float, int] | None = None,
    *,
    size: Size = None,
    reader: str = "auto",
) -> Clip:
    """Pictures at `times_s` and a stretch of sound, on one clock.

    Args:
        path: a media file.
        times_s: float64 [N], seconds from the first displayed picture, at least 0, in any order;
            None for no pictures. Each gets the picture on display; the last one stands still.
        audio: (start in seconds, number of samples at 16 kHz), or None for no sound. Zeros
            where the track has no sound.
        size: length of the shorter side in pixels, or (height, width), or None for as stored.
        reader: auto, pyav, torchcodec or decord.

    Returns:
        video uint8 [N, H, W, 3] RGB, upright; waveform int16 [S] mono.

    Raises:
        ClipError: whatever is wrong with the file; see its kinds.
        ConfigError: the reader is not installed.
        ValueError: an argument is out of range.
    """
    with open_clip(path, reader) as clip:
        video, waveform = np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0, np.int16)
        if times_s is not None:
            video = clip.read_video(np.asarray(times_s, np.float64), size)
        if audio is not None:
            start_s, samples = audio
            if not clip.info.has_audio:
                raise ClipError("no_audio", path, "there is no audio track")
            waveform = clip.read_audio(round(start_s * AUDIO_RATE_HZ), samples)
        return Clip(video, waveform, clip.info)
