"""Training steps of fine-tuning: the engine's classifier beside the reference.

Rows as in `benchmarks.step`: A is `avmae_fast.reference` in eager PyTorch on float frames, B the
same under torch.compile, C the engine on uint8 frames. A step is forward, backward and the released
SGD, on inputs that are on the device. Both modalities, sound alone and video alone; AudioSet's
classes.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from avmae_fast.config import AudioConfig, StackConfig, VideoConfig
from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.models import Classifier
from avmae_fast.models.blocks import set_checkpoint
from avmae_fast.models.classification_loss import classification_loss
from avmae_fast.reference import ReferenceClassifier
from avmae_fast.reference.preprocess import normalise_frames
from benchmarks import device as devices
from benchmarks import results, timing
from benchmarks.peers import add_times
from benchmarks.step_rows import autocast

_CLASSES = 527
_RATE = 1e-3
# Twice the error of plain PyTorch, whose own is what bf16 leaves of a loss; in float32 both are
# sums of the same numbers in another order.
_NEAR = {"cuda": 2e-2, "cpu": 1e-5}


def configs(size: str, tiny: bool = False) -> dict[str, ClassifierConfig]:
    """By the letters of the modalities. Clips are 32 frames and 10 s of sound, as released."""
    both = ClassifierConfig.of_size(size, classes=_CLASSES)
    if tiny:
        both = replace(
            both,
            encoder=StackConfig(width=32, layers=3, heads=2, mlp=64),
            classes=5,
            video=VideoConfig(frames=4, height=32, width=32),
            audio=AudioConfig(frames=32),
            fusion_layer=1,
        )
    return {"AV": both, "A": replace(both, video=None), "V": replace(both, audio=None)}


def measure(args: argparse.Namespace, result: results.Result, deadline: results.Deadline) -> None:
    device = result.device
    for letters, config in configs(args.model, args.tiny).items():
        batch = 2 if args.tiny else args.batch
        names = {"modalities": letters, "model": args.model, "batch": batch}
        calls: dict[str, timing.Call] = {}
        inputs, weights = _inputs(config, batch, device), Classifier(config).state_dict()
        expected: list[float] = []
        for row in ("A", "B", "C"):
            if deadline.passed():
                result.skip(results.OUT_OF_TIME, **names, row=row)
                continue
            try:
                step = _stepper(row, config, weights, inputs, args.compiler, device)
                _require_near(step(0).item(), expected, device)
                calls[row] = step
            except Exception as error:
                result.skip(error, **names, row=row)
        add_times(result, calls, batch, "row", names)
        calls.clear()
        devices.release(device)


def _inputs(config: ClassifierConfig, batch: int, device: torch.device) -> dict[str, Tensor]:
    """Random clips and one class each."""
    inputs = {}
    if config.video is not None:
        v = config.video
        shape = (batch, v.frames, v.height, v.width, 3)
        inputs["video"] = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    if config.audio is not None:
        audio = config.audio
        inputs["audio"] = torch.randn(batch, audio.frames, audio.mel_bins, device=device)
    return inputs


def _stepper(
    row: str,
    config: ClassifierConfig,
    weights: dict[str, Tensor],
    inputs: dict[str, Tensor],
    compiler: str,
    device: torch.device,
) -> Callable[[int], Tensor]:
    """One row's training step, from the same weights as every other's."""
    model: nn.Module = Classifier(config) if row == "C" else ReferenceClassifier(config)
    model.load_state_dict(weights)
    model.to(device)
    if row == "C":
        set_checkpoint(model, "selective")
    elif "video" in inputs:
        inputs = {**inputs, "video": normalise_frames(inputs["video"], torch.float32)}
    heads, batch = config.heads, len(next(iter(inputs.values())))
    classes = sum(heads.values())
    label = torch.arange(batch, device=device).remainder(classes)
    one_hot = nn.functional.one_hot(label, classes).float()

    def loss() -> Tensor:
        logits = model(**inputs).by_modality
        labels = dict.fromkeys(logits, one_hot)
        return classification_loss(logits, labels, "softmax", heads=heads, smoothing=0.3)

    called: Any = torch.compile(loss, dynamic=False, backend=compiler) if row == "B" else loss
    optimizer = torch.optim.SGD(model.parameters(), lr=_RATE, momentum=0.9, fused=True)

    def step(_: int) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device):
            value = called()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def _require_near(loss: float, expected: list[float], device: torch.device) -> None:
    """The first loss of every row is that of the first row."""
    expected.append(loss)
    if not abs(loss - expected[0]) <= _NEAR[device.type] * abs(expected[0]):
        raise AssertionError(f"loss {loss:.6g}, the reference has {expected[0]:.6g}")


def main(argv: list[str] | None = None) -> int:
    options = results.parser(__doc__ or "")
    options.add_argument("--model", choices=["B", "L"], default="B")
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--compiler", default="inductor", help="back end of torch.compile")
    return results.run("finetune", options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
