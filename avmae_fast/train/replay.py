"""The batch that stopped a run, once more: which sample and which layer is not finite.

    failed/step-00000123/
        model.safetensors   the weights it happened with
        failed.json         step, first_sample, samples, micro_batch

The batch itself need not be kept: a sample is a function of the seed and its position, what mixup
blends it with of the micro-batch too.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avmae_fast.config import Config
from avmae_fast.data.loader import Batch, ClipLoader
from avmae_fast.data.manifest import Manifest
from avmae_fast.finetune_config import FinetuneConfig
from avmae_fast.train.finetune_inputs import FinetuneStage
from avmae_fast.train.guard import NonFiniteError
from avmae_fast.train.inputs import InputStage, Stage
from avmae_fast.train.recipe import (
    Autocast,
    build_classifier,
    build_model,
    choose_autocast,
    choose_device,
)
from avmae_fast.train.run_folder import FAILED, RunFolderError, files_to_exclude, read_any_run
from avmae_fast.train.targets import Targets

_RECORD = "failed.json"
_WEIGHTS = "model.safetensors"

_Config = Config | FinetuneConfig


@dataclass(frozen=True)
class Replayed:
    """What one sample alone came to, or `count` samples from `sample` on together.

    loss: of the sample, or the mean of those samples.
    layer: the first module whose output was not finite, None where all were.
    gradients: parameters whose gradient was not finite.
    """

    sample: int
    loss: float
    layer: str | None
    gradients: list[str]
    count: int = 1

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and self.layer is None and not self.gradients

    def __str__(self) -> str:
        text = f"sample {self.sample}"
        if self.count > 1:
            text = f"samples {self.sample} to {self.sample + self.count - 1} together"
        text += f": loss {self.loss:.6g}"
        if self.layer is not None:
            text += f", first not finite after {self.layer}"
        elif self.gradients:
            count = len(self.gradients)
            text += f", {count} gradients not finite, the last layer's {self.gradients[-1]}"
        return text


@dataclass(frozen=True)
class _Failed:
    """What is on record of a failed step; micro_batch: samples that one process had at a time."""

    first_sample: int
    samples: int
    micro_batch: int


@dataclass(frozen=True)
class _Model:
    """A model with the weights of the step, and how its inputs are made of batches.

    blends: whether what a sample comes to depends on the others of its micro-batch.
    """

    model: nn.Module
    autocast: Autocast
    stage: Stage
    blends: bool


def keep_failed(
    out: Path, weights: dict[str, Tensor], error: NonFiniteError, micro_batch: int
) -> Path:
    """Write what `replay` needs below the folder of a run, in place of an earlier one.

    Args:
        micro_batch: samples that one process had at a time.
    """
    folder = out / FAILED / f"step-{error.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / _WEIGHTS)
    record = {"step": error.step, "first_sample": error.first_sample, "samples": error.samples}
    (folder / _RECORD).write_text(json.dumps(record | {"micro_batch": micro_batch}) + "\n")
    return folder


def replay(out: Path, device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[Replayed]:
    """Run every sample of the last failed step by itself, forward and backward.

    In fine-tuning a sample by itself is augmented as in the step, but not blended; where all
    samples of a micro-batch are finite, it is run once more as it was in the step, and what comes
    of that is told if it is not finite.

    Raises:
        RunFolderError: the folder holds no run, or none that was stopped by a failed step.
        ConfigError, ManifestError: the data is not there any more.
    """
    config, folder = read_any_run(out), _newest(out)
    config = replace(config, train=replace(config.train, device=device))
    failed, weights = _failed(folder, config), load_file(folder / _WEIGHTS)
    excluded = files_to_exclude(out, failed.first_sample)
    cut = _loaded(config, failed.micro_batch)
    with ClipLoader(cut, "train", failed.first_sample, excluded=excluded) as clips:
        made = _model(config, clips.manifest, weights)
        for batch in islice(clips, failed.samples // failed.micro_batch):
            yield from _replay_batch(made, batch)


def _failed(folder: Path, config: _Config) -> _Failed:
    path, train = folder / _RECORD, config.train
    try:
        record = json.loads(path.read_text())
        # Runs of one process did without it.
        micro_batch = record.get("micro_batch", train.batch // train.accumulate)
        failed = _Failed(record["first_sample"], record["samples"], micro_batch)
        if all(type(x) is int and x >= 0 for x in vars(failed).values()) and micro_batch:
            return failed
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise RunFolderError(f"{path} is damaged: {error}") from error
    raise RunFolderError(f"{path} is damaged: it holds {record}")


def _loaded(config: _Config, micro_batch: int) -> _Config:
    """The run as its loader is to see it: one process, a micro-batch at a time."""
    if isinstance(config, FinetuneConfig):
        config = config.training_input
    return replace(config, train=replace(config.train, batch=micro_batch, accumulate=1))


def _model(config: _Config, manifest: Manifest, weights: dict[str, Tensor]) -> _Model:
    device = choose_device(config.train)
    autocast = choose_autocast(config.train, device)
    if isinstance(config, Config):
        masked = build_model(config, device)
        masked.load_state_dict(weights)
        return _Model(masked, autocast, InputStage(config, device), blends=False)
    model = build_classifier(config)
    model.load_state_dict(weights)
    targets = Targets(manifest, config.model.heads, config.finetune.loss)
    stage = FinetuneStage(config, targets, device)
    return _Model(model.to(device), autocast, stage, blends=True)


def _replay_batch(made: _Model, batch: Batch) -> Iterator[Replayed]:
    finite = True
    with _without_batch_statistics(made.model):
        for row in range(len(batch)):
            # Mixup of a sample with itself, as its own batch is reversed, is the sample.
            one = _run(made, _row(batch, row))
            finite = finite and one.finite
            yield one
    if finite and made.blends and len(batch) > 1:
        whole = _run(made, batch)
        if not whole.finite:
            yield whole


def _row(batch: Batch, row: int) -> Batch:
    """One sample of a batch."""
    values: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
    tensors = {name: x[row : row + 1] for name, x in values.items() if isinstance(x, Tensor)}
    return Batch(**values | tensors)


@contextmanager
def _without_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm goes by the run's statistics: one sample has none of its own."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def _run(made: _Model, batch: Batch) -> Replayed:
    model = made.model
    model.zero_grad()
    with _first_not_finite(model) as found, made.autocast():
        loss = model(**made.stage(batch)).loss
    loss.backward()
    broken = [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not p.grad.isfinite().all()
    ]
    layer = found[0] if found else None
    return Replayed(int(batch.keys[0]), loss.item(), layer, broken, len(batch))


@contextmanager
def _first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Fills a list with the names of modules in the order in which their outputs broke."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(x.isfinite().all() for x in _tensors(output)):
                found.append(name)

        return look

    handles = [
        module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _tensors(item)


def _newest(out: Path) -> Path:
    folders = sorted((out / FAILED).glob("step-*/" + _RECORD))
    if not folders:
        raise RunFolderError(f"{str(out)!r} holds no failed step: there is nothing to replay")
    return folders[-1].parent
