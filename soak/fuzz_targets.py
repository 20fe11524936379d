"""What is fed damaged files: everything the program reads that another program may have written.

A target writes a damaged file below its folder and reads it as a run does. It may return, or raise
one of its `typed` errors; anything else is a fault.
"""

import json
import math
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from avmae_fast.config import Config, ConfigError
from avmae_fast.config_file import from_dict, load_config, to_dict
from avmae_fast.data.clip import ClipError
from avmae_fast.data.manifest import ManifestError, load_manifest
from avmae_fast.data.order import Order
from avmae_fast.data.pack import pack
from avmae_fast.data.pack_clips import PackOptions
from avmae_fast.data.samples import SampleSpec
from avmae_fast.data.shard_index import INDEX_NAME
from avmae_fast.data.shard_manifest import ShardRecord
from avmae_fast.data.shard_reader import ShardReader
from avmae_fast.data.synth import synthesise
from avmae_fast.interop.entries import ConvertError
from avmae_fast.interop.flax_msgpack import flatten, pack_tree, read_flax
from avmae_fast.models import AudiovisualMAE
from avmae_fast.models.pretrained import PretrainedError
from avmae_fast.train.checkpoint import CheckpointError, restore_checkpoint, save_checkpoint
from avmae_fast.train.distributed import World
from avmae_fast.train.export import ENCODER, export_encoder, load_encoder
from avmae_fast.train.guard import Guard
from avmae_fast.train.lines import LinesError, append_lines
from avmae_fast.train.metrics import Metrics
from avmae_fast.train.optim import ReleasedAdamW, parameter_groups
from avmae_fast.train.recipe import Schedule, build_model, mask_specs
from avmae_fast.train.run_folder import (
    RunFolderError,
    checkpoints_of,
    files_to_exclude,
    find_resume_point,
    open_run,
    read_run,
)
from avmae_fast.train.snapshot import Snapshot
from soak.mutate import (
    ODD_TEXT,
    change_cells,
    change_index,
    change_json,
    change_lines,
    change_safetensors,
    change_toml,
    damage_bytes,
)

_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
Change = Callable[[bytes, random.Random], bytes]


class Target(Protocol):
    """Made once in a folder of its own, then called for every input."""

    @property
    def typed(self) -> tuple[type[Exception], ...]: ...

    def __call__(self, rng: random.Random) -> None: ...


def _damaged(data: bytes, change: Change, rng: random.Random) -> bytes:
    """Changed into what is still well-formed, as bytes, or both."""
    kind = rng.random()
    if kind < 0.75:
        data = change(data, rng)
    return damage_bytes(data, rng) if kind > 0.65 else data


class ManifestTarget:
    """A manifest, CSV or JSON lines."""

    typed = (ManifestError,)
    _CSV = (
        b"path,label,start,end,split\na.mp4,dog,0,4.5,train\nb/c.mp4,cat,,,val\n"
        b"d.mp4,dog,1.5,,train\n"
    )
    _NUMBERED = b"path,label,extra\na.mp4,0,x\nb.mp4,2,y\n"
    _JSONL = (
        b'{"path": "a.mp4", "label": 3, "start": 0.5, "end": 2}\n'
        b'{"path": "b.mp4", "label": 0, "split": "val"}\n\n{"path": "c.mp4"}\n'
    )

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, rng: random.Random) -> None:
        data, suffix = rng.choice(
            [(self._CSV, "csv"), (self._NUMBERED, "csv"), (self._JSONL, "jsonl")]
        )
        change = change_cells if suffix == "csv" else change_lines
        path = self._folder / f"manifest.{suffix}"
        path.write_bytes(_damaged(data, change, rng))
        manifest = load_manifest(path, rng.choice([None, None, ("cat", "dog")]))
        for record in manifest:
            assert -1 <= record.label < len(manifest.classes), record
            assert 0 <= record.start_s < record.end_s, record
            assert record.path.name, record
        selected = sum(len(manifest.select(split)) for split in ("train", "val", "test"))
        assert selected == len(manifest)


class ConfigTarget:
    """A configuration with overrides, and what a run makes of it before it reads any data."""

    typed = (ConfigError,)

    def __init__(self, folder: Path) -> None:
        self._path = folder / "run.toml"

    def __call__(self, rng: random.Random) -> None:
        self._path.write_bytes(_damaged(_CONFIG.encode(), change_toml, rng))
        keys = ("train.out", "train.steps", "train.betas", "model.video", "data.fps", "a.b", "")
        overrides = [f"{rng.choice(keys)}={rng.choice(ODD_TEXT)}"] * (rng.random() < 0.2)
        config = load_config(self._path, overrides)
        assert from_dict(to_dict(config)) == config
        assert config.train.out.is_absolute() and config.data.manifest.is_absolute()
        SampleSpec.of(config)
        mask_specs(config)
        World().require_batch(config.train)
        schedule = Schedule.of(config.train, 9)
        assert schedule.steps > 0 and math.isfinite(schedule.peak_lr)
        weight = torch.nn.Parameter(torch.ones(2))
        train = config.train
        ReleasedAdamW(
            [{"params": [weight]}],
            betas=train.betas,
            eps=train.eps,
            weight_decay=train.weight_decay,
        )


