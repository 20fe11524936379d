"""Try every media file of a folder and say which are readable, and why the others are not."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avmae_fast.config import ConfigError
from avmae_fast.data.clip import AUDIO_RATE_HZ, ClipError, ClipInfo
from avmae_fast.data.readers import open_clip, resolve_reader

MEDIA_SUFFIXES = frozenset(
    ".3gp .aac .avi .flac .flv .m4a .m4v .mkv .mov .mp3 .mp4 .mpeg .mpg .mts .oga .ogg .ogv .opus "
    ".ts .wav .webm .wma .wmv".split()
)


@dataclass(frozen=True)
class FileReport:
    """One file: what it holds, or why it cannot be read; (height, width) as displayed."""

    path: Path
    found: ClipInfo | ClipError
    size: tuple[int, int] = (0, 0)

    @property
    def ok(self) -> bool:
        return isinstance(self.found, ClipInfo)

    def line(self, folder: Path) -> str:
        """One line of the report, with the path relative to `folder`."""
        # Names of files need not be text.
        name = os.fsencode(self.path.relative_to(folder)).decode(errors="backslashreplace")
        if isinstance(self.found, ClipError):
            return f"BAD   {name}: {self.found.kind}: {self.found.detail}"
        info, video, sound = self.found, "no video", "no sound"
        if info.has_video:
            height, width = self.size
            video = f"{width}x{height}, {info.fps:.2f} fps, {info.video_codec}"
        if info.has_audio:
            sound = f"sound {info.audio_rate_hz} Hz"
        return f"ok    {name}: {info.duration_s:.2f} s, {video}, {sound}"


def probe_file(path: Path, reader: str = "auto") -> FileReport:
    """Open a file, read its first picture, one from its middle, and a second of its sound."""
    try:
        with open_clip(path, reader) as clip:
            info, size = clip.info, (0, 0)
            middle_s = info.duration_s / 2
            if info.has_video:
                pictures = clip.read_video(np.array([0.0, middle_s]), None)
                size = pictures.shape[1:3]
            if info.has_audio:
                clip.read_audio(round(middle_s * AUDIO_RATE_HZ), AUDIO_RATE_HZ)
            return FileReport(path, info, size)
    except ClipError as error:
        return FileReport(path, error)


def media_files(folder: Path | str) -> list[Path]:
    """Files below `folder` that have the suffix of a media file, sorted.

    Raises:
        ConfigError: there is no such folder, or no such file in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in MEDIA_SUFFIXES)
    if not paths:
        suffixes = " ".join(sorted(MEDIA_SUFFIXES))
        raise ConfigError(f"{folder} holds no media file; the suffixes looked for are {suffixes}")
    return paths


def probe_folder(folder: Path | str, reader: str = "auto") -> Iterator[FileReport]:
    """Try every media file below `folder`; raises as `media_files` and `resolve_reader` do."""
    name = resolve_reader(reader)
    paths = media_files(folder)
    return (probe_file(path, name) for path in paths)


def totals(reports: Sequence[FileReport]) -> str:
    """The last line of a report: how many files are readable, how many bad by kind."""
    readable = [report.found for report in reports if isinstance(report.found, ClipInfo)]
    kinds = Counter(r.found.kind for r in reports if isinstance(r.found, ClipError))
    silent = sum(not info.has_audio for info in readable)
    blind = sum(not info.has_video for info in readable)
    hours = sum(info.duration_s for info in readable) / 3600
    bad = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "0"
    return (
        f"{len(reports)} files: {len(readable)} readable ({hours:.2f} hours; {silent} without "
        f"sound, {blind} without video), bad: {bad}"
    )


def print_report(
    folder: Path | str, reader: str = "auto", out: Callable[[str], object] = print
) -> int:
    """Print one line a file and the totals; returns the number of files that cannot be read."""
    reports = []
    for report in probe_folder(folder, reader):
        out(report.line(Path(folder)))
        reports.append(report)
    out(totals(reports))
    return sum(not report.ok for report in reports)
