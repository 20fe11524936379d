"""The list of clips: a CSV file with a header, or JSON lines.

Columns: `path` (relative paths start at the manifest's folder); optional `label` (a name, or whole
numbers throughout) or `labels` (any number of them, separated by | or as a JSON list), `start` and
`end` (seconds in the file), `split` (train, val or test). A path may name a member of a tar, as in
`shard-000.tar/clip.mp4`, or picture files, as in `frames/clip/*.jpg`: then `fps` says how many
there are a second, and `sound`, if there is any, the file it is in. An empty cell is an absent one.
Files are not looked for here: one that is missing is a bad clip later on. The file NAME.classes.txt
beside NAME.csv, where there is one, lists the class names in the order of their numbers.
A folder that `avmae pack` has written is a manifest too.
"""

import csv
import difflib
import json
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from avmae_fast.data.label_sets import LabelSets

COLUMNS = ("path", "label", "labels", "start", "end", "split", "sound", "fps")
SPLITS = ("train", "val", "test")
UNKNOWN_LABEL = -1
# Not in any class name of the data sets that have several labels a clip.
LABEL_SEPARATOR = "|"
# A table of all numbers up to the largest label must fit into memory.
_MOST_DIGITS = 6


class ManifestError(ValueError):
    """A manifest cannot be used; the text names the file, the row, the column and the value."""


@dataclass(frozen=True)
class Record:
    """One clip: `path` from `start_s` to `end_s` (inf: to its end), of class `label` (-1: none)."""

    path: Path
    label: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class FramesRecord(Record):
    """Picture files, `path` being their pattern: `fps` a second, with `sound` from another file."""

    sound: Path | None
    fps: float


class Manifest(ABC):
    """A sequence of records.

    source: the file it was read from.
    classes: class names; a record's label is an index into them.
    """

    source: Path
    classes: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    @abstractmethod
    def select(self, split: str) -> Self:
        """The records of one split; those that name none belong to train."""

    def labels(self, index: int) -> tuple[int, ...]:
        """All classes of a record: none, one or, unlike its `label`, several."""
        label = self[index].label
        return () if label == UNKNOWN_LABEL else (label,)

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, eq=False)
class FileManifest(Manifest):
    """Records of media files, held in arrays so that millions of them travel to workers."""

    source: Path
    classes: tuple[str, ...]
    _paths: NDArray[np.bytes_] = field(repr=False)
    _labels: LabelSets = field(repr=False)
    _starts_s: NDArray[np.float64] = field(repr=False)
    _ends_s: NDArray[np.float64] = field(repr=False)
    _splits: NDArray[np.int8] = field(repr=False)
    _sounds: NDArray[np.bytes_] = field(repr=False)
    _rates: NDArray[np.float64] = field(repr=False)  # 0: no picture files

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        # Joining leaves an absolute path as it is.
        path = self.source.parent / os.fsdecode(self._paths[index])
        labels = self._labels.of_record(index)
        label = labels[0] if len(labels) == 1 else UNKNOWN_LABEL
        span_s = float(self._starts_s[index]), float(self._ends_s[index])
        if not self._rates[index]:
            return Record(path, label, *span_s)
        name = os.fsdecode(self._sounds[index])
        sound = self.source.parent / name if name else None
        return FramesRecord(path, label, *span_s, sound, float(self._rates[index]))

    def labels(self, index: int) -> tuple[int, ...]:
        return self._labels.of_record(index)

    def as_listed(self, index: int) -> tuple[str, str]:
        """The path of a record as the manifest gives it, and its split."""
        return os.fsdecode(self._paths[index]), SPLITS[self._splits[index]]

    def select(self, split: str) -> Self:
        chosen = self._splits == SPLITS.index(split)
        names = ("_paths", "_starts_s", "_ends_s", "_splits", "_sounds", "_rates")
        arrays = {name: getattr(self, name)[chosen] for name in names}
        return replace(self, _labels=self._labels.select(chosen), **arrays)


