"""Make a manifest out of a data set's own annotations and the files that are there of it."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from avmae_fast.data.annotations import Annotations, Problem, Segment, cav_mae_rows
from avmae_fast.data.folder_index import FolderIndex, MediaFile, list_tar, media_paths
from avmae_fast.data.manifest import LABEL_SEPARATOR, ManifestError, classes_file
from avmae_fast.data.media import open_source
from avmae_fast.data.reader_frames import picture_files
from avmae_fast.data.shard_index import INDEX_NAME, write_whole

FindingKind = Problem | Literal["no_file", "no_row", "duplicate_row", "duplicate_file"]

_SAID = {
    "no_file": "rows without a file",
    "no_row": "files without a row",
    "duplicate_row": "rows that are there twice",
    "duplicate_file": "files of a video that has a better one",
    "bad_time": "rows with a bad time",
    "bad_label": "rows with a bad label",
    "bad_split": "rows with a bad split",
    "bad_row": "rows with columns missing or too many",
}


@dataclass(frozen=True)
class Finding:
    """Something that is not in the manifest. where: a file, or an annotation file and row."""

    kind: FindingKind
    where: str
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """A row of the manifest; path and sound as they are to be written."""

    path: str
    labels: tuple[str, ...]
    split: str
    start_s: float | None = None
    end_s: float | None = None
    sound: str = ""
    fps: float | None = None


@dataclass
class MadeManifest:
    """What is to be written.

    classes: class names in the order of their numbers.
    rows_read: rows of the annotations, usable or not.
    """

    rows: list[Row] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    rows_read: int = 0

    def write(self, out: Path) -> None:
        """Write the manifest, its classes and the report, OUT.report.jsonl.

        Raises:
            ManifestError: no row has a file.
            FileExistsError: there is a manifest already.
        """
        if not self.rows:
            raise ManifestError(f"nothing to write to {out}: {'; '.join(self.summary()[1:])}")
        if out.suffix != ".csv":
            raise ManifestError(f"{out}: a manifest that is made here is a .csv file")
        if out.exists():
            raise FileExistsError(f"{out} is there already: remove it, or choose another --out")
        report = "".join(json.dumps(asdict(finding)) + "\n" for finding in self.findings)
        write_whole(out.with_suffix(".report.jsonl"), report.encode())
        if self.classes:
            write_whole(classes_file(out), "".join(f"{c}\n" for c in self.classes).encode())
        # Last, so that a manifest is never without its classes.
        write_whole(out, self._csv().encode("utf-8", "surrogateescape"))

    def _csv(self) -> str:
        several = any(len(row.labels) > 1 for row in self.rows)
        columns: dict[str, list[str]] = {
            "path": [row.path for row in self.rows],
            "labels" if several else "label": [
                LABEL_SEPARATOR.join(row.labels) for row in self.rows
            ],
            "start": [_number(row.start_s) for row in self.rows],
            "end": [_number(row.end_s) for row in self.rows],
            "split": [row.split for row in self.rows],
            "sound": [row.sound for row in self.rows],
            "fps": [_number(row.fps) for row in self.rows],
        }
        kept = {name: cells for name, cells in columns.items() if any(cells)}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(kept)
        writer.writerows(zip(*kept.values(), strict=True))
        return text.getvalue()

    def summary(self) -> list[str]:
        """A line for what is written and one for each kind of what is not, with an example."""
        splits = Counter(row.split for row in self.rows)
        parts = ", ".join(f"{count} {split}" for split, count in sorted(splits.items()))
        lines = [f"{len(self.rows)} of {self.rows_read} rows, {len(self.classes)} classes: {parts}"]
        for kind, said in _SAID.items():
            found = [finding for finding in self.findings if finding.kind == kind]
            if found:
                example = " ".join(filter(None, (found[0].where, found[0].detail)))
                lines.append(f"{len(found)} {said}, such as {example}")
        return lines


def match_files(
    annotations: Annotations, index: FolderIndex, out: Path, whole_videos: bool
) -> MadeManifest:
    """The rows of which there is a file, with paths as a manifest at `out` needs them.

    Args:
        whole_videos: whether a file whose name gives no start is the whole video; otherwise it is
            the annotated stretch alone.
    """
    made = MadeManifest(classes=annotations.classes, rows_read=annotations.rows)
    if not made.classes:
        made.classes = sorted({name for s in annotations.segments for name in s.labels})
    made.findings = [
        Finding(kind, f"{path.name} row {number}", detail)
        for path, number, kind, detail in annotations.problems
    ]
    used: set[str] = set()
    seen: set[Segment] = set()
    for segment in annotations.segments:
        where = f"{segment.video} from {segment.start_s:g} s"
        files = index.find(segment.video, segment.start_s)
        used.update(file.path for file in files)
        if segment in seen:
            made.findings.append(Finding("duplicate_row", where))
        elif not files:
            made.findings.append(Finding("no_file", where))
        else:
            made.rows.append(_row(segment, files[0], index.folder, out, whole_videos))
            made.findings += [Finding("duplicate_file", file.path) for file in files[1:]]
        seen.add(segment)
    made.findings += [Finding("no_row", path) for path in index.files if path not in used]
    return made


def _row(segment: Segment, file: MediaFile, folder: Path, out: Path, whole_videos: bool) -> Row:
    path = path_from(out, folder / file.path)
    if file.start_s is None and whole_videos:
        return Row(path, segment.labels, segment.split, segment.start_s, segment.end_s)
    return Row(path, segment.labels, segment.split)


def path_from(out: Path, path: Path) -> str:
    """A path as a manifest at `out` names it."""
    return os.path.relpath(path.absolute(), out.absolute().parent)


def match_cav_mae(
    files: Sequence[Path],
    folder: Path,
    names: dict[str, str] | None,
    out: Path,
    split: str = "train",
    fps: float = 1.0,
) -> MadeManifest:
    """CAV-MAE's rows: pictures VIDEO_PATH/frame_*/VIDEO_ID.jpg and a wav.

    Args:
        folder: where relative paths in the JSON files start.
        names: display name of each label id; None keeps the ids.
        fps: pictures a second; ten of a clip of ten seconds, as their preparation takes them.
    """
    made = MadeManifest(classes=list(names.values()) if names else [])
    for path in files:
        for number, row in enumerate(cav_mae_rows(path), start=1):
            made.rows_read += 1
            where = f"{path.name} row {number}"
            labels = [mid for mid in row["labels"].split(",") if mid]
            unknown = [mid for mid in labels if names is not None and mid not in names]
            if unknown:
                made.findings.append(Finding("bad_label", where, unknown[0]))
                continue
            pattern = folder / row["video_path"] / "frame_*" / f"{row['video_id']}.jpg"
            wav = folder / row["wav"]
            missing = pattern if not picture_files(pattern) else None if wav.is_file() else wav
            if missing is not None:
                made.findings.append(Finding("no_file", where, str(missing)))
                continue
            shown = tuple(labels if names is None else (names[mid] for mid in labels))
            made.rows.append(
                Row(path_from(out, pattern), shown, split, sound=path_from(out, wav), fps=fps)
            )
    made.classes = made.classes or _all_labels(made.rows)
    return made


def match_webdataset(folder: Path, out: Path, split: str = "train") -> MadeManifest:
    """The media in the tars of a folder; labels from KEY.cls, `labels` or `label` of KEY.json.

    Raises:
        ManifestError: the folder holds packed clips, whose sound is a file beside the pictures.
    """
    if (folder / INDEX_NAME).exists():
        raise ManifestError(
            f"{folder} holds packed clips: the folder itself is a manifest, data.manifest={folder}"
        )
    made = MadeManifest()
    members: dict[str, set[str]] = {}
    for path in sorted(path for path in media_paths(folder) if ".tar/" in path):
        tar, _, name = path.partition(".tar/")
        tar += ".tar"
        if tar not in members:
            members[tar] = set(list_tar(folder / tar))
        made.rows_read += 1
        try:
            labels = _member_labels(folder / tar, name, members[tar])
        except ValueError as error:
            made.findings.append(Finding("bad_label", path, str(error)))
            continue
        made.rows.append(Row(path_from(out, folder / path), labels, split))
    if not all(name.isdecimal() for name in _all_labels(made.rows)):
        made.classes = _all_labels(made.rows)
    return made


def _member_labels(tar: Path, name: str, members: set[str]) -> tuple[str, ...]:
    # webdataset's key ends at the first dot of the file's name.
    folder, slash, file = name.rpartition("/")
    key = folder + slash + file.partition(".")[0]
    if f"{key}.cls" in members:
        return (_member_text(tar / f"{key}.cls").strip(),)
    if f"{key}.json" in members:
        content = json.loads(_member_text(tar / f"{key}.json"))
        fields = content if isinstance(content, dict) else {}
        label = fields.get("labels") or fields.get("label")
        listed = label if isinstance(label, list) else [] if label is None else [label]
        return tuple(str(item) for item in listed)
    return ()


def _member_text(path: Path) -> str:
    source = open_source(path)
    assert not isinstance(source, str)
    return source.read().decode()


def _all_labels(rows: Iterable[Row]) -> list[str]:
    return sorted({name for row in rows for name in row.labels})


def _number(value: float | None) -> str:
    # Annotations are in ms at the finest.
    return "" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")
