"""What a pretrained model is worth, beside the numbers it must beat.

Reconstruction: squared error at masked tokens of held-out clips, beside that of the training set's
mean at each position (of each pixel or spectrogram bin, over training clips) at the same tokens.
Features: a linear probe on the frozen encoder, beside the same probe on the encoder as the run's
seed initialised it.

Shape letters: B clips, N tokens of a modality, S scored tokens, P values in a patch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avmae_fast.config import Modality, ModelConfig
from avmae_fast.data.loader import Batch, ClipLoader
from avmae_fast.models import AudiovisualMAE, TokenMask
from avmae_fast.models.encoder import layout_of, patch_of
from avmae_fast.train.inputs import InputStage
from avmae_fast.train.pictures import Picture, draw
from avmae_fast.train.probe import (
    Features,
    Probe,
    chance_accuracy,
    pooled_features,
    probe_accuracy,
)
from avmae_fast.train.recipe import Autocast, build_model
from avmae_kernels.reconstruction_loss import target_patches

# Enough for three digits; all of AudioSet would take longer than it tells.
_MAX_CLIPS = 1024
_PICTURED_CLIPS = 4
_PROBE_SEEDS = 3


@dataclass(frozen=True)
class Evaluation:
    """Numbers and pictures of one model.

    held_out: whether `mse` and the pictures are of clips that were not trained on.
    clips: how many clips `mse` is over. mean_windows: how many the training set's mean is over.
    mse: squared error at the masked tokens, a mean over the values of a patch.
    mean_mse: that of the training set's mean at each position, at the same tokens.
    probe: None where `no_probe` says why.
    """

    held_out: bool
    clips: int
    mean_windows: int
    mse: dict[Modality, float]
    mean_mse: dict[Modality, float]
    probe: Probe | None
    no_probe: str
    pictures: list[dict[Modality, Picture]]


@torch.no_grad()
def evaluate(
    model: AudiovisualMAE,
    stage: InputStage,
    autocast: Autocast,
    clips: ClipLoader,
    held_out: ClipLoader | None,
) -> Evaluation:
    """Measure a model on held-out clips, or on the training clips where none are held out.

    Args:
        clips: the training clips, from position 0 on.
    """
    no_probe = _no_probe(clips, held_out)
    encoders = [] if no_probe else [model, build_model(stage.config, stage.device)]
    training, means = _Features(encoders), _PositionMeans(model.config)
    count = min(len(clips.manifest), _MAX_CLIPS)
    reader = iter(clips)
    # Each seed of the probe gets a pass of its own, which has windows of its own.
    for batch in _take(reader, count * (1 if no_probe else _PROBE_SEEDS)):
        inputs = stage(batch)
        means.add(inputs)
        with autocast():
            training.add(inputs, batch.labels)

    test, errors = _Features(encoders), _MaskedErrors(model.config, means)
    pictures: list[dict[Modality, Picture]] = []
    measured = _take(reader, count) if held_out is None else _take(held_out, _MAX_CLIPS)
    for batch in measured:
        inputs = stage(batch)
        with autocast():
            out = model(**inputs)
            test.add(inputs, batch.labels)
        errors.add(inputs, out.predictions, out.scored)
        if len(pictures) < _PICTURED_CLIPS:
            pictures += draw(model, inputs, _PICTURED_CLIPS - len(pictures))
    probe = None
    if not no_probe:
        probe, no_probe = _probe(training, test, count)
    return Evaluation(
        held_out=held_out is not None,
        clips=errors.clips,
        mean_windows=means.windows,
        mse=errors.of_model(),
        mean_mse=errors.of_means(),
        probe=probe,
        no_probe=no_probe,
        pictures=pictures,
    )


def _take(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """The first `samples` samples of batches, or all if they are fewer."""
    left = samples
    for batch in batches:
        yield batch if len(batch) <= left else _head(batch, left)
        left -= len(batch)
        if left <= 0:
            return


def _head(batch: Batch, samples: int) -> Batch:
    return Batch(
        video=None if batch.video is None else batch.video[:samples],
        waveform=None if batch.waveform is None else batch.waveform[:samples],
        keys=batch.keys[:samples],
        labels=batch.labels[:samples],
        has_audio=batch.has_audio[:samples],
        records=batch.records[:samples],
    )


def _no_probe(clips: ClipLoader, held_out: ClipLoader | None) -> str:
    if held_out is None:
        return "no clips are held out"
    if len(clips.manifest.classes) < 2:
        return "the manifest names fewer than two classes"
    return ""


def _probe(training: "_Features", test: "_Features", count: int) -> tuple[Probe | None, str]:
    """The probe, or why there is none. Each seed is fitted to `count` samples of its own."""
    accuracies: list[list[float]] = []
    for which in (0, 1):
        tested = test.of(which).labelled()
        everything = training.of(which)
        accuracies.append([])
        for seed in range(_PROBE_SEEDS):
            part = slice(seed * count, (seed + 1) * count)
            fitted = Features(everything.x[part], everything.labels[part]).labelled()
            if len(np.unique(fitted.labels)) < 2 or not len(tested.labels):
                return None, "too few clips have a label"
            accuracies[which].append(probe_accuracy(fitted, tested))
    probe = Probe(
        trained=accuracies[0],
        untrained=accuracies[1],
        chance=chance_accuracy(fitted, tested),
        classes=len(np.unique(fitted.labels)),
        train_clips=len(fitted.labels),
        test_clips=len(tested.labels),
    )
    return probe, ""


class _Features:
    """Pooled features of the clips seen so far, of each of some encoders."""

    def __init__(self, encoders: list[AudiovisualMAE]) -> None:
        self._encoders = encoders
        self._x: list[list[np.ndarray]] = [[] for _ in encoders]
        self._labels: list[np.ndarray] = []

    def add(self, inputs: dict[str, Any], labels: Tensor) -> None:
        for encoder, x in zip(self._encoders, self._x, strict=True):
            x.append(pooled_features(encoder, inputs))
        self._labels.append(labels.numpy())

    def of(self, which: int) -> Features:
        return Features(np.concatenate(self._x[which]), np.concatenate(self._labels))


class _PositionMeans:
    """Mean of each value of each token over clips, in the space of the targets."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._sums: dict[Modality, Tensor] = {}
        self.windows = 0

    def add(self, inputs: dict[str, Any]) -> None:
        for m in self._config.modalities:
            batch, tokens = len(inputs[m]), self._config.input(m).tokens
            every = torch.arange(tokens, device=inputs[m].device).expand(batch, -1)
            total_NP = _targets(self._config, m, inputs[m], every).sum(0, dtype=torch.float64)
            self._sums[m] = self._sums[m] + total_NP if m in self._sums else total_NP
        self.windows += batch

    def at(self, m: Modality, scored_BS: Tensor) -> Tensor:
        """The mean at some tokens, [B, S, P]."""
        return (self._sums[m] / self.windows).float()[scored_BS]


