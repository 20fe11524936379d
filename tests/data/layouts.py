"""Small folders laid out as users have the public data sets, with the official annotation columns.

Each function writes one below `root` and returns the arguments of `avmae manifest`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import webdataset
from media import picture, tone, write_clip, write_jpeg

from avmae_fast.data.folder_index import list_tar

Arguments = list[str]


def _clips(folder: Path, *names: str) -> None:
    """One real clip under many names."""
    data = _clip_bytes(folder.parent)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _clip_bytes(folder: Path) -> bytes:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "one.mp4"
    data = write_clip(path, frames=25, size=(64, 96)).read_bytes()
    path.unlink()
    return data


def _text(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def vggsound(root: Path) -> Arguments:
    _clips(
        root / "video",
        "---g-f_I2yQ_000001.mp4",
        "--0PQM4-hqg_000030.mp4",
        "_0m_YMpQayA_000168.mp4",
        "notes/ZZZZZZZZZZZ_000000.mp4",
    )
    rows = _text(
        root / "vggsound.csv",
        "---g-f_I2yQ,1,people marching,test",
        "--0PQM4-hqg,30,waterfall burbling,train",
        '_0m_YMpQayA,168,"female speech, woman speaking",train',
        "A-missing__,20,dog barking,train",
        "--0PQM4-hqg,30,waterfall burbling,train",
        "--bad-time-,x,dog barking,train",
    )
    return ["vggsound", str(root / "video"), rows]


def audioset(root: Path) -> Arguments:
    _clips(
        root / "clips",
        "eval/-0RWZT-miFs.mp4",
        "eval/YAbcd_efgh-1.wav",
        "train/Y--PJHxphWEs.wav",
        "train/--aE2O5G5WE_0_10.mp4",
        "train/Y-0Abcdefgh1_30000_40000.mp4",
    )
    (root / "clips/eval/YAbcd_efgh-1.wav").unlink()
    header = (
        "# Segments csv created Sun Mar  5 10:54:31 2017",
        "# num_ytids=1, num_segs=1, num_unique_labels=2, num_positive_labels=2",
        "# YTID, start_seconds, end_seconds, positive_labels",
    )
    labels = _text(
        root / "class_labels_indices.csv",
        "index,mid,display_name",
        '0,/m/09x0r,"Speech"',
        '1,/m/05zppz,"Male speech, man speaking"',
        '2,/m/03v3yw,"Keys jangling"',
        '3,/m/0k4j,"Car"',
    )
    train = _text(
        root / "balanced_train_segments.csv",
        *header,
        '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/m/05zppz"',
        '--aE2O5G5WE, 0.000, 10.000, "/m/0k4j"',
        '-0Abcdefgh1, 30.000, 40.000, "/m/03v3yw,/m/0k4j"',
        '-unknown-id, 30.000, 40.000, "/m/00000"',
    )
    test = _text(
        root / "eval_segments.csv",
        *header,
        '-0RWZT-miFs, 420.000, 430.000, "/m/03v3yw,/m/0k4j"',
    )
    return ["audioset", str(root / "clips"), train, test, "--labels", labels]


def kinetics(root: Path) -> Arguments:
    _clips(
        root / "videos",
        "train/abseiling/0347ZoDXyP0_000095_000105.mp4",
        "val/air drumming/-4wsuPCjDBc_000005_000015.mp4",
        "test/--6bJUbfpnQ_000017_000027.mp4",
    )
    header = "label,youtube_id,time_start,time_end,split"
    train = _text(root / "train.csv", header, "abseiling,0347ZoDXyP0,95,105,train")
    val = _text(root / "validate.csv", header, "air drumming,-4wsuPCjDBc,5,15,validate")
    test = _text(
        root / "test.csv", "youtube_id,time_start,time_end,split", "--6bJUbfpnQ,17,27,test"
    )
    return ["kinetics", str(root / "videos"), train, val, test]


def epic_kitchens(root: Path) -> Arguments:
    _clips(root / "videos", "P01/P01_01.MP4", "P01/P01_101.MP4", "P02/P02_12.MP4")
    header = (
        "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,"
        "start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,"
        "all_noun_classes"
    )
    train = _text(
        root / "EPIC_100_train.csv",
        header,
        "P01_01_0,P01,P01_01,00:00:01.089,00:00:00.14,00:00:00.37,8,202,open door,open,3,door,"
        "3,['door'],[3]",
        "P01_01_1,P01,P01_01,00:00:02.629,00:00:00.37,00:00:00.90,262,370,turn on light,turn-on,"
        "0,light,1,\"['light', 'tap:hot']\",\"[1, 2]\"",
        "P01_01_2,P01,P01_01,00:00:02.629,00:00:61.37,00:00:06.17,262,370,x,open,3,door,3,[],[]",
    )
    val = _text(
        root / "EPIC_100_validation.csv",
        header,
        "P01_101_0,P01,P01_101,00:00:00.1,00:00:00.20,00:00:00.80,1,2,take cup,take,0,cup,0,[],[]",
    )
    test = _text(
        root / "EPIC_100_test_timestamps.csv",
        "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,"
        "start_frame,stop_frame",
        "P02_12_0,P02,P02_12,00:00:00.1,00:00:00.00,00:00:00.50,1,30",
    )
    verbs = _text(
        root / "EPIC_100_verb_classes.csv",
        "id,key,instances,category",
        "0,take,\"['take', 'grab']\",retrieve",
        "1,put,['put'],leave",
        "2,wash,['wash'],clean",
        "3,open,['open'],access",
    )
    nouns = _text(
        root / "EPIC_100_noun_classes.csv",
        "id,key,instances,category",
        *(f"{i},{key},['{key}'],x" for i, key in enumerate(("cup", "light", "tap:hot", "door"))),
    )
    return [
        "epic-kitchens", str(root / "videos"), train, val, test, "--verbs", verbs, "--nouns", nouns
    ]  # fmt: skip


def cav_mae(root: Path) -> Arguments:
    for frame in range(3):
        for video in ("0347ZoDXyP0", "-4wsuPCjDBc"):
            write_jpeg(root / f"frames/frame_{frame}/{video}.jpg", picture(frame, 64, 96))
    (root / "audio").mkdir()
    for video in ("0347ZoDXyP0", "-4wsuPCjDBc"):
        path = root / "audio" / f"{video}.wav"
        write_clip(path, frames=0, sound=tone(3, 16000), audio_codec="pcm_s16le")
    rows = [
        {
            "video_id": video,
            "wav": f"audio/{video}.wav",
            "video_path": "frames",
            "labels": labels,
        }
        for video, labels in (
            ("0347ZoDXyP0", "/m/09x0r,/m/0k4j"),
            ("-4wsuPCjDBc", "/m/0k4j"),
            ("not_there_1", "/m/0k4j"),
        )
    ]
    data = _text(root / "train.json", json.dumps({"data": rows}, indent=1))
    labels = _text(
        root / "class_labels_indices.csv",
        "index,mid,display_name",
        "0,/m/09x0r,Speech",
        "1,/m/0k4j,Car",
    )
    return ["cav-mae", str(root), data, "--labels", labels]


def webdataset_tars(root: Path) -> Arguments:
    data = _clip_bytes(root)
    for shard in range(2):
        with webdataset.TarWriter(str(root / f"train-{shard:06d}.tar")) as tar:
            for number in range(2):
                key = f"clip{shard}{number}"
                if shard:
                    tar.write({"__key__": key, "mp4": data, "json": {"label": ["dog", "cat"]}})
                else:
                    tar.write({"__key__": key, "mp4": data, "cls": "cat"})
    return ["webdataset", str(root)]


LAYOUTS: dict[str, Callable[[Path], Arguments]] = {
    "vggsound": vggsound,
    "audioset": audioset,
    "kinetics": kinetics,
    "epic-kitchens": epic_kitchens,
    "cav-mae": cav_mae,
    "webdataset": webdataset_tars,
}


def listing(folder: Path) -> str:
    """The files below a folder and the members of tars, indented."""
    lines = []
    for path in sorted(folder.rglob("*")):
        depth = len(path.relative_to(folder).parts) - 1
        lines.append("  " * depth + path.name + "/" * path.is_dir())
        if path.suffix == ".tar":
            lines += ["  " * (depth + 1) + member for member in list_tar(path)]
    return "\n".join(lines)
