"""The loss on held-out clips while a run goes on: the same clips, windows and masks every time."""

import torch

from avmae_fast.data.loader import ClipLoader
from avmae_fast.models import AudiovisualMAE
from avmae_fast.train.figures import clip_grid
from avmae_fast.train.inputs import InputStage
from avmae_fast.train.metrics import Metrics
from avmae_fast.train.pictures import draw
from avmae_fast.train.recipe import Autocast

_MAX_CLIPS = 512
_PICTURED_CLIPS = 2


@torch.no_grad()
def validate(
    model: AudiovisualMAE,
    clips: ClipLoader,
    stage: InputStage,
    autocast: Autocast,
    metrics: Metrics,
    step: int,
) -> None:
    """Write the mean losses over at most 512 held-out clips, and pictures of the first ones."""
    sums: dict[str, float] = {}
    count = 0
    for batch in clips:
        inputs = stage(batch)
        with autocast():
            out = model(**inputs)
        losses = {"loss": out.loss} | {f"loss_{m}": loss for m, loss in out.losses.items()}
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + float(loss) * len(batch)
        if count == 0 and metrics.tensorboard is not None:
            pictures = draw(model, inputs, _PICTURED_CLIPS)
            for m in pictures[0]:
                figure = clip_grid(stage.config, m, [clip[m] for clip in pictures])
                metrics.tensorboard.add_figure(f"validation/{m}", figure, step)
        count += len(batch)
        if count >= _MAX_CLIPS:
            break
    metrics.write_validation(step, {name: total / count for name, total in sums.items()})