def load_manifest(path: Path | str, classes: Sequence[str] | None = None) -> Manifest:
    """Read a manifest.

    Args:
        path: a .csv or .jsonl file, or a folder of packed clips or its index file.
        classes: the class names to use, for instance those of the training manifest; by default
            those of the file NAME.classes.txt, else the sorted names that occur, or all numbers
            up to the largest if labels are numbers.

    Raises:
        ManifestError: the file cannot be read, has no rows or no `path` column, or a value is not
            valid.
    """
    path = Path(path)
    from avmae_fast.data.shard_index import is_index

    if is_index(path):
        from avmae_fast.data.shard_manifest import ShardManifest

        return ShardManifest.load(path, classes)
    return load_file_manifest(path, classes)


def load_file_manifest(path: Path, classes: Sequence[str] | None = None) -> FileManifest:
    """Read a .csv or .jsonl manifest; see `load_manifest`."""
    rows = list(_rows(path))
    if not rows:
        raise ManifestError(f"{path} lists no clips: it needs one row a clip below the header")
    labels = [_labels(path, number, row) for number, row in rows]
    if classes is None:
        classes = _listed_classes(path)
    classes = _class_table(path, labels) if classes is None else tuple(classes)
    index = {name: i for i, name in enumerate(classes)}
    for (number, _), names in zip(rows, labels, strict=True):
        for name in names:
            if name not in index:
                known = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
                valid = f"one of the {len(classes)} classes: {known}"
                raise _bad(path, number, "label", name, valid)
    frames = [_frames(path, number, row) for number, row in rows]
    spans = [_span(path, number, row) for number, row in rows]
    return FileManifest(
        source=path,
        classes=tuple(classes),
        _paths=np.array([os.fsencode(_path(path, number, row)) for number, row in rows]),
        _labels=LabelSets.of([index[name] for name in names] for names in labels),
        _starts_s=np.array([start for start, _ in spans], np.float64),
        _ends_s=np.array([end for _, end in spans], np.float64),
        _splits=np.array([_split(path, number, row) for number, row in rows], np.int8),
        _sounds=np.array([os.fsencode(sound) for sound, _ in frames]),
        _rates=np.array([rate for _, rate in frames], np.float64),
    )


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number from 1, columns) of each row, empty cells left out."""
    if path.suffix not in (".csv", ".jsonl"):
        raise ManifestError(
            f"{path}: a manifest is a .csv or a .jsonl file, or a folder of packed clips"
        )
    read = _csv_rows if path.suffix == ".csv" else _json_rows
    try:
        for number, row in enumerate(read(path), start=1):
            yield number, {key: value for key, value in row.items() if value not in (None, "")}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path} cannot be read as a UTF-8 text file: {error}") from error


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        header = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = header
        if "path" not in header:
            found = ", ".join(map(repr, header)) or "nothing"
            raise ManifestError(f"{path} has no column 'path' in its first line, which is {found}")
        _warn_of_misspelt(path, header)
        for number, row in enumerate(reader, start=1):
            if None in row:
                extra = row[None]
                raise _bad(path, number, "last", extra, f"one of {len(header)} columns: too many")
            yield {key: value.strip() if value else value for key, value in row.items()}


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        for line in file:
            if not line.strip():
                continue
            number += 1
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ManifestError(f"{path}, row {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ManifestError(f"{path}, row {number} is not a JSON object: {line.strip()}")
            if number == 1:
                _warn_of_misspelt(path, list(row))
            yield row


def _warn_of_misspelt(path: Path, header: Sequence[str]) -> None:
    """Other columns are the user's own, but one that looks like ours is worth a word."""
    for name in header:
        near = difflib.get_close_matches(name.lower(), COLUMNS, n=1, cutoff=0.75)
        if name not in COLUMNS and near:
            log = logging.getLogger(__name__)
            log.warning("%s: column %r is ignored; did you mean %r?", path, name, near[0])


