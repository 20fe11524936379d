"""Labels of manifests as targets, and what each manifest that does not fit is told."""

from pathlib import Path

import pytest
import torch

from avmae_fast.data.manifest import Manifest, ManifestError, load_manifest
from avmae_fast.train.targets import Targets

EPIC = ["verb/cut", "verb/wash", "noun/cup", "noun/egg", "noun/pan"]


def _manifest(folder: Path, text: str, classes: list[str] | None = None) -> Manifest:
    path = folder / "clips.csv"
    path.write_text(text)
    return load_manifest(path, classes)


def test_several_labels(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "path,labels\na.mp4,dog|cat\nb.mp4,emu\n")
    targets = Targets(manifest, {"label": 3}, "sigmoid")
    assert targets(torch.tensor([1, 0])).tolist() == [[0, 0, 1], [1, 1, 0]]


def test_verbs_and_nouns(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "path,labels\na.mp4,verb/wash|noun/egg\n", EPIC)
    targets = Targets(manifest, {"verb": 2, "noun": 3}, "softmax")
    assert targets(torch.tensor([0])).tolist() == [[0, 1, 0, 1, 0]]


@pytest.mark.parametrize(
    ("text", "heads", "loss", "message"),
    [
        ("path\na.mp4\n", {"label": 2}, "softmax", "names no class: .* a column label or labels"),
        ("path,label\na.mp4,dog\n", {"label": 2}, "softmax", "1 classes, model.classes = 2: set"),
        (
            "path,label\na.mp4,dog\nb.mp4,\n",
            {"label": 1},
            "softmax",
            "1 clips .* one label: .*b.mp",
        ),
        ("path,labels\na,x|y\n", {"label": 2}, "softmax", "set finetune.loss = 'sigmoid'"),
        ("path,labels\na,x|y\nb,\n", {"label": 2}, "sigmoid", "not have at least one label: .*/b"),
        ("path,labels\na,noun/x|verb/y\n", {"verb": 1, "noun": 1}, "softmax", "'noun/x' stands wh"),
    ],
)
def test_rejects(tmp_path: Path, text: str, heads: dict, loss: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        Targets(_manifest(tmp_path, text), heads, loss)


def test_a_missing_noun_is_told(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "path,labels\na.mp4,verb/wash\n", EPIC)
    with pytest.raises(ManifestError, match="exactly one label of each of verb, noun: .*a.mp4"):
        Targets(manifest, {"verb": 2, "noun": 3}, "softmax")
