"""Presets, overrides, round trips, and what each bad configuration is told."""

import json
from pathlib import Path

import pytest

from avmae_fast.config import DECODER_SIZES, ENCODER_SIZES, ConfigError
from avmae_fast.config_file import differing_fields, from_dict, load_config, presets, to_dict
from avmae_fast.train.recipe import Schedule, mask_specs

MANIFEST = "data.manifest=clips.csv"

# The pretraining recipes as released: spec of the authors' configurations.
RELEASED = {
    "audioset": {
        "epochs": 120,
        "base_lr": 3e-4,
        "peak_lr": 6e-4,
        "clips": 1_857_210,
        "steps": 435_240,
        "warmup_steps": 14_508,
        "fusion": "mid",
        "frames": 1000,
        "audio_ratio": 0.7,
        "audio_visible": 149,
    },
    "vggsound": {
        "epochs": 400,
        "base_lr": 1.5e-4,
        "peak_lr": 3e-4,
        "clips": 172_427,
        "steps": 134_400,
        "warmup_steps": 1_344,
        "fusion": "separate",
        "frames": 800,
        "audio_ratio": 0.5,
        "audio_visible": 200,
    },
}


@pytest.mark.parametrize("size", ["L", "B"])
@pytest.mark.parametrize("data_set", RELEASED)
def test_preset_is_the_released_recipe(data_set: str, size: str) -> None:
    config, wanted = load_config(f"{data_set}-{size}", [MANIFEST]), RELEASED[data_set]
    model, train, data = config.model, config.train, config.data
    assert model.video is not None and model.audio is not None
    assert model.encoder == ENCODER_SIZES[size] and model.decoder == DECODER_SIZES[size]
    assert model.fusion == wanted["fusion"] and model.fusion_layers == 2
    assert (model.decoding, model.objective) == ("shared", "reconstruction")
    assert (model.positions, model.target_norm) == ("sincos1d", "none")
    assert not model.modality_tokens and model.encoder_norm
    assert (model.video.frames, model.video.height, model.video.width) == (16, 224, 224)
    assert (model.video.tubelet, model.video.mask_ratio) == ((2, 16, 16), 0.9)
    assert (model.audio.frames, model.audio.mel_bins) == (wanted["frames"], 128)
    assert (model.audio.patch, model.audio.mask_ratio) == ((16, 16), wanted["audio_ratio"])
    assert model.video.loss_weight == model.audio.loss_weight == 0.5
    specs = mask_specs(config)
    assert (specs["video"].n_visible, specs["video"].n_masked) == (157, 1411)
    assert specs["audio"].n_visible == wanted["audio_visible"]
    assert (data.fps, data.stride, data.short_side, data.flip) == (25, 4, 256, True)
    assert data.clip_end == "wrap"
    assert (train.epochs, train.batch, train.base_lr) == (wanted["epochs"], 512, wanted["base_lr"])
    assert (train.betas, train.eps, train.weight_decay) == ((0.9, 0.95), 1e-8, 0.05)
    assert (train.warmup_epochs, train.clip_grad, train.seed) == (4, None, 42)
    schedule = Schedule.of(train, wanted["clips"])
    assert schedule == Schedule(
        wanted["steps"], wanted["warmup_steps"], pytest.approx(wanted["peak_lr"])
    )


def test_presets_are_these() -> None:
    pretraining = ["audioset-B", "audioset-L", "demo", "vggsound-B", "vggsound-L"]
    sets = ("audioset", "vggsound", "epic")
    tuning = [f"{name}-ft-{kind}" for name in sets for kind in ("av", "a", "v")]
    assert presets() == sorted([*pretraining, *tuning])


@pytest.mark.parametrize("name", ["audioset-B", "audioset-L", "demo", "vggsound-B", "vggsound-L"])
def test_round_trip_through_json(name: str) -> None:
    config = load_config(name, [MANIFEST])
    mask_specs(config)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(ConfigError, match="data.manifest is not set: no preset holds one.*--set"):
        load_config(name)


