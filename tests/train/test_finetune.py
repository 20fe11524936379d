"""Fine-tuning: what it starts from, that stopping and resuming changes nothing, what it leaves."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from avmae_fast.config import Config, ConfigError
from avmae_fast.config_file import load_finetune_config, presets
from avmae_fast.data.manifest import ManifestError
from avmae_fast.finetune_config import FinetuneConfig
from avmae_fast.interop.transfer import TransferError
from avmae_fast.models import TrainedClassifier
from avmae_fast.models.pretrained import PretrainedError
from avmae_fast.train import pretrain as loop
from avmae_fast.train.checkpoint import CheckpointError
from avmae_fast.train.classifier_folder import load_classifier
from avmae_fast.train.finetune import finetune
from avmae_fast.train.initial_weights import load_initial_weights
from avmae_fast.train.lines import read_lines
from avmae_fast.train.metrics import Metrics
from avmae_fast.train.pretrain import pretrain, report
from avmae_fast.train.run_folder import RunFolderError

CLOCK = {"time_s", "clips_per_s", "data_wait_fraction"}
EVERYTHING = {
    "mixup": 0.5,
    "frequency_masks": 1,
    "frequency_mask_bins": 8,
    "scale_jitter": [0.9, 1.33],
    "colour": 0.8,
    "greyscale": 0.2,
}

MakeConfig = Callable[..., Config]
MakeFinetune = Callable[..., FinetuneConfig]


@pytest.fixture
def pretrained(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a finished pretraining run."""
    monkeypatch.setattr(loop, "write_report", lambda config, *_: config.train.out / "report")
    config = make_config({"steps": 2})
    pretrain(config)
    return config.train.out


def _lines(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_lines(path)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_equals_straight(
    make_finetune: MakeFinetune,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
) -> None:
    """With all that is drawn switched on; what it started from may be gone by then."""
    rate = {"sgd": 3.2, "adamw": 0.06}[optimizer]
    train = {"accumulate": 2, "val_every": 4, "checkpoint_every": 100, "base_lr": rate}
    tables: dict[str, dict] = {
        "model": {"drop_path": 0.5},
        "finetune": {**EVERYTHING, "optimizer": optimizer, "init": str(pretrained)},
    }
    straight = make_finetune({**train, "out": str(tmp_path / "straight")}, **tables)
    broken = make_finetune({**train, "out": str(tmp_path / "broken")}, **tables)
    assert finetune(straight).exit_code is None

    counted, add = iter(range(1, 100)), Metrics.add

    def stop_at_5(self: Metrics, *args: Any) -> None:
        add(self, *args)
        if next(counted) == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "add", stop_at_5)
        outcome = finetune(broken)
    assert (outcome.step, outcome.exit_code) == (5, 75)
    shutil.rmtree(pretrained)
    assert finetune(broken, resume=True).exit_code is None

    for name in ("model.safetensors", "optimizer.safetensors"):
        path = Path("checkpoints/step-00000010") / name
        a, b = load_file(straight.train.out / path), load_file(broken.train.out / path)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert _lines(straight.train.out / name) == _lines(broken.train.out / name), name
    for name in ("summary.json", "per_class.csv"):
        path = Path("evaluation") / name
        assert (straight.train.out / path).read_text() == (broken.train.out / path).read_text()
    lines = read_lines(straight.train.out / "metrics.jsonl")
    assert {"loss", "loss_video", "loss_audio", "grad_norm"} <= lines[-1].keys()
    assert {"label_top1", "label_mAP"} <= read_lines(straight.train.out / "validation.jsonl")[
        0
    ].keys()