def _bad(path: Path, number: int, column: str, value: object, valid: str) -> ManifestError:
    return ManifestError(f"{path}, row {number}, column {column}: {value!r} is not {valid}")


def _path(path: Path, number: int, row: Mapping[str, Any]) -> str:
    return _file(path, number, "path", row.get("path"))


def _file(path: Path, number: int, column: str, value: object) -> str:
    if isinstance(value, str) and "\0" not in value:
        try:
            os.fsencode(value)
            return value
        except UnicodeEncodeError:
            pass  # half of a surrogate pair, which JSON can hold
    raise _bad(path, number, column, value, "the path of a media file")


def _labels(path: Path, number: int, row: Mapping[str, Any]) -> list[str]:
    column = "labels" if "labels" in row else "label"
    value = row.get(column)
    if "label" in row and "labels" in row:
        raise _bad(path, number, column, value, "to be given beside a label: one or the other")
    listed = value if column == "labels" and isinstance(value, list) else [value]
    if value is None:
        listed = []
    elif column == "labels" and isinstance(value, str):
        listed = [name.strip() for name in value.split(LABEL_SEPARATOR)]
    for name in listed:
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise _bad(path, number, column, value, "a class name or a whole number")
    return list(dict.fromkeys(map(str, listed)))


def _listed_classes(path: Path) -> list[str] | None:
    """The class names in the file beside a manifest; None where there is none."""
    listed = classes_file(path)
    try:
        names = listed.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{listed} cannot be read as a UTF-8 text file: {error}") from error
    if len(set(names)) < len(names) or "" in names:
        raise ManifestError(f"{listed} must list class names, one a line and none twice")
    return names


def classes_file(path: Path) -> Path:
    """Where the class names of the manifest at `path` are listed: NAME.classes.txt."""
    return path.with_suffix(".classes.txt")


def _frames(path: Path, number: int, row: Mapping[str, Any]) -> tuple[str, float]:
    """Where the sound of picture files is, "" for nowhere, and their rate; 0 for other media."""
    pattern = "*" in str(row.get("path"))
    if not pattern:
        for column in ("sound", "fps"):
            if column in row:
                valid = "for picture files, whose path holds a *, as in frames/clip/*.jpg"
                raise _bad(path, number, column, row[column], valid)
        return "", 0.0
    rate = _seconds(path, number, "fps", row.get("fps"), "pictures a second")
    if not rate:
        raise _bad(path, number, "fps", row.get("fps"), "above 0")
    return _file(path, number, "sound", row.get("sound", "")), rate


def _class_table(path: Path, labels: Sequence[Sequence[str]]) -> tuple[str, ...]:
    names = {name for listed in labels for name in listed}
    if names and all(name.isdecimal() for name in names):
        longest = max(names, key=len)
        if len(longest) > _MOST_DIGITS:
            raise ManifestError(
                f"{path}, column label: {longest[:40]!r} is not a class number below "
                f"{10**_MOST_DIGITS}; labels that are numbers count classes from 0"
            )
        return tuple(str(i) for i in range(max(map(int, names)) + 1))
    return tuple(sorted(names))


def _span(path: Path, number: int, row: Mapping[str, Any]) -> tuple[float, float]:
    start_s = _seconds(path, number, "start", row.get("start", 0.0))
    end_s = _seconds(path, number, "end", row["end"]) if "end" in row else math.inf
    if end_s <= start_s:
        raise _bad(path, number, "end", row["end"], f"after the start at {start_s} s")
    return start_s, end_s


def _seconds(path: Path, number: int, column: str, value: object, unit: str = "seconds") -> float:
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise _bad(path, number, column, value, f"a number of {unit}, at least 0")
    return seconds


def _split(path: Path, number: int, row: Mapping[str, Any]) -> int:
    value = row.get("split", "train")
    if value not in SPLITS:
        raise _bad(path, number, "split", value, "train, val or test")
    return SPLITS.index(value)