def test_round_trip_of_one_modality() -> None:
    config = load_config("demo", [MANIFEST, "model.audio=false"])
    assert config.model.audio is None
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_paths_start_at_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    absolute = tmp_path / "elsewhere.csv"
    config = load_config("demo", [MANIFEST, "train.out=a/b", f"data.val_manifest={absolute}"])
    assert config.data.manifest == tmp_path / "clips.csv"
    assert config.data.val_manifest == absolute
    assert config.train.out == tmp_path / "a/b"


def test_overrides() -> None:
    config = load_config(
        "audioset-B",
        [
            MANIFEST,
            "train.batch=16",
            "train.batch = 32",
            "train.base_lr=1",
            "train.betas=[0.5, 0.75]",
            "train.device=cpu",
            'train.precision="fp32"',
            "train.tensorboard=false",
            "train.clip_grad=0.5",
            "model.video.tubelet=[4, 8, 8]",
            "model.encoder.layers=3",
        ],
    )
    train, video = config.train, config.model.video
    assert (train.batch, train.base_lr, type(train.base_lr)) == (32, 1.0, float)
    assert (train.betas, train.device, train.precision) == ((0.5, 0.75), "cpu", "fp32")
    assert (train.tensorboard, train.clip_grad) == (False, 0.5)
    assert video is not None and video.tubelet == (4, 8, 8)
    # The size gives the other fields of the stack.
    assert (config.model.encoder.layers, config.model.encoder.width) == (3, 768)


def test_one_of_two_replaces_the_other() -> None:
    train = load_config("audioset-L", [MANIFEST, "train.steps=10"]).train
    assert (train.steps, train.epochs) == (10, None)
    train = load_config("audioset-L", [MANIFEST, "train.warmup_steps=3"]).train
    assert (train.warmup_steps, train.warmup_epochs) == (3.0, None)
    train = load_config("demo", [MANIFEST, "train.epochs=2", "train.warmup_steps=none"]).train
    assert (train.steps, train.epochs, train.warmup_steps) == (None, 2.0, None)


def test_none_leaves_out_optional_fields_only() -> None:
    config = load_config(
        "demo", [MANIFEST, "data.cache=none", "model.video=none", "train.clip_grad=none"]
    )
    assert config.data.cache == "none"
    assert config.model.video is None and config.train.clip_grad is None


def test_size_and_tables_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\nsize = "S"\nvideo = false\n[model.decoder]\nwidth = 48\n'
        '[data]\nmanifest = "clips.csv"\n[train]\nout = "run"\nsteps = 5\n'
    )
    config = load_config(path)
    assert config.model.encoder == ENCODER_SIZES["S"]
    assert (config.model.decoder.width, config.model.decoder.layers) == (48, 4)
    assert config.model.modalities == ("audio",)


