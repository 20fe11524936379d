"""`avmae embed` and `avmae retrieve`: features, what has none, and search by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avmae_fast.cli import main
from avmae_fast.config import Config, ConfigError
from avmae_fast.data.manifest import load_manifest
from avmae_fast.finetune_config import FinetuneConfig
from avmae_fast.train import pretrain as loop
from avmae_fast.train.embed import Embedder, embed, load_embedder, read_features
from avmae_fast.train.evaluate_classifier import Views
from avmae_fast.train.finetune import finetune
from avmae_fast.train.model_inputs import NotFiniteOutput
from avmae_fast.train.pretrain import pretrain
from avmae_fast.train.retrieve import knn_accuracy, recall_at


@pytest.fixture
def run(make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> Config:
    """A finished pretraining run."""
    monkeypatch.setattr(loop, "write_report", lambda config, *_: config.train.out / "report")
    config = make_config({"steps": 1})
    pretrain(config)
    return config


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_command(run: Config, clips: Path, tmp_path: Path, suffix: str, capsys: Any) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"features{suffix}"
    words = ["embed", str(run.train.out), str(clips), str(out), "--workers", "0"]
    assert main(words) == 0
    arrays = read_features(out)
    assert arrays["A"].shape == arrays["V"].shape == (12, 16) and arrays["AV"].shape == (12, 32)
    assert arrays["labels"].tolist() == [i % 3 for i in range(12)]
    assert arrays["A_valid"].all() and np.isfinite(arrays["AV"]).all()
    assert main(words) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["retrieve", str(out), "--train", str(out), "--neighbours", "1"]) == 0
    text = capsys.readouterr().out
    assert "A->V recall@1" in text and "A, 1 neighbours: 1.0000 of 12 clips" in text


def test_features_are_those_of_the_encoder(run: Config, clips: Path) -> None:
    """Pooled and of each token; the same from the run and from its encoder's folder alone."""
    embedder = load_embedder(run.train.out)
    manifest = load_manifest(clips)
    pooled = embed(embedder, manifest, ["A", "V", "AV"], Views(1, 1), run.train)
    tokens = embed(embedder, manifest, ["AV"], Views(1, 1), run.train, per_token=True)
    assert tokens.features["AV"].shape == (12, 8 + 4, 16)
    both = tokens.features["AV"]
    by_hand = np.concatenate([both[:, :8].mean(1), both[:, 8:].mean(1)], 1)
    np.testing.assert_allclose(pooled.features["AV"], by_hand, rtol=1e-4, atol=1e-6)
    # The joint layers see the other modality in AV alone.
    assert not np.allclose(pooled.features["AV"][:, :16], pooled.features["V"], atol=1e-4)


def test_a_classifier_makes_features_too(
    make_finetune: Callable[..., FinetuneConfig], clips: Path
) -> None:
    config = make_finetune({"steps": 1})
    finetune(config)
    made = embed(
        load_embedder(config.train.out),
        load_manifest(clips),
        ["A", "V", "AV"],
        Views(2, 1),
        config.train,
    )
    assert made.features["AV"].shape == (12, 32) and np.isfinite(made.features["A"]).all()


def test_clips_without_what_is_asked_for_are_nan(run: Config, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no media file")
    whole = clips.parent / "clips/clip-00000.mp4"
    (tmp_path / "some.csv").write_text(f"path\n{tmp_path / 'broken.mp4'}\n{whole}\n")
    manifest = load_manifest(tmp_path / "some.csv")
    made = embed(load_embedder(run.train.out), manifest, ["A"], Views(1, 1), run.train)
    assert made.valid["A"].tolist() == [False, True]
    assert np.isnan(made.features["A"][0]).all() and np.isfinite(made.features["A"][1]).all()
    assert [Path(path).name for path, _ in made.problems] == ["broken.mp4"]


def test_a_nan_of_the_model_is_an_error(run: Config, clips: Path) -> None:
    embedder = load_embedder(run.train.out)
    with torch.no_grad():
        embedder.model.patch_embed["audio"].bias[0] = torch.nan
    with pytest.raises(NotFiniteOutput, match="features A are not finite"):
        embed(embedder, load_manifest(clips), ["V", "A"], Views(1, 1), run.train)


@pytest.mark.parametrize(
    ("out", "words", "message"),
    [
        ("x.txt", [], "its name must end in"),
        ("absent/x.npz", [], "there is no folder"),
        ("x.npz", ["--features", "AV", "A"], r"\['AV', 'A'\] are not valid: this model makes V"),
    ],
)
def test_bad_input(
    make_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    clips: Path,
    tmp_path: Path,
    capsys: Any,
    out: str,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(loop, "write_report", lambda config, *_: config.train.out / "report")
    config = make_config({"steps": 1}, model={"audio": False})
    pretrain(config)
    target = tmp_path / out
    assert main(["embed", str(config.train.out), str(clips), str(target), *words]) == 2
    import re

    assert re.search(message, capsys.readouterr().err)
    assert not target.exists()


def test_recall_by_hand() -> None:
    sound = np.eye(4)
    pictures = np.array([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    valid = np.array([True, True, True, False])
    arrays = {"A": sound, "V": pictures, "A_valid": np.ones(4, bool), "V_valid": valid}
    found = recall_at(arrays, [1, 2])
    # Sound 1 is nearest to picture 1; picture 1 is nearer to sound 0 than to its own.
    assert found.recall == {
        "A->V 1": 1.0,
        "A->V 2": 1.0,
        "V->A 1": pytest.approx(2 / 3),
        "V->A 2": 1.0,
    }
    assert found.clips == 3 and found.chance[1] == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match="feature V is not there, but .'A'.: embed it first"):
        recall_at({"A": sound, "A_valid": valid}, [1])


def test_equal_features_are_not_found() -> None:
    same = {name: np.ones((5, 3)) for name in ("A", "V")}
    found = recall_at({**same, "A_valid": np.ones(5), "V_valid": np.ones(5)}, [1])
    assert set(found.recall.values()) == {0.0}


def test_vote_by_hand() -> None:
    train = {"A": np.eye(3), "A_valid": np.ones(3), "labels": np.array([0, 1, -1])}
    test = {"A": np.eye(3)[::-1], "A_valid": np.ones(3), "labels": np.array([0, 1, 1])}
    # The third training clip has no label, so the first test clip goes to either of the others.
    accuracy, clips = knn_accuracy(train, test, "A", 1)
    assert clips == 3 and accuracy in (1 / 3, 2 / 3)
    with pytest.raises(ConfigError, match="5 neighbours need as many clips"):
        knn_accuracy(train, test, "A", 5)


def test_an_unfinished_run_has_no_model(run: Config) -> None:
    import shutil

    shutil.rmtree(run.train.out / "encoder")
    with pytest.raises(ValueError, match="not done: no model to use yet"):
        load_embedder(run.train.out)
    assert Embedder