class RunFolderTarget:
    """The folder of a run: run.json and the files of lines that a resumed run cuts back."""

    typed = (RunFolderError, LinesError)

    def __init__(self, folder: Path) -> None:
        self._out = folder / "run"
        self._config = tiny_config(self._out)

    def __call__(self, rng: random.Random) -> None:
        shutil.rmtree(self._out, ignore_errors=True)
        with open_run(self._config, None, False, 0):
            pass
        for name, key in (("metrics", "step"), ("events", "step"), ("bad_samples", "position")):
            path = self._out / f"{name}.jsonl"
            more = {"path": "a.mp4", "kind": "timeout", "detail": "slow"}
            append_lines(path, ({key: n, **more} for n in range(1, 4)))
        path = self._out / rng.choice(["run.json", *(f"{n}.jsonl" for n in _LINES)])
        change = change_json if path.suffix == ".json" else change_lines
        path.write_bytes(_damaged(path.read_bytes(), change, rng))
        read_run(self._out)
        find_resume_point(self._config, resume=True, restart=False)
        files_to_exclude(self._out, 2)
        with open_run(self._config, None, False, 0):
            pass


class CheckpointTarget:
    """A checkpoint, with its sums as they were or made to fit; read as a resumed run reads it."""

    typed = (CheckpointError, RunFolderError)

    def __init__(self, folder: Path) -> None:
        out = folder / "run"
        self._config = tiny_config(out)
        self._model = build_model(self._config, torch.device("cpu"))
        self._optimizer = _adam(self._model)
        for parameter in self._model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        state = {
            "samples": 8,
            "config": to_dict(self._config),
            "versions": {"avmae_fast": "0"},
            "metrics": {"sums": {"loss": 0.5}, "count": 2, "time_s": 1.5},
            "guard": {"skipped": [1], "norms": [0.5, 0.25]},
        }
        snapshot = Snapshot.of(self._model, self._optimizer)
        self._path = save_checkpoint(checkpoints_of(self._config), 2, snapshot, state, keep=2)
        (out / "run.json").write_text(json.dumps({"config": state["config"]}))
        self._good = {path.name: path.read_bytes() for path in self._path.iterdir()}

    def __call__(self, rng: random.Random) -> None:
        name = rng.choice(sorted(self._good))
        change = change_safetensors if name.endswith(".safetensors") else change_json
        files = {**self._good, name: _damaged(self._good[name], change, rng)}
        if name != "MANIFEST.json" and rng.random() < 0.75:
            files["MANIFEST.json"] = _sums_of(files)
        # A checkpoint that was refused has been set aside.
        shutil.rmtree(self._path.parent)
        self._path.mkdir(parents=True)
        for file, data in files.items():
            (self._path / file).write_bytes(data)
        self._resume()

    def _resume(self) -> None:
        config = self._config
        point = find_resume_point(config, resume=True, restart=False)
        assert point is not None
        with open_run(config, point, False, 0):
            restore_checkpoint(point.path, self._model, self._optimizer, sharded=False)
            self._optimizer.step()
            Order(9, config.train.seed, True).groups(point.samples, config.train.batch)
            Guard(None, ("loss", "grad_norm"), config.train.batch, point.state.get("guard"))
            # Of a process that writes nothing.
            with Metrics(
                config, 10, point, torch.device("cpu"), World(1, 2), clip_flops=1
            ) as metrics:
                metrics.add({"loss": 0.5})
                metrics.took(0.1)
                metrics.write(point.step + 1, point.samples + 4, 0.1)


class EncoderTarget:
    """The encoder that a run has exported."""

    typed = (PretrainedError,)

    def __init__(self, folder: Path) -> None:
        config = tiny_config(folder / "run")
        self._folder = folder
        export_encoder(build_model(config, torch.device("cpu")), config, folder, {"step": 2})
        self._good = {path.name: path.read_bytes() for path in (folder / ENCODER).iterdir()}

    def __call__(self, rng: random.Random) -> None:
        name = rng.choice(sorted(self._good))
        change = change_safetensors if name.endswith(".safetensors") else change_json
        files = {**self._good, name: _damaged(self._good[name], change, rng)}
        for file, data in files.items():
            (self._folder / ENCODER / file).write_bytes(data)
        load_encoder(self._folder)


