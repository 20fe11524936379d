"""The annotation files of public data sets, as their authors publish them, read into one form.

Sources of the columns: the downloads of VGGSound, AudioSet, EPIC-KITCHENS-100 and Kinetics, and
the JSON files that CAV-MAE trains from.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from avmae_fast.data.manifest import LABEL_SEPARATOR, SPLITS, ManifestError

Problem = Literal["bad_time", "bad_label", "bad_split", "bad_row"]

# Seconds of a VGGSound clip, which gives only its start.
_VGGSOUND_S = 10.0
_SPLIT_NAMES = {"validate": "val", "validation": "val", "valid": "val", "eval": "test"}


class RowError(ValueError):
    """A row cannot be used."""

    def __init__(self, kind: Problem, detail: str) -> None:
        super().__init__(detail)
        self.kind: Problem = kind


@dataclass(frozen=True)
class Segment:
    """One annotated stretch of a video.

    video: the id that files are named by.
    labels: class names.
    start_s, end_s: where it lies in the whole video.
    """

    video: str
    labels: tuple[str, ...]
    start_s: float
    end_s: float
    split: str


@dataclass
class Annotations:
    """The rows of some annotation files; `rows` counts those that could not be used too.

    classes: class names in the order of their official numbers; empty where there is no such order.
    problems: (file, number of the row from 1, kind, what is wrong) of each row that is left out.
    """

    classes: list[str] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    problems: list[tuple[Path, int, Problem, str]] = field(default_factory=list)
    rows: int = 0

    def add(self, path: Path, rows: Iterator[Any], read: Callable[[Any], Segment]) -> None:
        """Read the rows of one file."""
        for number, row in enumerate(rows, start=1):
            self.rows += 1
            try:
                self.segments.append(read(row))
            except RowError as error:
                self.problems.append((path, number, error.kind, str(error)))


def vggsound(files: Sequence[Path], split: str | None = None) -> Annotations:
    """vggsound.csv, without a header: YouTube id, start in seconds, label, train or test."""

    def read(row: list[str]) -> Segment:
        _require_columns(row, 4)
        start_s = _seconds(row[1])
        label = _label(row[2])
        return Segment(row[0], (label,), start_s, start_s + _VGGSOUND_S, split or _split(row[3]))

    found = Annotations()
    for path in files:
        found.add(path, _lists(path), read)
    return found


def audioset(files: Sequence[Path], labels: Path | None, split: str | None = None) -> Annotations:
    """*_segments.csv: three # lines, then YouTube id, start, end, ids of labels in one cell.

    Args:
        labels: class_labels_indices.csv (index, mid, display_name), which names the classes; None
            keeps the ids as names.
        split: of all rows; by default test where a file's name holds eval, train elsewhere.
    """
    names = audioset_names(labels) if labels is not None else None
    found = Annotations(classes=list(names.values()) if names else [])
    for path in files:
        of_file = split or ("test" if "eval" in path.name else "train")

        def read(row: list[str], of_file: str = of_file) -> Segment:
            _require_columns(row, 4)
            return Segment(row[0], _mids(row[3], names), *_span(row[1], row[2]), of_file)

        found.add(path, (row for row in _lists(path) if not row[0].startswith("#")), read)
    return found


def epic_kitchens(
    files: Sequence[Path],
    verbs: Path | None = None,
    nouns: Path | None = None,
    split: str | None = None,
) -> Annotations:
    """EPIC_100_train.csv and its siblings: a header, times as hours:minutes:seconds.

    A row has two labels, `verb/take` and `noun/cup`: the official classes, not the words of the
    narration. Test rows have none.

    Args:
        verbs, nouns: EPIC_100_verb_classes.csv and EPIC_100_noun_classes.csv (id, key, ...); by
            default a class is named by its number, as in `verb/3`.
        split: of all rows; by default train, val or test as a file's name says.
    """
    tables = {"verb": _epic_keys(verbs), "noun": _epic_keys(nouns)}
    classes = [f"{kind}/{key}" for kind, keys in tables.items() for key in keys]
    found = Annotations(classes=classes if verbs and nouns else [])
    for path in files:
        of_file = split or _epic_split(path)

        def read(row: dict[str, str], of_file: str = of_file) -> Segment:
            labels = tuple(
                _epic_class(kind, row[f"{kind}_class"], keys)
                for kind, keys in tables.items()
                if row.get(f"{kind}_class")
            )
            span_s = _span(row["start_timestamp"], row["stop_timestamp"], _clock)
            return Segment(row["video_id"], labels, *span_s, of_file)

        wanted = ("video_id", "start_timestamp", "stop_timestamp")
        found.add(path, _dicts(path, wanted), read)
    return found


def kinetics(files: Sequence[Path], split: str | None = None) -> Annotations:
    """Kinetics-400, -600 and -700: label, youtube_id, time_start, time_end, split.

    Test files of some releases have no label.
    """

    def read(row: dict[str, str]) -> Segment:
        labels = (_label(row["label"]),) if row.get("label") else ()
        span_s = _span(row["time_start"], row["time_end"])
        return Segment(row["youtube_id"], labels, *span_s, split or _split(row.get("split", "")))

    found = Annotations()
    for path in files:
        found.add(path, _dicts(path, ("youtube_id", "time_start", "time_end")), read)
    return found


def cav_mae_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CAV-MAE JSON file: video_id, wav, video_path and labels, ids with commas.

    Raises:
        ManifestError: it is not such a file.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))["data"]
        wanted = ("video_id", "wav", "video_path", "labels")
        if all(isinstance(row[name], str) for row in rows for name in wanted):
            return rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, "a JSON object with the rows in `data`", error) from error
    raise _unreadable(path, "rows with video_id, wav, video_path and labels", "other values")


def audioset_names(path: Path) -> dict[str, str]:
    """class_labels_indices.csv: name of each label id, in the order of the official numbers."""
    rows = sorted(
        _dicts(path, ("index", "mid", "display_name")),
        key=lambda row: _whole(path, "index", row["index"]),
    )
    return {row["mid"]: _class_name(row["display_name"]) for row in rows}


def _mids(cell: str, names: dict[str, str] | None) -> tuple[str, ...]:
    mids = [mid.strip() for mid in cell.split(",") if mid.strip()]
    unknown = [mid for mid in mids if names is not None and mid not in names]
    if unknown or not mids:
        raise RowError("bad_label", f"{cell!r} holds no known label id" if not mids else unknown[0])
    return tuple(mids if names is None else (names[mid] for mid in mids))


def _epic_keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    rows = {_whole(path, "id", row["id"]): row["key"] for row in _dicts(path, ("id", "key"))}
    if sorted(rows) != list(range(len(rows))):
        raise _unreadable(path, "ids from 0 on, none left out", sorted(rows)[-1:])
    return [_class_name(rows[number]) for number in range(len(rows))]


def _epic_class(kind: str, number: str, keys: list[str]) -> str:
    if not number.isdecimal() or (keys and int(number) >= len(keys)):
        raise RowError("bad_label", f"{kind}_class {number!r} is not in the list of classes")
    return f"{kind}/{keys[int(number)] if keys else int(number)}"


def _epic_split(path: Path) -> str:
    name = path.name.lower()
    return "val" if "val" in name else "test" if "test" in name else "train"


def _split(value: str) -> str:
    name = value.strip().lower()
    name = _SPLIT_NAMES.get(name, name)
    if name not in SPLITS:
        raise RowError("bad_split", f"split {value!r} is not train, val, validate or test")
    return name


def _label(value: str) -> str:
    if not value.strip():
        raise RowError("bad_label", "the label is empty")
    return _class_name(value)


def _class_name(value: str) -> str:
    # A manifest separates labels by this sign.
    return " ".join(value.replace(LABEL_SEPARATOR, "/").split())


def _span(
    start: str, end: str, seconds: Callable[[str], float] | None = None
) -> tuple[float, float]:
    read = seconds or _seconds
    start_s, end_s = read(start), read(end)
    if end_s <= start_s:
        raise RowError("bad_time", f"the end {end!r} is not after the start {start!r}")
    return start_s, end_s


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise RowError("bad_time", f"{value!r} is not a number of seconds, at least 0")
    return seconds


def _clock(value: str) -> float:
    match = re.fullmatch(r"(\d+):([0-5]?\d):([0-5]?\d(?:\.\d+)?)", value.strip())
    if match is None:
        raise RowError("bad_time", f"{value!r} is not a time as in 00:01:02.34")
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])


def _require_columns(row: Sequence[str], count: int) -> None:
    if len(row) != count or not row[0]:
        raise RowError("bad_row", f"{len(row)} columns instead of {count}: {row}")


def _lists(path: Path) -> Iterator[list[str]]:
    """The rows of a CSV file without a header, blanks at either end of a cell removed."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.reader(file, skipinitialspace=True):
                if row:
                    yield [cell.strip() for cell in row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, "a CSV file in UTF-8", error) from error


def _dicts(path: Path, wanted: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows of a CSV file by the names in its header; a cell that is not there is empty."""
    rows = _lists(path)
    header = next(rows, [])
    missing = [name for name in wanted if name not in header]
    if missing:
        raise _unreadable(path, f"a column {missing[0]!r}", f"the columns {', '.join(header)}")
    for row in rows:
        yield dict(zip(header, row + [""] * (len(header) - len(row)), strict=False))


def _whole(path: Path, column: str, value: str) -> int:
    if not value.isdecimal():
        raise _unreadable(path, f"whole numbers in the column {column}", repr(value))
    return int(value)


def _unreadable(path: Path, want: str, got: object) -> ManifestError:
    return ManifestError(f"{path} is not an annotation file as published: wanted {want}, got {got}")
