"""`avmae evaluate`: averaged views, what is left out and what is judged by half of it."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from avmae_fast.cli import main
from avmae_fast.data.manifest import Manifest, ManifestError, load_manifest
from avmae_fast.data.samples import SampleSpec
from avmae_fast.finetune_config import FinetuneConfig
from avmae_fast.train.classifier_folder import FinetunedModel, load_classifier
from avmae_fast.train.evaluate_classifier import (
    ClassifierReport,
    Views,
    evaluate_classifier,
)
from avmae_fast.train.finetune import finetune
from avmae_fast.train.model_inputs import NotFiniteOutput, tensors_of

MakeFinetune = Callable[..., FinetuneConfig]


@pytest.fixture
def tuned(make_finetune: MakeFinetune) -> FinetunedModel:
    config = make_finetune({"steps": 3})
    finetune(config)
    return load_classifier(config.train.out)


def _evaluate(tuned: FinetunedModel, manifest: Manifest, views: Views) -> ClassifierReport:
    return evaluate_classifier(tuned, manifest, views, tuned.config.data, tuned.config.train)


def _half(source: Path, target: Path, kind: str) -> Path:
    """One track of a file."""
    with av.open(str(source)) as whole, av.open(str(target), "w") as half:
        stream = whole.streams.get({kind: 0})[0]
        copy = half.add_stream_from_template(stream)
        for packet in whole.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                half.mux(packet)
    return target


def test_logits_are_averaged_over_views(tuned: FinetunedModel, clips: Path) -> None:
    """By hand, from the views of each clip one at a time."""
    manifest = load_manifest(clips, tuned.classes)
    views = Views(temporal=2, spatial=3)
    report = _evaluate(tuned, manifest, views)
    hits = []
    for clip in views.read(manifest, SampleSpec.of(tuned.config), 0, 60.0):
        inputs = tensors_of([clip], tuned.config.model.audio, torch.device("cpu"))
        rows = [
            tuned.model(**{m: x[i : i + 1] for m, x in inputs.items()}).logits[0] for i in range(6)
        ]
        hits.append(int(torch.stack(rows).mean(0).argmax()) == manifest[clip.record].label)
    assert report.scored == report.clips == 12
    assert report.scores["label"].summary()["top1"] == np.mean(hits)


def test_what_is_missing_is_told(tuned: FinetunedModel, clips: Path, tmp_path: Path) -> None:
    whole = clips.parent / "clips/clip-00000.mp4"
    (tmp_path / "broken.mp4").write_bytes(b"no media file")
    rows = [
        (whole, 0),
        (_half(whole, tmp_path / "mute.mp4", "video"), 0),
        (_half(whole, tmp_path / "blind.mp4", "audio"), 1),
        (tmp_path / "broken.mp4", 2),
        (whole, ""),
    ]
    path = tmp_path / "test.csv"
    path.write_text("path,label\n" + "\n".join(f"{file},{label}" for file, label in rows))
    report = _evaluate(tuned, load_manifest(path, tuned.classes), Views(1, 1))
    assert (report.clips, report.scored, report.unlabelled) == (5, 3, 1)
    assert report.without == {"video": 1, "audio": 1}
    assert [Path(file).name for file, _ in report.unreadable] == ["broken.mp4"]
    text = str(report)
    assert "1 clips have no audio and were judged without it" in text
    assert "1 clips cannot be read" in text and "1 clips have no label" in text


def test_command(tuned: FinetunedModel, clips: Path, tmp_path: Path, capsys: Any) -> None:
    run = str(tuned.config.train.out)
    common = ["--workers", "0", "--temporal", "1", "--out", str(tmp_path / "scores")]
    assert main(["evaluate", run, str(clips), "--split", "val", *common]) == 0
    summary = json.loads((tmp_path / "scores/summary.json").read_text())
    assert (summary["clips"], summary["scored"], summary["temporal_views"]) == (3, 3, 1)
    with (tmp_path / "scores/per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["head"], row["class"], row["clips"]) for row in rows] == [
        ("label", "0", "1"),
        ("label", "1", "1"),
        ("label", "2", "1"),
    ]
    (tmp_path / "other.csv").write_text("path,label\na.mp4,dog\n")
    assert main(["evaluate", run, str(tmp_path / "other.csv"), *common]) == 2
    assert "label: 'dog' is not one of the 3 classes: 0, 1, 2" in capsys.readouterr().err
    (tmp_path / "none.csv").write_text("path\na.mp4\n")
    assert main(["evaluate", run, str(tmp_path / "none.csv"), *common]) == 2
    assert "labels none of its 1 clips" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), str(clips)]) == 2
    assert "is not the folder of a run or of a classifier" in capsys.readouterr().err


def test_verbs_and_nouns(make_finetune: MakeFinetune, clips: Path, tmp_path: Path) -> None:
    """Two heads, a manifest of several labels, and the action that both make."""
    manifest = tmp_path / "epic.csv"
    with clips.open() as file:
        listed = list(csv.DictReader(file))
    names = ("verb/cut|noun/cup", "verb/wash|noun/cup", "verb/cut|noun/egg")
    rows = [f"{clips.parent / r['path']},{names[int(r['label'])]},{r['split']}" for r in listed]
    manifest.write_text("path,labels,split\n" + "\n".join(rows))
    (tmp_path / "epic.classes.txt").write_text("verb/cut\nverb/wash\nnoun/cup\nnoun/egg\n")
    config = make_finetune(
        {"steps": 2},
        {"manifest": str(manifest)},
        {"classes": {"verb": 2, "noun": 2}},
        {"mixup": 0.1},
    )
    finetune(config)
    summary = json.loads((config.train.out / "evaluation/summary.json").read_text())
    assert summary["scores"].keys() == {"verb", "noun", "action"}
    assert summary["scores"]["action"].keys() == {"top1", "top5"}


def test_nothing_to_score(tuned: FinetunedModel, tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("path,label\nabsent.mp4,1\n")
    with pytest.raises(ManifestError, match="no clip can be scored, 1 cannot be read, such as"):
        _evaluate(tuned, load_manifest(tmp_path / "test.csv", tuned.classes), Views(1, 1))


def test_logits_that_are_not_finite_are_an_error(tuned: FinetunedModel, clips: Path) -> None:
    with torch.no_grad():
        tuned.model.head.bias[0] = torch.nan
    with pytest.raises(NotFiniteOutput, match=r"logits are not finite for \d+ clips of a batch"):
        _evaluate(tuned, load_manifest(clips, tuned.classes), Views(1, 1))
