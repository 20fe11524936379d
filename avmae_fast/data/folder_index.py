"""The media files of a folder, found by the video that their names say they are of."""

import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from avmae_fast.data.manifest import ManifestError
from avmae_fast.data.media import tar_members
from avmae_fast.data.probe import MEDIA_SUFFIXES

# Where one video is there twice, the file with pictures is taken.
_SOUND_SUFFIXES = frozenset(".aac .flac .m4a .mp3 .oga .ogg .opus .wav .wma".split())

# A YouTube id has eleven characters, - and _ among them, so that they cannot end it. AudioSet's
# sound files often begin with a Y, since an id may begin with a dash. Times are seconds or ms.
_TIME = r"(\d+(?:\.\d+)?)"
_YOUTUBE = re.compile(rf"(?P<y>Y?)(?P<id>[\w-]{{11}})(?:[_.-]{_TIME}(?:[_-]{_TIME})?)?", re.ASCII)


@dataclass(frozen=True)
class MediaFile:
    """A file, or a member of a tar: its path from the folder, and the start its name gives."""

    path: str
    start_s: float | None = None

    def is_of(self, start_s: float) -> bool:
        """Whether it may be the stretch that starts at `start_s`; its start may be in ms."""
        if self.start_s is None:
            return True
        # Names carry whole seconds.
        return abs(self.start_s - start_s) < 1 or abs(self.start_s / 1000 - start_s) < 1e-3


# Which videos a name, without its suffix, may be of, each with the start in it.
Naming = Callable[[str], Iterator[tuple[str, float | None]]]


def youtube_name(stem: str) -> Iterator[tuple[str, float | None]]:
    """`ID`, `ID_START`, `ID_START_END`, each with or without a Y before it."""
    match = _YOUTUBE.fullmatch(stem)
    if match is not None:
        start = match.group(3)
        yield match["id"], None if start is None else float(start)


def whole_name(stem: str) -> Iterator[tuple[str, float | None]]:
    """The name is the id."""
    yield stem, None


class FolderIndex:
    """The media files below a folder by video.

    Attributes:
        folder: where paths start.
        files: every media file, sorted.
    """

    def __init__(self, folder: Path, naming: Naming) -> None:
        """Raises ManifestError where the folder, or a tar in it, cannot be read."""
        self.folder = folder
        self.files = sorted(media_paths(folder))
        self._by_video: dict[str, list[MediaFile]] = defaultdict(list)
        for path in self.files:
            for video, start_s in naming(Path(path).stem):
                self._by_video[video].append(MediaFile(path, start_s))

    def find(self, video: str, start_s: float) -> list[MediaFile]:
        """The files that may be the stretch of `video` from `start_s` on, the best first."""
        found = [file for file in self._by_video.get(video, ()) if file.is_of(start_s)]
        return sorted(found, key=_preference)


def _preference(file: MediaFile) -> tuple[bool, bool, str]:
    return file.start_s is None, Path(file.path).suffix.lower() in _SOUND_SUFFIXES, file.path


def media_paths(folder: Path) -> Iterator[str]:
    """Paths of the media files below a folder from there, of members of tars too."""
    if not folder.is_dir():
        raise ManifestError(f"{folder} is not a folder of media files")
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in names:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            suffix = path.suffix.lower()
            if suffix in MEDIA_SUFFIXES:
                yield relative
            elif suffix == ".tar":
                for member in list_tar(path):
                    if Path(member).suffix.lower() in MEDIA_SUFFIXES:
                        yield f"{relative}/{member}"


def list_tar(tar: Path) -> list[str]:
    """Names of the files in a plain tar; raises ManifestError where it cannot be read."""
    try:
        return [member.name for member in tar_members(tar)]
    except (OSError, tarfile.TarError) as error:
        raise ManifestError(f"{tar} cannot be read as an uncompressed tar: {error}") from error
