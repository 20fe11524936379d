"""A few synthetic clips and a run small enough for tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from avmae_fast.config import Config
from avmae_fast.config_file import from_dict
from avmae_fast.data.synth import synthesise

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


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny products are slower on many threads, and tests may share the machine."""
    torch.set_num_threads(1)
