"""The commands `avmae manifest ...`: a manifest of a public data set as it lies on a disk."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avmae_fast.data.make_manifest import MadeManifest

_WHOLE = "files whose names give no start are whole videos, not the annotated stretches alone"


def add_commands(commands: Any) -> None:
    """Add this file's commands to those of `avmae`."""
    parser = commands.add_parser("manifest", help="make a manifest of a public data set")
    parser.description = (
        "Find the files of a data set in a folder, or in the tars in it, by the annotations that "
        "its authors publish, and write a manifest, its class names (NAME.classes.txt) and what "
        "was left out and why (NAME.report.jsonl)."
    )
    kinds = parser.add_subparsers(title="data sets", required=True, metavar="DATA_SET")
    for name, files in (
        ("vggsound", "vggsound.csv"),
        ("audioset", "balanced_train_segments.csv and its siblings"),
        ("kinetics", "train.csv, validate.csv and test.csv"),
        ("epic-kitchens", "EPIC_100_train.csv and its siblings"),
        ("cav-mae", "the JSON files that CAV-MAE trains from"),
        ("webdataset", ""),
    ):
        kind = kinds.add_parser(name)
        kind.add_argument("folder", metavar="DIR", type=Path, help="where the media files are")
        if files:
            kind.add_argument("files", metavar="FILE", type=Path, nargs="+", help=files)
        kind.add_argument("--out", type=Path, help="the manifest (DIR/manifest.csv)")
        kind.add_argument("--split", choices=("train", "val", "test"), help="of every row")
        if name in ("vggsound", "audioset", "kinetics"):
            kind.add_argument("--whole-videos", action="store_true", help=_WHOLE)
        if name in ("audioset", "cav-mae"):
            kind.add_argument("--labels", type=Path, help="class_labels_indices.csv")
        if name == "epic-kitchens":
            kind.add_argument("--verbs", type=Path, help="EPIC_100_verb_classes.csv")
            kind.add_argument("--nouns", type=Path, help="EPIC_100_noun_classes.csv")
        if name == "cav-mae":
            kind.add_argument("--fps", type=float, default=1.0, help="pictures a second (1)")
        kind.set_defaults(run=_manifest, kind=name)


def _manifest(args: argparse.Namespace) -> int:
    out = args.out if args.out is not None else args.folder / "manifest.csv"
    made = _made(args, out)
    made.write(out)
    first, *left_out = made.summary()
    print(f"{out}: {first}")
    for line in left_out:
        print(f"left out: {line}")
    return 0


def _made(args: argparse.Namespace, out: Path) -> "MadeManifest":
    from avmae_fast.data import annotations, make_manifest
    from avmae_fast.data.folder_index import FolderIndex, whole_name, youtube_name

    match args.kind:
        case "webdataset":
            return make_manifest.match_webdataset(args.folder, out, args.split or "train")
        case "cav-mae":
            names = annotations.audioset_names(args.labels) if args.labels else None
            split = args.split or "train"
            return make_manifest.match_cav_mae(args.files, args.folder, names, out, split, args.fps)
        case "epic-kitchens":
            found = annotations.epic_kitchens(args.files, args.verbs, args.nouns, args.split)
            index = FolderIndex(args.folder, whole_name)
            return make_manifest.match_files(found, index, out, whole_videos=True)
        case "audioset":
            found = annotations.audioset(args.files, args.labels, args.split)
        case "vggsound":
            found = annotations.vggsound(args.files, args.split)
        case _:
            found = annotations.kinetics(args.files, args.split)
    index = FolderIndex(args.folder, youtube_name)
    return make_manifest.match_files(found, index, out, args.whole_videos)