def test_training_fits_its_clips(make_finetune: MakeFinetune) -> None:
    config = make_finetune(
        {"steps": 60, "warmup_steps": 6, "base_lr": 0.32, "log_every": 60, "batch": 8},
        finetune={"optimizer": "adamw", "label_smoothing": 0.0},
    )
    finetune(config)
    lines = read_lines(config.train.out / "metrics.jsonl")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_one_modality(make_finetune: MakeFinetune, pretrained: Path, modality: str) -> None:
    absent = {"video": "audio", "audio": "video"}[modality]
    config = make_finetune(
        {"steps": 2}, model={absent: False}, finetune={**EVERYTHING, "init": str(pretrained)}
    )
    finetune(config)
    tuned = load_classifier(config.train.out)
    assert tuned.model.config.modalities == (modality,) and tuned.classes == ("0", "1", "2")
    text = (config.train.out / "transfer.txt").read_text()
    assert f"patch_embed.{modality} <- patch_embed.{modality}" in text
    assert f"the classifier has no {absent}" in text


def test_starts_from_what_was_pretrained(make_finetune: MakeFinetune, pretrained: Path) -> None:
    """A run, its encoder, its weights file and its checkpoint hold the same encoder."""
    checkpoint = pretrained / "checkpoints/step-00000002"
    places = [pretrained, pretrained / "encoder", checkpoint, checkpoint / "model.safetensors"]
    found = [load_initial_weights(place) for place in places]
    name = "encoder.both.blocks.0.mlp.fc1.weight"
    assert all(torch.equal(x.weights[name], found[0].weights[name]) for x in found)
    assert all(x.config == found[0].config for x in found)
    shutil.rmtree(pretrained / "encoder")
    assert load_initial_weights(pretrained).source == checkpoint / "model.safetensors"

    config = make_finetune({"steps": 1, "warmup_steps": 0.5}, finetune={"init": str(pretrained)})
    finetune(config)  # the first rate of a warm-up is 0: weights are those it started from
    weights = load_file(config.train.out / "classifier/model.safetensors")
    for m in ("video", "audio"):
        target = f"encoder.{m}.blocks.1.mlp.fc1.weight"
        assert torch.equal(weights[target], found[0].weights[name])


