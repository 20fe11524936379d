"""A few synthetic clips and a run small enough for tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from avmae_fast.config import Config
from avmae_fast.config_file import finetune_from_dict, from_dict, to_dict
from avmae_fast.data.synth import synthesise
from avmae_fast.finetune_config import FinetuneConfig

# Twelve clips of three classes: nine to train on, three held out.
CLIPS, CLASSES = 12, 3


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of a small synthetic set."""
    folder = tmp_path_factory.mktemp("clips")
    shape = {"seconds": 1.0, "size": 32, "fps": 10}
    return synthesise(folder / "set", clips=CLIPS, classes=CLASSES, workers=1, **shape)


@pytest.fixture
def make_config(clips: Path, tmp_path: Path) -> Callable[..., Config]:
    """Builds a tiny run; `train`, `data` and `model` tables are laid over it."""

    def make(
        train: dict | None = None, data: dict | None = None, model: dict | None = None
    ) -> Config:
        stack = {"width": 16, "layers": 2, "heads": 2, "mlp": 32}
        video = {"frames": 4, "height": 16, "width": 16, "tubelet": [2, 8, 8], "mask_ratio": 0.75}
        audio = {"frames": 32, "mel_bins": 32, "mask_ratio": 0.5, "mean": -4.0, "std": 4.0}
        return from_dict(
            {
                "model": {
                    "encoder": stack,
                    "decoder": {**stack, "layers": 1},
                    "fusion_layers": 1,
                    "video": video,
                    "audio": audio,
                    **(model or {}),
                },
                "data": {
                    "manifest": str(clips),
                    "fps": 10,
                    "stride": 2,
                    "short_side": 18,
                    "workers": 0,
                    **(data or {}),
                },
                "train": {
                    "out": str(tmp_path / "run"),
                    "steps": 10,
                    "batch": 4,
                    "base_lr": 0.1,
                    "log_every": 4,
                    "checkpoint_every": 5,
                    "device": "cpu",
                    "tensorboard": False,
                    **(train or {}),
                },
            }
        )

    return make


@pytest.fixture
def make_finetune(
    make_config: Callable[..., Config], tmp_path: Path
) -> Callable[..., FinetuneConfig]:
    """Builds a tiny fine-tuning run of the model that `make_config` pretrains."""

    def make(
        train: dict | None = None,
        data: dict | None = None,
        model: dict | None = None,
        finetune: dict | None = None,
    ) -> FinetuneConfig:
        pretraining = to_dict(make_config())
        inputs = {m: pretraining["model"][m] for m in ("encoder", "video", "audio")}
        tuned = {"out": str(tmp_path / "tuned"), "base_lr": 3.2, "clip_grad": 1.0}
        return finetune_from_dict(
            {
                "model": {**inputs, "classes": 3, "fusion_layer": 1, **(model or {})},
                "data": {**pretraining["data"], "short_side": 24, **(data or {})},
                "train": {**pretraining["train"], **tuned, **(train or {})},
                "finetune": {"temporal_views": 2, **(finetune or {})},
            }
        )

    return make


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny products are slower on many threads, and tests may share the machine."""
    torch.set_num_threads(1)
