"""Fine-tuned checkpoints of the authors' code as folders that evaluation reads, and back."""

from pathlib import Path

import numpy as np
import pytest
import torch

from avmae_fast.cli import main
from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.interop.flax_msgpack import nest, pack_tree, unpack_tree
from avmae_fast.interop.scenic_classifier import Family, classifier_to_scenic
from avmae_fast.interop.scenic_files import parameters
from avmae_fast.models import Classifier
from avmae_fast.train.classifier_folder import load_classifier

RUN = """
[model]
classes = 5
fusion_layer = 1
drop_path = 0.1
[model.encoder]
width = 12
layers = 2
heads = 3
mlp = 20
[model.video]
frames = 4
height = 6
width = 4
tubelet = [2, 3, 2]
[model.audio]
frames = 9
mel_bins = 6
patch = [4, 3]
[data]
manifest = "clips.csv"
short_side = 6
[train]
out = "run"
steps = 10
batch = 4
[finetune]
loss = "sigmoid"
"""
CLASSES = ("bark", "clap", "drum", "flute", "rain")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The TOML file of a run, beside the manifest it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips.csv").write_text("path,label\na.mp4,drum\n")
    (tmp_path / "clips.classes.txt").write_text("\n".join(CLASSES) + "\n")
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path / "run.toml"


def _config(run: Path, *overrides: str) -> ClassifierConfig:
    from avmae_fast.config_file import load_finetune_config

    return load_finetune_config(run, overrides).model


def _checkpoint(
    path: Path, config: ClassifierConfig, family: Family = "mbt"
) -> tuple[Classifier, dict[str, np.ndarray]]:
    """A file as the authors' code saves one, and the classifier that is in it."""
    generator = torch.Generator().manual_seed(0)
    model = Classifier(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(torch.randn(x.shape, generator=generator) / 4)
    leaves = classifier_to_scenic(model.state_dict(), config, family)
    if len(config.modalities) == 1 and family == "mbt":
        leaves["bottleneck"] = np.ones((1, 4, 12), np.float32)
    tree = {"params": nest(leaves), "opt_state": {"0": {}}, "global_step": 9}
    path.write_bytes(pack_tree(tree))
    return model, leaves


@pytest.mark.parametrize(
    ("overrides", "family"),
    [
        ([], "mbt"),
        (["model.classes={sound = 2, source = 3}"], "mbt"),
        (["model.norm=pooled"], "mbt"),
        (["model.video=false"], "mbt"),
        (["model.video=false"], "vivit"),
        (["model.audio=false"], "vivit"),
    ],
    ids=str,
)
def test_there_and_back(run: Path, overrides: list[str], family: Family) -> None:
    if "sound" in str(overrides):
        names = ["sound/bark", "sound/clap", "source/drum", "source/flute", "source/rain"]
        run.with_name("clips.classes.txt").write_text("\n".join(names))
        run.with_name("clips.csv").write_text("path,labels\na.mp4,sound/bark|source/rain\n")
    model, leaves = _checkpoint(run.with_name("checkpoint"), _config(run, *overrides), family)
    told = [word for override in overrides for word in ("--set", override)]
    assert main(["convert", "checkpoint", "ours", "--classifier", str(run), *told]) == 0
    tuned = load_classifier(run.with_name("ours"))
    assert tuned.config.finetune.loss == "sigmoid"
    assert len(tuned.classes) == 5 and tuned.classes[0].endswith("bark")
    state = model.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in tuned.model.state_dict().items())
    assert main(["convert", "ours", "back", "--to", "scenic"]) == 0
    back = parameters(unpack_tree(run.with_name("back").read_bytes()))
    assert back.keys() == leaves.keys()
    assert all(np.asarray(back[n]).tobytes() == x.tobytes() for n, x in leaves.items())


def test_what_the_file_does_not_say_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _checkpoint(run.with_name("checkpoint"), _config(run))
    assert main(["convert", "checkpoint", "ours", "--classifier", "run.toml"]) == 0
    printed = capsys.readouterr().out
    assert "a classifier of video and audio, 5 classes" in printed
    assert "as configured, the file does not say: fusion_layer = 1" in printed


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "--classifier CONFIG"),
        (["--set", "model.fusion_layer=0"], "--set belongs to --classifier CONFIG"),
        (["--classifier", "audioset-ft-av"], "data.manifest is not set"),
        (
            ["--classifier", "run.toml", "--set", "model.encoder.layers=3"],
            "model.encoder.layers = 3 does not fit the file, which has 2",
        ),
        (
            ["--classifier", "run.toml", "--set", "model.bottleneck_tokens=2"],
            "model.bottleneck_tokens = 2 does not fit the file, which has 4",
        ),
        (["--classifier", "run.toml", "--set", "model.classes=4"], "names 5 classes"),
        (["--classifier", "run.toml", "--set", "model.video=false"], "unknown"),
        (["--classifier", "run.toml", "--set", "model.fusion=late"], "unknown"),
        (["--classifier", "run.toml", "--to", "timm"], "not a way for a whole classifier"),
    ],
)
def test_refused_in_words(
    run: Path, words: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _checkpoint(run.with_name("checkpoint"), _config(run))
    assert main(["convert", "checkpoint", "ours", *words]) == 2
    assert match in capsys.readouterr().err
    assert not run.with_name("ours").exists()


def test_other_checkpoints_are_no_classifiers(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {"optimizer": {"target": {"Transformer": {"x": np.ones(2, np.float32)}}}}
    run.with_name("checkpoint").write_bytes(pack_tree(tree))
    assert main(["convert", "checkpoint", "ours", "--classifier", "run.toml"]) == 2
    assert "leave --classifier out" in capsys.readouterr().err


def test_a_classifier_goes_to_no_other_format(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _checkpoint(run.with_name("checkpoint"), _config(run))
    assert main(["convert", "checkpoint", "ours", "--classifier", "run.toml"]) == 0
    assert main(["convert", "ours", "theirs.safetensors", "--to", "timm"]) == 2
    assert "not a way for a whole classifier" in capsys.readouterr().err
    assert not run.with_name("theirs.safetensors").exists()
