"""A linear probe: how much of the class a frozen encoder's features hold, in reach of a line."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from avmae_fast.models import Encoder

_MAX_ITERATIONS = 2000


@dataclass(frozen=True)
class Features:
    """x: float32 [n, D]; labels: int64 [n], -1 where unknown."""

    x: NDArray[np.float32]
    labels: NDArray[np.int64]

    def labelled(self) -> "Features":
        known = self.labels >= 0
        return Features(self.x[known], self.labels[known])


@dataclass(frozen=True)
class Probe:
    """Accuracy on held-out clips, one value for each probe seed.

    The seed chooses the windows (time, crop, flip) cut from the training clips, and the clips
    themselves where there are more than are used. Held-out clips have their centred window.

    chance: accuracy of naming the most frequent class of the training clips every time.
    """

    trained: list[float]
    untrained: list[float]
    chance: float
    classes: int
    train_clips: int
    test_clips: int


@torch.no_grad()
def pooled_features(encoder: Encoder, inputs: Mapping[str, Any]) -> NDArray[np.float32]:
    """Mean over all tokens of each modality, video and audio side by side: [B, D]."""
    tokens = Encoder.forward(encoder, inputs.get("video"), inputs.get("audio"))
    return torch.cat([x.float().mean(1) for x in tokens.values()], dim=1).cpu().numpy()


def probe_accuracy(train: Features, test: Features) -> float:
    """Accuracy on `test` of a logistic regression fitted to standardised features of `train`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_MAX_ITERATIONS))
    probe.fit(train.x, train.labels)
    return float(probe.score(test.x, test.labels))


def chance_accuracy(train: Features, test: Features) -> float:
    """Accuracy on `test` of the most frequent class of `train`."""
    return float((test.labels == np.bincount(train.labels).argmax()).mean())
