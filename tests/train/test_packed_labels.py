"""Fine-tuning, evaluation and features from packed clips: their labels are the manifest's."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avmae_fast.cli import main
from avmae_fast.data.loader import ClipLoader
from avmae_fast.data.manifest import ManifestError
from avmae_fast.data.pack import pack
from avmae_fast.data.pack_clips import PackOptions
from avmae_fast.finetune_config import FinetuneConfig
from avmae_fast.train.embed import read_features
from avmae_fast.train.finetune import finetune
from avmae_fast.train.finetune_inputs import FinetuneStage
from avmae_fast.train.targets import Targets

MakeFinetune = Callable[..., FinetuneConfig]

# What the three classes of the clips are called in each kind of data set.
EPIC = ("verb/cut|noun/cup", "verb/wash|noun/cup", "verb/cut|noun/egg")
EPIC_CLASSES = ("verb/cut", "verb/wash", "noun/cup", "noun/egg")
AUDIOSET = ("Speech|Car|Dog", "Car", "Dog|Speech")
HEADS = {"epic": {"verb": 2, "noun": 2}, "audioset": 3}
LOSS = {"epic": "softmax", "audioset": "sigmoid"}


@pytest.fixture(scope="module", params=["epic", "audioset"])
def sets(
    request: pytest.FixtureRequest, clips: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """The kind of labels, a manifest with them, and the same clips packed."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    names = {"epic": EPIC, "audioset": AUDIOSET}[kind]
    with clips.open() as file:
        listed = list(csv.DictReader(file))
    rows = [f"{clips.parent / r['path']},{names[int(r['label'])]},{r['split']}" for r in listed]
    manifest = folder / "clips.csv"
    manifest.write_text("path,labels,split\n" + "\n".join(rows) + "\n")
    if kind == "epic":
        (folder / "clips.classes.txt").write_text("".join(f"{c}\n" for c in EPIC_CLASSES))
    pack(manifest, folder / "packed", PackOptions(fps=10.0, short_side=24), jobs=1)
    return kind, manifest, folder / "packed"


def _config(make: MakeFinetune, kind: str, data: Path, **train: Any) -> FinetuneConfig:
    recipe = {"loss": LOSS[kind], "mixup": 0.5}
    return make(train, {"manifest": str(data)}, {"classes": HEADS[kind]}, recipe)


def test_training_sees_the_same_labels(
    make_finetune: MakeFinetune, sets: tuple[str, Path, Path]
) -> None:
    kind, manifest, packed = sets
    found = []
    for data in (manifest, packed):
        config = _config(make_finetune, kind, data)
        with ClipLoader(config.training_input, "train") as clips:
            targets = Targets(clips.manifest, config.model.heads, config.finetune.loss)
            stage = FinetuneStage(config, targets, torch.device("cpu"))
            found.append(
                [stage(batch)["labels"] for batch, _ in zip(clips, range(5), strict=False)]
            )
    for listed, ours in zip(*found, strict=True):
        assert ours.keys() == listed.keys()
        assert all(torch.equal(ours[m], listed[m]) and ours[m].any(1).all() for m in ours)


def test_commands(
    make_finetune: MakeFinetune, sets: tuple[str, Path, Path], tmp_path: Path
) -> None:
    """`evaluate` and `embed` say of packed clips what they say of the files."""
    kind, manifest, packed = sets
    config = _config(make_finetune, kind, packed, steps=2)
    finetune(config)
    run, summaries, labels = str(config.train.out), [], []
    for data in (manifest, packed):
        scores, features = tmp_path / f"{data.name}.scores", tmp_path / f"{data.name}.npz"
        views = ["--workers", "0", "--temporal", "1"]
        assert main(["evaluate", run, str(data), *views, "--out", str(scores)]) == 0
        summary = json.loads((scores / "summary.json").read_text())
        summaries.append((summary["clips"], summary["scored"], summary["unlabelled"]))
        with (scores / "per_class.csv").open() as file:
            labels.append([(r["class"], r["clips"]) for r in csv.DictReader(file)])
        assert main(["embed", run, str(data), str(features), *views]) == 0
    assert summaries == [(12, 12, 0)] * 2 and labels[0] == labels[1]
    listed, ours = (read_features(tmp_path / f"{data.name}.npz") for data in (manifest, packed))
    assert np.array_equal(ours["labels"], listed["labels"])


def test_other_classes_than_the_models(
    make_finetune: MakeFinetune, sets: tuple[str, Path, Path], tmp_path: Path
) -> None:
    """A folder has its classes from when it was packed; each message says what to do about them."""
    _, manifest, packed = sets
    for data, remedy in (
        (manifest, "list all classes in clips.classes.txt if"),
        (packed, "pack a manifest with all classes in NAME.classes.txt beside it if"),
    ):
        config = make_finetune(data={"manifest": str(data)}, model={"classes": 527})
        with pytest.raises(ManifestError, match=f"classes, model.classes = 527: .*{remedy}"):
            finetune(config)
    bare = tmp_path / "bare.csv"
    bare.write_text("path\n" + manifest.read_text().splitlines()[1].split(",")[0] + "\n")
    pack(bare, tmp_path / "bare", PackOptions(fps=10.0, short_side=24), jobs=1)
    with pytest.raises(ManifestError, match="names no class: fine-tuning needs a column label"):
        finetune(make_finetune(data={"manifest": str(tmp_path / "bare")}))


def test_a_verb_without_its_noun(make_finetune: MakeFinetune, clips: Path, tmp_path: Path) -> None:
    """As of the files: every head needs a class, and the message says which clips lack one."""
    path = clips.parent / "clips/clip-00000.mp4"
    manifest = tmp_path / "half.csv"
    manifest.write_text(f"path,labels\n{path},verb/cut|noun/cup\n{path},verb/wash\n")
    (tmp_path / "half.classes.txt").write_text("".join(f"{c}\n" for c in EPIC_CLASSES))
    pack(manifest, tmp_path / "packed", PackOptions(fps=10.0, short_side=24), jobs=1)
    config = _config(make_finetune, "epic", tmp_path / "packed")
    with pytest.raises(ManifestError, match="1 clips do not have .* each of verb, noun: .*00001-"):
        finetune(config)
