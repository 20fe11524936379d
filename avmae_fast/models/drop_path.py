"""Stochastic depth: which clips skip which branch, drawn by position and never computed.

Source: arXiv:1603.09382; leaving the dropped clips out of the batch of a branch is DINOv2's way
(arXiv:2304.07193). The released code keeps the others unscaled.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avmae_fast.finetune_config import ClassifierConfig

# Streams of random numbers: one for each sequence that has a block of its own.
_STREAM = {"video": 0, "audio": 1, "both": 2}


@dataclass(frozen=True)
class BranchDrop:
    """Who takes part in one branch of one layer.

    clips: those whose update is computed, ascending, [1 to B] int64. scale: factor of the update.
    Where no clip takes part, the first does with factor 0: its weights then have a gradient, of
    zero, as those of every other layer have, which optimisers and DDP take for granted.
    """

    clips: Tensor
    scale: float


@dataclass(frozen=True)
class LayerDrop:
    """Both branches of one layer of one stack."""

    attention: BranchDrop
    mlp: BranchDrop


@dataclass(frozen=True)
class DropPath:
    """The layers of a step, by the name of their sequences; None where all clips take part."""

    layers: Mapping[str, tuple[LayerDrop | None, ...]]

    @classmethod
    def of(
        cls,
        config: ClassifierConfig,
        dropped: Mapping[str, NDArray[np.bool_] | Tensor],
        device: torch.device | str = "cpu",
    ) -> "DropPath":
        """The step that leaves out what `dropped` says, [layers, 2, B] bool of each sequence.

        The masks are read on the host: hand in what `draw_dropped` returns, not a GPU's tensor.
        """
        rates = config.drop_rates()
        kept, scales = [], []
        for mask in dropped.values():
            for layer, rate in zip(np.asarray(mask), rates, strict=True):
                # The rate decides, not the draw: a layer takes one path in every step.
                if rate > 0.0:
                    kept += [np.flatnonzero(~branch) for branch in layer]
                    scales += 2 * [1.0 / (1.0 - rate) if config.drop_path_scaled else 1.0]
        branches = iter(_branches(kept, scales, device))
        layers = {}
        for name in dropped:
            each = (LayerDrop(next(branches), next(branches)) if rate else None for rate in rates)
            layers[name] = tuple(each)
        return cls(layers)


def _branches(
    kept: list[NDArray[np.int64]], scales: list[float], device: torch.device | str
) -> list[BranchDrop]:
    """Every branch of a step, its clips moved to the device in one transfer."""
    clips = [each if len(each) else np.zeros(1, dtype=np.int64) for each in kept]
    factors = [scale if len(each) else 0.0 for each, scale in zip(kept, scales, strict=True)]
    if not clips:
        return []
    moved = torch.from_numpy(np.concatenate(clips)).to(device, non_blocking=True)
    parts = moved.split([len(each) for each in clips])
    return [BranchDrop(part, factor) for part, factor in zip(parts, factors, strict=True)]


def draw_dropped(
    config: ClassifierConfig, batch: int, *, seed: int, step: int, first: int = 0
) -> dict[str, NDArray[np.bool_]]:
    """Which clips skip the attention and the MLP of each layer, [layers, 2, B] for each sequence.

    Each draw depends on the seed, the step, the layer, the branch, the modality and the clip's
    place in the step's batch alone: not on how many processes share the batch.

    Args:
        batch: clips of this process, B.
        seed: of the run, in [0, 2**64).
        step: optimiser step, from 0.
        first: place of this process's first clip in the batch of the step.
    """
    rates = np.array(config.drop_rates())[:, None, None]
    layers = len(rates)
    names: list[str] = [*config.modalities]
    if len(names) > 1 and config.fusion == "early":
        names.append("both")
    dropped = {}
    for name in names:
        bits = np.random.Philox(key=seed, counter=[0, 0, _STREAM[name], step])
        # Clips first, so that the numbers of a clip do not depend on how many there are.
        uniform = np.random.Generator(bits).random((first + batch, layers, 2))[first:]
        dropped[name] = uniform.transpose(1, 2, 0) < rates
    return dropped
