"""The run that is killed: small enough for hundreds of starts, with everything that a run writes.

Twelve clips, one of which is no media file; validation; several checkpoints; a step that is
skipped (see `soak.trainer`).
"""

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avmae_fast.data.synth import synthesise
from avmae_fast.train.checkpoint import steps_saved
from avmae_fast.train.export import ENCODER
from avmae_fast.train.lines import read_lines

STEPS, BATCH, LOG_EVERY, CHECKPOINT_EVERY = 48, 4, 3, 4

# What may differ between two runs of the same steps: the clock.
_CLOCK = {"time_s", "clips_per_s", "data_wait_fraction"}

_CONFIG = f"""
[model]
fusion_layers = 1
encoder = {{ width = 16, layers = 2, heads = 2, mlp = 32 }}
decoder = {{ width = 16, layers = 1, heads = 2, mlp = 32 }}

[model.video]
frames = 4
height = 16
width = 16
tubelet = [2, 8, 8]
mask_ratio = 0.75

[model.audio]
frames = 32
mel_bins = 32
mask_ratio = 0.5
mean = -4.0
std = 4.0

[data]
manifest = "MANIFEST"
reader = "pyav"
fps = 10
stride = 2
short_side = 18
max_bad_fraction = 1.0

[train]
out = "runs" # each has its own
steps = {STEPS}
batch = {BATCH}
accumulate = 2
base_lr = 0.1
warmup_steps = 4
clip_grad = 0.5
log_every = {LOG_EVERY}
val_every = 5
checkpoint_every = {CHECKPOINT_EVERY}
device = "cpu"
precision = "fp32"
tensorboard = false
"""


@dataclass(frozen=True)
class Case:
    """A configuration in a folder of its own; every run has a folder below `root`."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> "Case":
        """Write the clips and the configuration."""
        clips = {"clips": 12, "classes": 3, "seconds": 1.0, "size": 32, "fps": 10, "workers": 1}
        manifest = synthesise(root / "clips", **clips)  # type: ignore[arg-type]
        rows = list(csv.DictReader(manifest.open()))
        (root / "broken.mp4").write_text("not a media file")
        rows[0]["path"] = "../broken.mp4"
        with (root / "clips" / "one-broken.csv").open("w") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        text = _CONFIG.replace("MANIFEST", str(root / "clips" / "one-broken.csv"))
        (root / "run.toml").write_text(text)
        return cls(root)

    def command(self, out: Path, workers: int, resume: bool) -> list[str]:
        """The arguments of `avmae` that start or resume the run in `out`."""
        sets = (f"train.out={out}", f"data.workers={workers}")
        again = ["--resume"] if resume else []
        return ["pretrain", str(self.root / "run.toml"), *_set(sets), *again]


def _set(pairs: tuple[str, ...]) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def what_it_left(out: Path) -> dict[str, Any]:
    """All that a finished run left which its clock and its number of workers do not decide."""
    step, last = steps_saved(out / "checkpoints")[0]
    state = json.loads((last / "state.json").read_text())
    del state["metrics"]["time_s"]
    kept = {name: state[name] for name in ("step", "samples", "metrics", "guard", "optimizer")}
    left: dict[str, Any] = {"state": kept}
    for path in (last / "model.safetensors", last / "optimizer.safetensors"):
        left[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    encoder = out / ENCODER / "model.safetensors"
    left["encoder"] = hashlib.sha256(encoder.read_bytes()).hexdigest()
    for name in ("metrics", "validation", "events", "bad_samples"):
        left[name] = _lines(out / f"{name}.jsonl")
    page = out / "report" / "summary.json"
    summary = json.loads(page.read_text()) if page.exists() else {}
    left["report"] = {k: v for k, v in summary.items() if k not in _CLOCK | {"config"}}
    return left


def logged_steps() -> list[int]:
    """The steps that metrics.jsonl has a line for."""
    return [s for s in range(1, STEPS + 1) if s in (1, STEPS) or s % LOG_EVERY == 0]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in x.items() if k not in _CLOCK} for x in read_lines(path)]