class _MaskedErrors:
    """Squared error at masked tokens, of a model and of the training set's mean."""

    def __init__(self, config: ModelConfig, means: _PositionMeans) -> None:
        self._config, self._means = config, means
        self._model = dict.fromkeys(config.modalities, 0.0)
        self._mean = dict.fromkeys(config.modalities, 0.0)
        self._tokens = dict.fromkeys(config.modalities, 0)
        self.clips = 0

    def add(
        self,
        inputs: dict[str, Any],
        predictions: dict[Modality, Tensor],
        scored: dict[Modality, Tensor],
    ) -> None:
        for m, scored_BS in scored.items():
            target = _targets(self._config, m, inputs[m], scored_BS)
            counted = self._counted(inputs["masks"][m], scored_BS)
            self._model[m] += _error(predictions[m].float(), target, counted)
            self._mean[m] += _error(self._means.at(m, scored_BS), target, counted)
            self._tokens[m] += int(counted.sum())
        self.clips += len(scored_BS)

    def _counted(self, mask: TokenMask, scored_BS: Tensor) -> Tensor:
        """Which scored tokens are masked. In inpainting the decoder is shown none of its own."""
        if self._config.objective != "reconstruction":
            return torch.ones_like(scored_BS, dtype=torch.bool)
        tokens = mask.visible.shape[1] + mask.masked.shape[1]
        hidden = scored_BS.new_zeros(len(scored_BS), tokens).scatter(1, mask.masked, 1)
        return hidden.gather(1, scored_BS).bool()

    def of_model(self) -> dict[Modality, float]:
        return {m: total / self._tokens[m] for m, total in self._model.items()}

    def of_means(self) -> dict[Modality, float]:
        return {m: total / self._tokens[m] for m, total in self._mean.items()}


def _error(prediction: Tensor, target: Tensor, counted_BS: Tensor) -> float:
    """Sum over the counted tokens of the mean squared error of their values."""
    error_BS = (prediction - target).square().mean(-1)
    return float(error_BS[counted_BS].sum(dtype=torch.float64))


def _targets(config: ModelConfig, m: Modality, source: Tensor, index_BS: Tensor) -> Tensor:
    patch, norm, layout = patch_of(config, m), config.target_norm, layout_of(source)
    return target_patches(source, index_BS, patch, norm, torch.float32, layout=layout)
