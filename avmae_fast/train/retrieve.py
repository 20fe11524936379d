"""What embedded clips are good for as they are: finding the other modality, and nearest neighbours.

Nothing in masked pretraining asks that the sound of a clip and its pictures come out near each
other, so recall may be near chance; it is a measurement, not a promise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avmae_fast.config import ConfigError

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Recall:
    """Share of clips whose own counterpart is among the k nearest, by "A->V 5" and so on.

    chance: that of a random order, by k.
    """

    clips: int
    recall: dict[str, float]
    chance: dict[int, float]


def recall_at(features: Arrays, ks: Sequence[int]) -> Recall:
    """Find each clip's pictures by its sound, and the other way round, by cosine.

    Counterparts as near as another clip's do not count as found.

    Raises:
        ConfigError: features A and V are not both there, or fewer than two clips have both.
    """
    both = _valid(features, "A") & _valid(features, "V")
    if both.sum() < 2:
        raise ConfigError(f"retrieval needs two clips with both features, there are {both.sum()}")
    sound, pictures = _unit(features["A"][both]), _unit(features["V"][both])
    if sound.shape != pictures.shape:
        raise ConfigError(f"features A and V differ in shape: {sound.shape}, {pictures.shape}")
    near = sound @ pictures.T
    recall: dict[str, float] = {}
    for name, scores in (("A->V", near), ("V->A", near.T)):
        ranks = (scores >= np.diag(scores)[:, None]).sum(1) - 1
        recall |= {f"{name} {k}": float((ranks < k).mean()) for k in ks}
    clips = len(near)
    return Recall(clips, recall, {k: min(1.0, k / clips) for k in ks})


def knn_accuracy(train: Arrays, test: Arrays, kind: str, neighbours: int) -> tuple[float, int]:
    """Accuracy of a vote of the nearest labelled clips of `train`, by cosine; and over how many.

    Raises:
        ConfigError: too few clips have the feature and a label.
    """
    from sklearn.neighbors import KNeighborsClassifier

    known = [_valid(x, kind) & (x["labels"] >= 0) for x in (train, test)]
    if known[0].sum() < neighbours or not known[1].any():
        counts = [int(x.sum()) for x in known]
        raise ConfigError(
            f"{neighbours} neighbours need as many clips with {kind} and a label, and one to "
            f"judge: there are {counts[0]} and {counts[1]}"
        )
    vote = KNeighborsClassifier(neighbours, metric="cosine")
    vote.fit(train[kind][known[0]], train["labels"][known[0]])
    return float(vote.score(test[kind][known[1]], test["labels"][known[1]])), int(known[1].sum())


def _valid(features: Arrays, kind: str) -> NDArray[np.bool_]:
    if kind not in features:
        found = sorted(name for name in features if name in ("A", "V", "AV"))
        raise ConfigError(f"feature {kind} is not there, but {found}: embed it first")
    if features[kind].ndim != 2:
        raise ConfigError(f"feature {kind} is of single tokens: embed pooled features")
    return features[f"{kind}_valid"].astype(bool)


def _unit(x: NDArray[Any]) -> NDArray[np.float64]:
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)