class ShardIndexTarget:
    """The index of packed clips, and the records it points to."""

    typed = (ManifestError, ClipError)

    def __init__(self, folder: Path) -> None:
        shape = {"clips": 2, "classes": 2, "seconds": 1.0, "size": 32, "fps": 10, "workers": 1}
        manifest = synthesise(folder / "clips", **shape)  # type: ignore[arg-type]
        pack(manifest, folder / "packed", PackOptions(), jobs=1)
        self._path = folder / "packed" / INDEX_NAME
        self._good = self._path.read_bytes()

    def __call__(self, rng: random.Random) -> None:
        self._path.write_bytes(_damaged(self._good, change_index, rng))
        manifest = load_manifest(self._path)
        manifest.select("val")
        for number, record in enumerate(manifest):
            assert -1 <= record.label < len(manifest.classes), record
            assert set(manifest.labels(number)) <= set(range(len(manifest.classes))), record
            assert record.path.parent.parent == self._path.parent, record
        first = manifest[0]
        assert isinstance(first, ShardRecord)
        with ShardReader(first) as clip:
            clip.read_video(np.array([0.0, 0.4]), 32)
            clip.read_audio(0, 800)


class FlaxTarget:
    """Weights of another code base: MessagePack of nested maps and arrays."""

    typed = (ConvertError,)

    def __init__(self, folder: Path) -> None:
        kernel = np.arange(60, dtype=np.float32).reshape(4, 15)
        tree = {"Transformer": {"kernel": kernel, "bias": kernel[0]}, "step": np.array(3)}
        self._good = pack_tree(tree, chunk_bytes=128)
        self._path = folder / "checkpoint"

    def __call__(self, rng: random.Random) -> None:
        data = damage_bytes(self._good, rng)
        self._path.write_bytes(damage_bytes(data, rng) if rng.random() < 0.3 else data)
        tree = read_flax(self._path)
        if isinstance(tree, dict):
            flatten(tree)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "manifest": ManifestTarget,
    "config": ConfigTarget,
    "run_folder": RunFolderTarget,
    "checkpoint": CheckpointTarget,
    "encoder": EncoderTarget,
    "shard_index": ShardIndexTarget,
    "flax": FlaxTarget,
}

_LINES = ("metrics", "events", "bad_samples")


def tiny_config(out: Path) -> Config:
    """A model of a few thousand weights."""
    stack = {"width": 8, "layers": 2, "heads": 2, "mlp": 8}
    video = {"frames": 2, "height": 8, "width": 8, "tubelet": [2, 4, 4], "mask_ratio": 0.5}
    audio = {"frames": 4, "mel_bins": 4, "patch": [2, 2], "mask_ratio": 0.5}
    model = {"encoder": stack, "decoder": {**stack, "layers": 1}, "fusion_layers": 1}
    return from_dict(
        {
            "model": {**model, "video": video, "audio": audio},
            "data": {"manifest": str(out / "manifest.csv"), "short_side": 8, "workers": 0},
            "train": {"out": str(out), "steps": 10, "batch": 4, "tensorboard": False},
        }
    )


def _adam(model: AudiovisualMAE) -> ReleasedAdamW:
    return ReleasedAdamW(
        parameter_groups(model), lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05
    )


def _sums_of(files: dict[str, bytes]) -> bytes:
    sums = {
        name: {"size_bytes": len(files[name]), "crc32": f"{zlib.crc32(files[name]):08x}"}
        for name in _FILES
    }
    return json.dumps({"format": 1, "files": sums}).encode()


_CONFIG = """
[model]
size = "Ti"
fusion = "mid"
fusion_layers = 2
decoding = "shared"
modality_tokens = false
layer_norm_eps = 1e-6

[model.video]
frames = 8
height = 64
width = 64
tubelet = [2, 8, 8]
mask = "random"
mask_ratio = 0.75
loss_weight = 0.8

[model.audio]
frames = 128
mel_bins = 128
patch = [16, 16]
mask_ratio = 0.7
mean = -7.9
std = 3.4

[data]
manifest = "clips/manifest.csv"
reader = "pyav"
fps = 25
stride = 4
short_side = 72
workers = 1
timeout_s = 60.0
repeat_windows = 1
max_bad_fraction = 0.01
cache = "ram"

[train]
out = "runs/demo"
steps = 1800
batch = 8
accumulate = 2
base_lr = 6.4e-2
warmup_steps = 20
weight_decay = 0.05
betas = [0.9, 0.95]
eps = 1e-8
clip_grad = 1.0
seed = 42
log_every = 25
val_every = 0
checkpoint_every = 600
keep_checkpoints = 2
activation_checkpoint = "none"
wandb = "none"
"""
