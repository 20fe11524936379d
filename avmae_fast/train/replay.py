"""The batch that stopped a run, once more: which sample and which layer is not finite.

    failed/step-00000123/
        model.safetensors   the weights it happened with
        failed.json         step, first_sample, samples

The batch itself need not be kept: a sample is a function of the seed and its position.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avmae_fast.data.loader import ClipLoader
from avmae_fast.train.guard import NonFiniteError
from avmae_fast.train.inputs import InputStage
from avmae_fast.train.recipe import Autocast, build_model, choose_autocast, choose_device
from avmae_fast.train.run_folder import FAILED, RunFolderError, read_run

_RECORD = "failed.json"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Replayed:
    """What one sample alone came to.

    loss: of the sample.
    layer: the first module whose output was not finite, None where all were.
    gradients: parameters whose gradient was not finite.
    """

    sample: int
    loss: float
    layer: str | None
    gradients: list[str]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and self.layer is None and not self.gradients

    def __str__(self) -> str:
        text = f"sample {self.sample}: loss {self.loss:.6g}"
        if self.layer is not None:
            text += f", first not finite after {self.layer}"
        elif self.gradients:
            count = len(self.gradients)
            text += f", {count} gradients not finite, the last layer's {self.gradients[-1]}"
        return text


def keep_failed(out: Path, weights: dict[str, Tensor], error: NonFiniteError) -> Path:
    """Write what `replay` needs below the folder of a run, in place of an earlier one."""
    folder = out / FAILED / f"step-{error.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / _WEIGHTS)
    record = {"step": error.step, "first_sample": error.first_sample, "samples": error.samples}
    (folder / _RECORD).write_text(json.dumps(record) + "\n")
    return folder


def replay(out: Path, device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[Replayed]:
    """Run every sample of the last failed step by itself, forward and backward.

    Raises:
        RunFolderError: the folder holds no run, or none that was stopped by a failed step.
        ConfigError, ManifestError: the data is not there any more.
    """
    config, folder = read_run(out), _newest(out)
    config = replace(config, train=replace(config.train, device=device, batch=1, accumulate=1))
    record = json.loads((folder / _RECORD).read_text())
    where = choose_device(config.train)
    stage, autocast = InputStage(config, where), choose_autocast(config.train, where)
    model = build_model(config, where)
    model.load_state_dict(load_file(folder / _WEIGHTS))
    with ClipLoader(config, "train", record["first_sample"]) as clips:
        for batch, _ in zip(clips, range(record["samples"]), strict=False):
            yield _run(model, stage(batch), autocast, int(batch.keys[0]))


def _run(model: nn.Module, inputs: dict[str, Any], autocast: Autocast, sample: int) -> Replayed:
    model.zero_grad()
    with _first_not_finite(model) as found, autocast():
        loss = model(**inputs).loss
    loss.backward()
    broken = [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not p.grad.isfinite().all()
    ]
    return Replayed(sample, loss.item(), found[0] if found else None, broken)


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
