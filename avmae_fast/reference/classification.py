"""Labels and losses of fine-tuning, as the authors' code has them.

Shape letters: B clips, C classes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

_COUNT_EPS = 1e-8


def classification_loss(
    logits: Tensor, labels: Tensor, kind: str, smoothing: float = 0.0, valid: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the smoothed labels `y (1 - s) + s / C`, averaged over the clips.

    `softmax`: `-sum_c y log softmax`. `sigmoid`: the binary cross-entropies, added up over the
    classes. The mean divides by the sum of `valid` and 1e-8.

    Args:
        logits, labels: [B, C]; labels are one-hot, many-hot or mixed.
        valid: weight of each clip, [B].
    """
    labels = labels * (1.0 - smoothing) + smoothing / labels.shape[-1]
    if kind == "softmax":
        each = -(labels * F.log_softmax(logits, dim=-1)).sum(-1)
    else:
        yes, no = F.logsigmoid(logits), F.logsigmoid(-logits)
        each = -(labels * yes + (1.0 - labels) * no).sum(-1)
    weight = torch.ones_like(each) if valid is None else valid.to(each)
    return (weight * each).sum() / (weight.sum() + _COUNT_EPS)


def mean_loss(
    by_modality: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    kind: str,
    smoothing: float = 0.0,
    valid: Tensor | None = None,
) -> Tensor:
    """The mean over the modalities of each one's loss against its own labels."""
    losses = [
        classification_loss(logits, labels[m], kind, smoothing, valid)
        for m, logits in by_modality.items()
    ]
    return torch.stack(losses).mean()


def mix(x: Tensor, weight: float) -> Tensor:
    """Mixup with the batch in reverse: `w x[i] + (1 - w) x[B - 1 - i]`."""
    return weight * x + (1.0 - weight) * x.flip(0)
