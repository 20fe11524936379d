"""Figures of the report: loss curves, and grids of clips in pixels and in log-mel."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avmae_fast.config import Config, Modality
from avmae_fast.train.pictures import Array, Picture

_ROWS = ("original", "masked", "reconstruction", "raw")
_MAX_FRAMES = 8
_FRAME_INCHES = 1.0
_GREY = 0.62
_COLOURS: dict[Modality, str] = {"video": "tab:blue", "audio": "tab:orange"}
_HOP_S = 0.01


def loss_curves(
    train: Sequence[Mapping[str, float]],
    validation: Sequence[Mapping[str, float]],
    floors: Mapping[Modality, float],
) -> Figure:
    """Loss of each modality over the steps.

    Args:
        train: lines of metrics.jsonl.
        validation: lines of validation.jsonl.
        floors: squared error of the mean predictor, drawn as a line to get below.
    """
    modalities = list(floors)
    figure = Figure(figsize=(5.2 * len(modalities), 3.6), layout="constrained")
    axes = figure.subplots(1, len(modalities), squeeze=False)[0]
    for axis, m in zip(axes, modalities, strict=True):
        steps = [line["step"] for line in train]
        # A stretch in which no step was finite has none.
        losses = [line.get(f"loss_{m}", math.nan) for line in train]
        axis.plot(steps, losses, color=_COLOURS[m], linewidth=1.2, label="training")
        if validation:
            steps = [line["step"] for line in validation]
            losses = [line[f"loss_{m}"] for line in validation]
            axis.plot(steps, losses, "o-", color="black", markersize=3, label="validation")
        axis.axhline(floors[m], color="grey", linestyle="--", label="mean of the training set")
        axis.set(title=m, xlabel="step", ylabel="mean squared error", yscale="log")
        axis.yaxis.set_major_formatter("{x:.3g}")
        axis.yaxis.set_minor_formatter("{x:.3g}")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    return figure


def clip_grid(config: Config, m: Modality, clips: Sequence[Picture]) -> Figure:
    """One block a clip: original, masked, reconstruction and raw output, over time."""
    return _video_grid(config, clips) if m == "video" else _audio_grid(clips)


def _video_grid(config: Config, clips: Sequence[Picture]) -> Figure:
    video = config.model.video
    assert video is not None
    # The first frame of each tubelet, thinned out evenly where there are many.
    firsts = np.arange(0, video.frames, video.tubelet[0])
    shown = firsts[:: -(-len(firsts) // _MAX_FRAMES)]
    times_s = shown * config.data.stride / config.data.fps
    columns = min(2, len(clips))
    rows = -(-len(clips) // columns)
    width = _FRAME_INCHES * len(shown)
    height = _FRAME_INCHES * video.height / video.width * len(_ROWS)
    size = (columns * (width + 0.2) + 1.3, rows * (height + 0.6))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(clips) :]:
        axis.set_axis_off()
    for number, (axis, clip) in enumerate(zip(axes, clips, strict=False), start=1):
        strips = [np.concatenate(list(part[shown]), axis=1) for part in _parts(clip)]
        axis.imshow(np.nan_to_num(np.concatenate(strips), nan=_GREY), interpolation="nearest")
        middles = (np.arange(len(_ROWS)) + 0.5) * video.height - 0.5
        axis.set_yticks(middles, _ROWS if number % columns == 1 % columns else [""] * len(_ROWS))
        middles = (np.arange(len(shown)) + 0.5) * video.width - 0.5
        axis.set_xticks(middles, [f"{t:.2f} s" for t in times_s])
        axis.tick_params(length=0)
        axis.set_title(f"clip {number}", loc="left", fontsize=10)
        _rule(axis, len(_ROWS), video.height)
    return figure


def _rule(axis: Axes, rows: int, height: int) -> None:
    """White lines between the rows of a grid."""
    for row in range(1, rows):
        axis.axhline(row * height - 0.5, color="white", linewidth=2)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _audio_grid(clips: Sequence[Picture]) -> Figure:
    columns, rows = len(_ROWS), len(clips)
    figure = Figure(figsize=(3.4 * columns, 2.3 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for number, (axes, clip) in enumerate(zip(grid, clips, strict=True), start=1):
        low, high = np.percentile(clip.original, [1, 99])
        style: dict[str, Any] = {"vmin": low, "vmax": high, "cmap": "magma", "aspect": "auto"}
        frames, bins = clip.original.shape
        for axis, part in zip(axes, _parts(clip), strict=True):
            axis.set_facecolor(str(_GREY))
            extent = (0, frames * _HOP_S, 0, bins)
            image = axis.imshow(part.T, origin="lower", extent=extent, **style)
        axes[0].set_ylabel(f"clip {number}\nmel bin")
        figure.colorbar(image, ax=list(axes), label="log-mel")
    for axis, name in zip(grid[0], _ROWS, strict=True):
        axis.set_title(name)
    for axis in grid[-1]:
        axis.set_xlabel("time (s)")
    return figure


def _parts(clip: Picture) -> tuple[Array, Array, Array, Array]:
    return clip.original, clip.masked, clip.reconstruction, clip.raw
