"""The loss of fine-tuning, over one head or several and over the modalities.

Shape letters: B clips, C classes.
Source: the authors' losses: softmax for VGGSound and Epic Kitchens, for AudioSet sigmoids whose
cross-entropies are added up over the classes (PyTorch's mean is C times smaller).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

LossKind = Literal["softmax", "sigmoid"]
_COUNT_EPS = 1e-8


def classification_loss(
    logits: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    kind: LossKind,
    *,
    heads: Mapping[str, int],
    smoothing: float = 0.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Return the mean over modalities and heads of each one's cross-entropy, a scalar.

    Labels are smoothed to `y (1 - s) + s / C` with the C of their head, for sigmoids as well.

    Args:
        logits: [B, C] of each modality, heads side by side: `Prediction.by_modality`.
        labels: [B, C] of each modality, floating: one-hot, many-hot, or mixed (with mixup each
            modality has labels of its own).
        kind: softmax over the classes of a head, or a sigmoid for each class.
        heads: number of classes of each head: `ClassifierConfig.heads`.
        smoothing: s, in [0, 1).
        valid: weight of each clip, [B]; None counts all alike. The mean divides by its sum
            and 1e-8, as released.

    Raises:
        ValueError: labels are missing or of another shape, or smoothing is not in [0, 1).
    """
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"label smoothing = {smoothing!r} is not valid: it must be in [0, 1)")
    parts = []
    for m, of_m in logits.items():
        if m not in labels or labels[m].shape != of_m.shape:
            got = list(labels[m].shape) if m in labels else f"those of {sorted(labels)}"
            raise ValueError(f"labels of {m!r} must have shape {list(of_m.shape)}, got {got}")
        sizes = list(heads.values())
        pairs = zip(of_m.split(sizes, -1), labels[m].split(sizes, -1), strict=True)
        parts += [_head_loss(_at_least_fp32(x), y, kind, smoothing, valid) for x, y in pairs]
    return torch.stack(parts).mean()


def _head_loss(
    logits: Tensor, labels: Tensor, kind: LossKind, smoothing: float, valid: Tensor | None
) -> Tensor:
    labels = labels.to(logits.dtype) * (1.0 - smoothing) + smoothing / labels.shape[-1]
    if kind == "softmax":
        each = F.cross_entropy(logits, labels, reduction="none")
    else:
        each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(-1)
    weight = torch.ones_like(each) if valid is None else valid.to(each)
    return (weight * each).sum() / (weight.sum() + _COUNT_EPS)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
