"""How good a classifier's logits are: accuracy, average precision, area under the ROC curve, d'.

Source: scikit-learn for all that is counted; d' = sqrt(2) times the normal quantile of the mean
area, as the authors' evaluation has it. Classes no clip belongs to have no average precision, and
those that no clip or every clip belongs to no area; means leave them out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from avmae_fast.finetune_config import Loss

ACTION = "action"
_TOP = 5

Array = NDArray[np.floating]


@dataclass(frozen=True)
class HeadScores:
    """Scores of one head over N clips and C classes.

    top1, top5: share of clips whose class is the first, or among the first five; None unless
        every clip has exactly one class and there are more than one or five.
    positives: clips of each class, [C]. ap, auc: of each class, [C], NaN where there is none.
    recall: share of the clips of each class that are told right, [C]; NaN likewise.
    """

    clips: int
    top1: float | None
    top5: float | None
    positives: NDArray[np.int64]
    ap: Array
    auc: Array
    recall: Array

    @property
    def mean_ap(self) -> float | None:
        """Macro average over the classes that have a clip."""
        return _mean(self.ap)

    @property
    def mean_auc(self) -> float | None:
        return _mean(self.auc)

    @property
    def d_prime(self) -> float | None:
        """None where it is infinite."""
        area = self.mean_auc
        if area is None or not 0.0 < area < 1.0:
            return None
        return math.sqrt(2) * NormalDist().inv_cdf(area)

    def summary(self) -> dict[str, float]:
        """What there is of top1, top5, mAP, AUC and d_prime."""
        every = {
            "top1": self.top1,
            "top5": self.top5,
            "mAP": self.mean_ap,
            "AUC": self.mean_auc,
            "d_prime": self.d_prime,
        }
        return {name: value for name, value in every.items() if value is not None}


@dataclass(frozen=True)
class ActionScores:
    """All heads right at once, the score of a combination being the product of probabilities."""

    clips: int
    top1: float
    top5: float

    def summary(self) -> dict[str, float]:
        return {"top1": self.top1, "top5": self.top5}


def score_heads(
    logits: Array, targets: Array, heads: Mapping[str, int], loss: Loss
) -> dict[str, HeadScores | ActionScores]:
    """The scores of each head and, with two or more of them and a softmax, of "action".

    Args:
        logits: [N, C], heads side by side, finite.
        targets: [N, C], 0 or 1.

    Raises:
        ValueError: shapes differ, there is no clip, or a logit is not finite.
    """
    if logits.shape != targets.shape or logits.ndim != 2 or not len(logits):
        got = f"{list(logits.shape)} and {list(targets.shape)}"
        raise ValueError(f"score_heads wants logits and targets [N, C] with N > 0, got {got}")
    if not np.isfinite(logits).all():
        rows = np.flatnonzero(~np.isfinite(logits).all(1))
        raise ValueError(f"score_heads wants finite logits; those of rows {rows[:5]} are not")
    cuts = np.cumsum(list(heads.values()))[:-1]
    pairs = list(zip(np.split(logits, cuts, 1), np.split(targets, cuts, 1), strict=True))
    probabilities = [_probabilities(x, loss) for x, _ in pairs]
    scores: dict[str, HeadScores | ActionScores] = {
        head: _score(p, y) for head, p, (_, y) in zip(heads, probabilities, pairs, strict=True)
    }
    single = all((y.sum(1) == 1).all() for _, y in pairs)
    if len(heads) > 1 and loss == "softmax" and single:
        scores[ACTION] = _score_action(probabilities, [y.argmax(1) for _, y in pairs])
    return scores


def _probabilities(logits: Array, loss: Loss) -> Array:
    """In float64. A sigmoid leaves the order of a class's clips as it is, so the logits will do."""
    logits = logits.astype(np.float64)
    if loss == "sigmoid":
        return logits
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def _score(scores: Array, targets: Array) -> HeadScores:
    from sklearn.metrics import average_precision_score, roc_auc_score

    clips, classes = targets.shape
    positives = targets.sum(0).astype(np.int64)
    ap, auc, recall = (np.full(classes, np.nan) for _ in range(3))
    first = scores.argmax(1)
    for c in np.flatnonzero(positives):
        ap[c] = average_precision_score(targets[:, c], scores[:, c])
        if positives[c] < clips:
            auc[c] = roc_auc_score(targets[:, c], scores[:, c])
        recall[c] = (first[targets[:, c] > 0] == c).mean()
    single = bool((targets.sum(1) == 1).all())
    labels = targets.argmax(1)
    top1, top5 = (_top(scores, labels, k) if single else None for k in (1, _TOP))
    return HeadScores(clips, top1, top5, positives, ap, auc, recall)


def _top(scores: Array, labels: NDArray[np.int64], k: int) -> float | None:
    """None where every class is among the first k."""
    from sklearn.metrics import accuracy_score, top_k_accuracy_score

    classes = scores.shape[1]
    if k >= classes:
        return None
    if k == 1:
        return float(accuracy_score(labels, scores.argmax(1)))
    return float(top_k_accuracy_score(labels, scores, k=k, labels=np.arange(classes)))


def _score_action(probabilities: list[Array], labels: list[NDArray[np.int64]]) -> ActionScores:
    """Rank of the right combination among all of them, clip by clip."""
    ranks = []
    for row in range(len(labels[0])):
        joint = np.ones(())
        for p in probabilities:
            joint = np.multiply.outer(joint, p[row])
        right = joint[tuple(of_head[row] for of_head in labels)]
        # Of equal combinations the right one comes last: a constant output is no success.
        ranks.append(int((joint >= right).sum()) - 1)
    top = np.array(ranks)
    return ActionScores(len(ranks), float((top < 1).mean()), float((top < _TOP).mean()))


def _mean(values: Array) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