def test_bad_beginnings(make_finetune: MakeFinetune, pretrained: Path, tmp_path: Path) -> None:
    """Each is told before anything is written."""

    def start(path: Path, **tables: dict) -> None:
        recipe = {"init": str(path)}
        finetune(make_finetune({"steps": 1}, **{"finetune": recipe, **tables}))

    with pytest.raises(ConfigError, match="finetune.init = .*absent.* it does not exist"):
        start(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no run.json, config.json or state.json"):
        start(tmp_path / "empty")
    with pytest.raises(TransferError, match="does not fit the classifier: encoder was"):
        start(pretrained, model={"encoder": {"width": 16, "layers": 3, "heads": 2, "mlp": 32}})
    weights = pretrained / "encoder/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(PretrainedError, match="cannot be read"):
        start(pretrained)
    weights = pretrained / "checkpoints/step-00000002/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="CRC-32"):
        start(weights.parent)
    assert not (tmp_path / "tuned").exists()


def test_a_classifier_is_no_beginning(make_finetune: MakeFinetune, tmp_path: Path) -> None:
    config = make_finetune({"steps": 1})
    finetune(config)
    for place in ("", "classifier", "checkpoints/step-00000001"):
        with pytest.raises(ConfigError, match="holds a classifier"):
            path = config.train.out / place
            if not place:
                path = path / "classifier"
            load_initial_weights(path)
    with pytest.raises(RunFolderError, match="holds a fine-tuning run"):
        report(config.train.out)


def test_other_classes_do_not_resume(make_finetune: MakeFinetune) -> None:
    finetune(make_finetune({"steps": 1}))
    other = make_finetune({"steps": 2}, model={"classes": {"verb": 1, "noun": 2}})
    with pytest.raises(CheckpointError, match="of another model .*model.classes: 3, now"):
        finetune(other, resume=True)


def test_class_count_must_be_the_manifests(make_finetune: MakeFinetune) -> None:
    with pytest.raises(ManifestError, match="3 classes, model.classes = 5: set model.classes"):
        finetune(make_finetune(model={"classes": 5}))


def test_probes_leave_the_encoder_alone(make_finetune: MakeFinetune, pretrained: Path) -> None:
    for head in ("linear_probe", "attentive_probe"):
        config = make_finetune(
            {"steps": 3}, model={"head": head}, finetune={"init": str(pretrained), "mixup": 0.5}
        )
        finetune(config, restart=True)
        before = load_initial_weights(pretrained).weights
        after = load_file(config.train.out / "classifier/model.safetensors")
        name = "patch_embed.audio.weight"
        assert torch.equal(before[name], after[name])
        assert after["head.weight"].abs().max() > 0


def test_merged_features_share_one_blend(make_finetune: MakeFinetune) -> None:
    config = make_finetune({"steps": 2}, model={"merge": "features"}, finetune=EVERYTHING)
    finetune(config)
    assert "loss_both" in read_lines(config.train.out / "metrics.jsonl")[0]


@pytest.mark.parametrize("name", [name for name in presets() if "-ft-" in name])
def test_presets(name: str) -> None:
    """The numbers of the released recipes."""
    config = load_finetune_config(name, ["data.manifest=clips.csv"])
    data_set, _, kind = name.split("-")
    model, train, recipe = config.model, config.train, config.finetune
    modalities = {"av": ("video", "audio"), "a": ("audio",), "v": ("video",)}[kind]
    assert model.modalities == modalities and (model.encoder.layers, model.encoder.width) == (
        24,
        1024,
    )
    assert (recipe.optimizer, recipe.momentum, recipe.layer_decay) == ("sgd", 0.9, 0.75)
    assert (train.epochs, train.warmup_epochs, train.clip_grad) == (50, 2.5, 1.0)
    assert (recipe.temporal_views, recipe.spatial_views) == (4, 1)
    assert recipe.time_masks == 0  # as effective
    wanted: dict[str, tuple] = {
        "audioset": ({"label": 527}, "sigmoid", 128, 1.6, 0.3, 0.5, 2, (2, 36), 1000, 18),
        "vggsound": ({"label": 309}, "softmax", 64, 0.8, 0.3, 0.5, 2, (1, 48), 800, 16),
        "epic": ({"verb": 97, "noun": 300}, "softmax", 64, 0.5, 0.2, 0.1, 1, (1, 48), 400, 18),
    }
    heads, loss, batch, lr, smoothing, mixup, stride, masks, frames, layer = wanted[data_set]
    assert (model.heads, recipe.loss, train.batch) == (heads, loss, batch)
    assert train.base_lr * batch / 256 == lr and recipe.label_smoothing == smoothing
    assert (recipe.mixup, config.data.stride) == (mixup, stride)
    if kind != "v":
        assert model.audio is not None and model.audio.frames == frames
        assert (recipe.frequency_masks, recipe.frequency_mask_bins) == masks
        assert recipe.time_shift == (data_set == "audioset")
    if kind != "a":
        assert model.video is not None and model.video.frames == 32
        jitter = (recipe.scale_jitter, recipe.colour, recipe.greyscale)
        assert jitter == ((0.9, 1.33), 0.8, 0.1)
        loaded = config.training_input.model.video
        assert loaded is not None and (loaded.height, loaded.width) == (256, 256)
    if kind == "av":
        assert (model.fusion, model.fusion_layer, model.bottleneck_tokens) == (
            "bottleneck",
            layer,
            4,
        )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("finetune.loss=hinge", "finetune.loss = 'hinge' is not valid: .*'softmax', 'sigmoid'"),
        ("finetune.scale_jitter=[1.2, 0.9]", "two rising factors"),
        ("finetune.scale_jitter=[0.5, 1.0]", "data.short_side = 256 .*at least 448"),
        ("finetune.spatial_views=2", "finetune.spatial_views = 2 .*1 or 3"),
        ("finetune.label_smoothing=1.0", r"in \[0, 1\)"),
        ("train.cuda_graph=true", "stochastic depth leaves out"),
        ("train.parallel=fsdp2", "'ddp' with finetune.optimizer = 'sgd'"),
        ("data.pixels=yuv420", "data.pixels = 'yuv420' .*'rgb' in fine-tuning"),
        ("data.repeat_views=2", "mixup would mix a clip with itself"),
        ("finetune.fresh=head", "finetune.fresh must be a list"),
        ("finetune.warmth=2", "unknown field finetune.warmth"),
        ("model.classes=none", "model.classes"),
    ],
)
def test_bad_settings(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config = load_finetune_config("vggsound-ft-av", ["data.manifest=x.csv", override])
        assert config.training_input


def test_a_skipped_first_step_leaves_no_trace(make_finetune: MakeFinetune) -> None:
    """torch leaves the momentum of a first step that is skipped as it was in memory."""
    from avmae_fast.train.sgd import ReleasedSGD, layerwise_groups

    config = make_finetune()
    torch.manual_seed(0)
    model = TrainedClassifier(config.model, config.finetune)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = ReleasedSGD(layerwise_groups(model, 2))
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step(found_inf=torch.ones(()))
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert all(not s["momentum_buffer"].any() for s in optimizer.state.values())


def test_the_record_of_a_run_says_all(make_finetune: MakeFinetune) -> None:
    config = make_finetune({"steps": 1})
    finetune(config)
    record = json.loads((config.train.out / "run.json").read_text())["config"]
    assert record["finetune"]["temporal_views"] == 2 and record["model"]["classes"] == 3
    assert "from scratch" in (config.train.out / "transfer.txt").read_text()


def test_clips_of_one_track_in_a_run_of_both(
    make_finetune: MakeFinetune, clips: Path, tmp_path: Path
) -> None:
    """Without sound: another clip stands in, with its own label, or silence, as asked for."""
    import av

    whole = clips.parent / "clips/clip-00000.mp4"
    mute = tmp_path / "mute.mp4"
    with av.open(str(whole)) as source, av.open(str(mute), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    rows = [(mute, 0), *((clips.parent / f"clips/clip-0000{i}.mp4", i) for i in (1, 2))]
    manifest = tmp_path / "some.csv"
    manifest.write_text("path,label\n" + "\n".join(f"{path},{label}" for path, label in rows))
    for missing, bad in (("substitute", {"no_audio"}), ("silence", set())):
        data = {"manifest": str(manifest), "missing_audio": missing, "max_bad_fraction": 1.0}
        config = make_finetune({"steps": 3, "batch": 3}, data)
        finetune(config, restart=True)
        path = config.train.out / "bad_samples.jsonl"
        assert {line["kind"] for line in read_lines(path)} == bad


def test_a_substitute_brings_its_own_label(make_finetune: MakeFinetune, tmp_path: Path) -> None:
    from avmae_fast.data.loader import ClipLoader
    from avmae_fast.train.finetune_inputs import FinetuneStage
    from avmae_fast.train.targets import Targets

    config = make_finetune()
    good = [record for record in ClipLoader(config, "train").manifest if record.label == 1][0]
    manifest = tmp_path / "some.csv"
    manifest.write_text(f"path,label\nabsent.mp4,0\n{good.path},1\nabsent2.mp4,2\n")
    config = make_finetune({"batch": 3}, {"manifest": str(manifest), "max_bad_fraction": 1.0})
    with ClipLoader(config, "train") as clips:
        targets = Targets(clips.manifest, config.model.heads, "softmax")
        batch = next(iter(clips))
        inputs = FinetuneStage(config, targets, torch.device("cpu"))(batch)
    assert batch.records.tolist() == [1, 1, 1]
    assert inputs["labels"]["audio"].tolist() == [[0, 1, 0]] * 3


def test_commands_tell_each_others_configurations_apart() -> None:
    from avmae_fast.config_file import load_config

    with pytest.raises(ConfigError, match="use avmae finetune"):
        load_config("vggsound-ft-a", ["data.manifest=x.csv"])
    with pytest.raises(ConfigError, match=r"no table \[finetune\]"):
        load_finetune_config("demo", ["data.manifest=x.csv"])