BAD_OVERRIDES = [
    ("train.betas=[0.9, 1.0]", r"train\.betas = \(0.9, 1.0\) is not valid"),
    ("train.base_lr=inf", r"train\.base_lr = inf is not valid: it must be finite"),
    ("model.audio.mean=nan", r"model\.audio\.mean = nan is not valid: it must be finite"),
    ("train.steps=18446744073709551616", r"train\.steps = 1844.* below 2\*\*64"),
    (r'train.out="a\u0000b"', r"train\.out must be a path"),
    ("train.out=~nobody-of-this-name/x", "'~nobody-of-this-name/x' is not valid: there is no"),
    ("model.audio.mask_ration=0.5", r"unknown field model\.audio\.mask_ration.*'mask_ratio'"),
    ("train.bach=3", r"unknown field train\.bach \(did you mean 'batch'\?\); train has out,"),
    ("modle.size=L", r"unknown field modle \(did you mean 'model'\?\)"),
    ("model.siz=L", r"unknown field model\.siz \(did you mean 'size'\?\)"),
    ("data.zzz=1", r"unknown field data\.zzz; data has manifest"),
    ("train.batch=1.5", r"train\.batch must be a whole number, got float 1\.5"),
    ("train.batch=true", r"train\.batch must be a whole number, got bool True"),
    ("train.base_lr=fast", r"train\.base_lr must be a number, got str 'fast'"),
    ("train.base_lr=true", r"train\.base_lr must be a number, got bool True"),
    ("train.tensorboard=1", r"train\.tensorboard must be true or false, got int 1"),
    ("train.out=7", r"train\.out must be a path \(a string\), got int 7"),
    ("data.manifest=''", r"data\.manifest must be a path"),
    ("train.betas=[0.9]", r"train\.betas must be a list of 2, got list \[0\.9\]"),
    ("train.betas=[0.9, x]", r"train\.betas must be a list of 2, got str"),
    ("model.video.tubelet=[2, 8.5, 8]", r"model\.video\.tubelet\[1\] must be a whole number"),
    ("train=3", r"train must be a table, got int 3"),
    ("model.encoder=big", r"model\.encoder must be a table, got str 'big'"),
    ("model.fusion=middle", r"model\.fusion = 'middle'.*one of 'early', .*did you mean 'mid'"),
    ("train.device=1", r"train\.device = 1 is not valid: it must be one of 'auto'"),
    ("model.size=XL", r"model\.size = 'XL'.*one of 'Ti', 'S', 'B', 'L', 'H'"),
    ("model.size=[1]", r"model\.size = \[1\]"),
    ("train.batch=none", r"train\.batch must be a whole number, got str 'none'"),
    ("model.encoder.heads=7", r"in \[model\.encoder\]: stack\.heads = 7"),
    ("model.video.frames=15", r"in \[model\.video\]: video\.frames = 15.*multiple of tubelet 2"),
    ("model.video.mask_ratio=1", r"video\.mask_ratio = 1\.0.*in \[0, 1\)"),
    ("train.base_lr=nan", r"train\.base_lr = nan is not valid"),
    ("train.accumulate=3", r"train\.accumulate = 3"),
    ("model.audio.mel_bins=100", r"audio\.mel_bins = 100.*a multiple of audio\.patch"),
    ("train", r"override 'train' is not valid: it must be key=value"),
    ("train..batch=1", r"override 'train\.\.batch=1' is not valid"),
    ("train.batch.size=1", r"train\.batch is 512, not a table"),
]


@pytest.mark.parametrize(("override", "match"), BAD_OVERRIDES)
def test_bad_override_names_field_value_and_choices(override: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_config("audioset-L", [MANIFEST, override])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[train]\nsteps = 1\n", "model is not set|model.encoder is not set"),
        ('[model]\nfusion = "mid"\n', r"model\.encoder is not set: set size"),
        ('[model]\nsize = "B"\n', r"data\.manifest is not set"),
        ('[model]\nsize = "B"\n[data]\nmanifest = "a.csv"\n', r"train\.out is not set"),
        (
            '[model]\nsize = "B"\n[data]\nmanifest = "a.csv"\n[train]\nout = "b"\n',
            r"exactly one of train\.steps = None and train\.epochs = None",
        ),
        ("model = [", "is not a TOML file"),
        ("[model]\nsize = 'B'\nsize = 'L'\n", "is not a TOML file"),
        ("steps = " + "1" * 5000, "is not a TOML file"),
        ("a = " + "[" * 3000, "is not a TOML file"),
    ],
)
def test_bad_file(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match):
        load_config(path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="neither a configuration file nor a preset.*'audioset-L'"
    ):
        load_config("audioset-l")
    with pytest.raises(ConfigError, match="neither a configuration file nor a preset"):
        load_config(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'[train]\nout = "caf\xe9"\n')
    with pytest.raises(ConfigError, match="is not a TOML file"):
        load_config(tmp_path / "latin.toml")


def test_a_folder_does_not_hide_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("demo", [MANIFEST]).train.steps is not None


def test_differing_fields() -> None:
    a = {"x": {"y": 1, "z": 2}, "gone": 3, "table": {"q": 1}}
    b = {"x": {"y": 1, "z": 5}, "table": None, "new": "w"}
    assert differing_fields(a, b) == [
        "x.z: 2, now 5",
        "table: a table, now None",
        "new: None, now 'w'",
        "gone: 3, now None",
    ]
