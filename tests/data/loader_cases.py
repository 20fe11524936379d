"""Runs over small clips, for the tests of the loader; the clips themselves are in conftest.py."""

from itertools import islice

import torch

from avmae_fast.config import (
    AudioConfig,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    VideoConfig,
)
from avmae_fast.data.loader import ClipLoader

VIDEO = VideoConfig(frames=4, height=64, width=64, tubelet=(2, 16, 16))
AUDIO = AudioConfig(frames=64)


GOOD = [f"{i}.mov,{i}" for i in range(10)]
# A third of them bad in some way.
ROWS = [*GOOD[:6], "aac.mp4,7", "random.mp4,8", "truncated.mp4,9", "no_sound.mp4,3"]


def make_config(
    folder, rows=GOOD, *, header="path,label", batch=4, accumulate=1, model=None, **data
):
    name = f"manifest{abs(hash((header, tuple(rows)))):x}.csv"
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    defaults = {"workers": 0, "short_side": 64, "flip": False, "max_bad_fraction": 0.9}
    model = model or {"video": VIDEO, "audio": AUDIO}
    return Config(
        model=ModelConfig.of_size("Ti", **model),
        data=DataConfig(manifest=folder / name, **(defaults | data)),
        train=TrainConfig(out=folder, batch=batch, accumulate=accumulate, steps=1),
    )


def take(config, count, split="train", start=0, **ranks):
    with ClipLoader(config, split, start, **ranks) as loader:
        return list(islice(loader, count))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name in ("video", "waveform", "keys", "labels", "has_audio"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.substituted == b.substituted
