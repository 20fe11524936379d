"""The numbers of a report against their definition, and a report of every kind of run."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avmae_fast.config import Config
from avmae_fast.data.loader import ClipLoader
from avmae_fast.models.patches import patchify
from avmae_fast.train import evaluate as evaluation
from avmae_fast.train import report
from avmae_fast.train.inputs import InputStage
from avmae_fast.train.lines import read_lines
from avmae_fast.train.pictures import draw
from avmae_fast.train.pretrain import pretrain
from avmae_fast.train.probe import Features, chance_accuracy, probe_accuracy
from avmae_fast.train.recipe import build_model
from avmae_kernels.yuv import i420_to_rgb

MakeConfig = Callable[..., Config]

CPU = torch.device("cpu")
# The grid of the tiny run: 2 x 2 x 2 tubelets of 2 x 8 x 8, 2 x 2 patches of 16 x 16.
PATCHES = {"video": (2, 8, 8), "audio": (16, 16)}


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is most of a small report's time."""
    monkeypatch.setattr(report, "_png", lambda figure: b"")


class _Page(HTMLParser):
    """Collects the sources of the images and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        assert tag not in ("script", "link")

    def handle_data(self, data: str) -> None:
        self.text += data


def _summary(config: Config) -> dict[str, Any]:
    return json.loads((config.train.out / "report/summary.json").read_text())


def _pixels(inputs: dict[str, Any], m: str) -> torch.Tensor:
    source = inputs["video"].float() / 127.5 - 1 if m == "video" else inputs["audio"]
    return patchify(source, PATCHES[m])


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("loss_on", ["masked", "all"])
def test_numbers_are_what_they_say(make_config: MakeConfig, loss_on: str) -> None:
    """An untrained model predicts zero, so both errors can be computed from the clips alone."""
    # The first update of a warm-up has rate 0.
    recipe = {"steps": 2, "warmup_steps": 1.0, "base_lr": 1e-30}
    config = make_config(recipe, model={"loss_on": loss_on})
    pretrain(config)
    summary = _summary(config)
    stage = InputStage(config, CPU)
    # Three epochs of nine clips, each with windows of its own.
    with ClipLoader(config, "train") as clips:
        batches = [stage(batch) for batch, _ in zip(clips, range(7), strict=False)]
    assert summary["mean_windows"] == 27
    with ClipLoader(config, "val") as clips:
        (held_out,) = [stage(batch) for batch in clips]
    for m in PATCHES:
        mean_NP = torch.cat([_pixels(inputs, m) for inputs in batches])[:27].double().mean(0)
        target = _pixels(held_out, m)
        masked = held_out["masks"][m].masked[..., None].expand(-1, -1, target.shape[-1])
        of_zero = target.gather(1, masked).square().mean()
        of_mean = (target - mean_NP).gather(1, masked).square().mean()
        numbers = summary["reconstruction"][m]
        assert numbers["mse"] == pytest.approx(float(of_zero), rel=1e-5)
        assert numbers["mean_mse"] == pytest.approx(float(of_mean), rel=1e-5)
        assert numbers["ratio"] == pytest.approx(float(of_zero / of_mean), rel=1e-5)
    probe = summary["probe"]
    # Nothing was learned: both encoders are the same.
    assert probe["trained_by_seed"] == probe["untrained_by_seed"]
    assert len(probe["trained_by_seed"]) == 3
    assert (probe["classes"], probe["train_clips"], probe["test_clips"]) == (3, 9, 3)
    assert probe["chance"] == pytest.approx(1 / 3)


def test_files_and_page(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config({"steps": 3, "val_every": 2})
    html = pretrain(config).report
    assert html == config.train.out / "report/index.html"
    names = {entry.name for entry in html.parent.iterdir()}
    assert names == {"index.html", "summary.json", "loss.png", "video.png", "audio.png"}
    for name in ("loss", "video", "audio"):
        assert (html.parent / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    summary, page, printed = _summary(config), _Page(html.read_text()), capsys.readouterr().out
    assert len(page.images) == 3
    assert all(src.startswith("data:image/png;base64,") for src in page.images)
    last = read_lines(config.train.out / "metrics.jsonl")[-1]
    assert summary["last_losses"]["loss_video"] == last["loss_video"]
    assert (summary["steps"], summary["samples"]) == (3, 12)
    model = build_model(config, CPU)
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    for text in (page.text, printed):
        assert f"Ratio {summary['reconstruction']['audio']['ratio']:.3f}" in text
        assert f"{summary['probe']['trained']:.1%} of held-out clips right" in text
        assert "3 held-out clips" in text and "one run with one seed" in text


@pytest.mark.parametrize("absent", ["video", "audio"])
def test_one_modality(make_config: MakeConfig, absent: str) -> None:
    config = make_config({"steps": 2}, model={absent: None})
    html = pretrain(config).report
    present = "audio" if absent == "video" else "video"
    summary = _summary(config)
    assert list(summary["reconstruction"]) == [present]
    assert summary["probe"]["test_clips"] == 3
    assert html is not None and not (html.parent / f"{absent}.png").exists()


@pytest.mark.usefixtures("no_figures")
def test_no_labels_and_nothing_held_out(
    make_config: MakeConfig, clips: Path, tmp_path: Path
) -> None:
    rows = [line.split(",")[0] for line in (clips.parent / "train.csv").read_text().splitlines()]
    paths = [rows[0], *(str(clips.parent / row) for row in rows[1:])]
    (tmp_path / "manifest.csv").write_text("\n".join(paths) + "\n")
    config = make_config({"steps": 2}, {"manifest": str(tmp_path / "manifest.csv")})
    html = pretrain(config).report
    summary = _summary(config)
    assert summary["probe"] is None and summary["no_probe"] == "no clips are held out"
    assert not summary["held_out"] and summary["clips"] == 9
    assert html is not None
    assert "cannot tell learning from memory" in html.read_text()


@pytest.mark.usefixtures("no_figures")
def test_labels_in_one_split_only(make_config: MakeConfig, clips: Path, tmp_path: Path) -> None:
    lines = (clips.parent / "val.csv").read_text().splitlines()
    paths = ["path", *(str(clips.parent / line.split(",")[0]) for line in lines[1:])]
    (tmp_path / "val.csv").write_text("\n".join(paths) + "\n")
    config = make_config({"steps": 2}, {"val_manifest": str(tmp_path / "val.csv")})
    pretrain(config)
    summary = _summary(config)
    assert summary["probe"] is None and summary["no_probe"] == "too few clips have a label"
    assert summary["held_out"] and summary["clips"] == 3


@pytest.mark.usefixtures("no_figures")
def test_report_is_the_same_when_made_again(make_config: MakeConfig) -> None:
    config = make_config({"steps": 2})
    pretrain(config)
    before = _summary(config)
    pretrain(config, resume=True)
    assert _summary(config) == before


@pytest.mark.parametrize("objective", ["reconstruction", "inpainting", "inpainting_released"])
@pytest.mark.parametrize("norm", ["none", "patch", "patch_channel"])
def test_pictures(make_config: MakeConfig, objective: str, norm: str) -> None:
    """Visible patches are the original's, masked ones the model's, in pixels and in log-mel."""
    # Released inpainting shows the visible video tokens in the place of audio's first four.
    wide = {"video": {"frames": 4, "height": 16, "width": 16, "tubelet": [4, 8, 8]}}
    config = make_config(model={"objective": objective, "target_norm": norm, **wide})
    model = build_model(config, CPU)
    for head in model.head.values():
        torch.nn.init.constant_(head.bias, 0.25)
    stage = InputStage(config, CPU)
    with ClipLoader(config, "val") as clips:
        inputs = stage(next(iter(clips)))
    first, second = draw(model, inputs, clips=2)
    assert list(first) == ["video", "audio"]
    audio = first["audio"]
    hidden = np.isnan(audio.masked)
    # Half of the 2 x 2 patches of 16 x 16.
    assert hidden.sum() == 2 * 16 * 16
    mel = inputs["audio"][0].numpy() * 4.0 - 4.0
    np.testing.assert_allclose(audio.original, mel, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(audio.masked[~hidden], audio.original[~hidden])
    np.testing.assert_array_equal(audio.reconstruction[~hidden], audio.original[~hidden])
    np.testing.assert_array_equal(audio.reconstruction[hidden], audio.raw[hidden])
    if norm != "patch":
        np.testing.assert_allclose(audio.raw, 0.25 * 4.0 - 4.0, rtol=1e-5)
    else:
        patch = audio.original[:16, :16]
        np.testing.assert_allclose(
            audio.raw[:16, :16], patch.mean() + 0.25 * patch.std(), rtol=1e-4
        )
    video = second["video"]
    pixels = inputs["video"][1].numpy() / 255.0
    np.testing.assert_allclose(video.original, pixels, atol=1e-6)
    if norm == "none":
        np.testing.assert_allclose(video.raw, 0.625, rtol=1e-5)
    elif norm == "patch_channel":
        red = pixels[:, :8, :8, 0]
        np.testing.assert_allclose(
            video.raw[:, :8, :8, 0], red.mean() + 0.25 * red.std(), atol=1e-3
        )


@pytest.mark.usefixtures("no_figures")
def test_large_sets_are_sampled(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_MAX_CLIPS", 4)
    config = make_config({"steps": 1})
    pretrain(config)
    summary = _summary(config)
    assert summary["mean_windows"] == 12 and summary["clips"] == 3
    assert summary["probe"] is None or summary["probe"]["train_clips"] == 4


def test_probe_finds_what_is_there_and_no_more() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 4
    noise = rng.normal(size=(200, 8)).astype(np.float32)
    told = noise.copy()
    # A direction of tiny scale: standardisation must bring it out.
    told[:, 0] = 1e-4 * (labels == 1) - 1e-4 * (labels == 2)
    told[:, 1] = 1e-4 * (labels == 3)
    train, test = slice(0, 120), slice(120, 200)
    assert (
        probe_accuracy(Features(told[train], labels[train]), Features(told[test], labels[test]))
        == 1
    )
    blind = probe_accuracy(
        Features(noise[train], labels[train]), Features(noise[test], labels[test])
    )
    # Chance is 20 of 80 with a standard deviation of 3.9.
    assert abs(80 * blind - 20) < 4 * 3.9


def test_chance_is_the_most_frequent_training_class() -> None:
    x = np.zeros((6, 1), np.float32)
    train = Features(x, np.array([0, 1, 1, 1, 2, 2]))
    test = Features(x, np.array([0, 0, 0, 1, 1, 2]))
    assert chance_accuracy(train, test) == pytest.approx(2 / 6)


def test_pictures_of_planes_are_those_of_their_rgb(make_config: MakeConfig) -> None:
    config = make_config(data={"pixels": "yuv420"})
    model, stage = build_model(config, CPU), InputStage(config, CPU)
    with ClipLoader(config, "val") as clips:
        inputs = stage(next(iter(clips)))
    as_rgb = {**inputs, "video": i420_to_rgb(inputs["video"])}
    (drawn,), (expected,) = draw(model, inputs, clips=1), draw(model, as_rgb, clips=1)
    for name, picture in vars(expected["video"]).items():
        np.testing.assert_array_equal(getattr(drawn["video"], name), picture)


def test_report_of_a_run_on_planes(make_config: MakeConfig) -> None:
    """Its targets and means are read from planes, too."""
    config = make_config({"steps": 2}, {"pixels": "yuv420"})
    assert pretrain(config).report is not None
    summary = json.loads((config.train.out / "report/summary.json").read_text())
    assert 0 < summary["reconstruction"]["video"]["mse"] < 1
