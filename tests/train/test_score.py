"""Metrics against scikit-learn and against numbers worked out by hand."""

import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from avmae_fast.train.score import ActionScores, HeadScores, score_heads


def _one(logits: list, targets: list, loss: str = "softmax") -> HeadScores:
    logits, targets = np.array(logits, float), np.array(targets, float)
    scores = score_heads(logits, targets, {"label": logits.shape[1]}, loss)["label"]
    assert isinstance(scores, HeadScores)
    return scores


def test_average_precision_by_hand() -> None:
    """Class 0 has its two clips at ranks 1 and 3: (1/1 + 2/3) / 2. Class 2 has none."""
    logits = [[4, 0, 0], [3, 5, 0], [2, 1, 0], [1, 9, 0]]
    targets = [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]]
    scores = _one(logits, targets, "sigmoid")
    assert scores.ap[0] == pytest.approx((1 + 2 / 3) / 2)
    assert scores.ap[1] == 1.0 and math.isnan(scores.ap[2]) and math.isnan(scores.auc[2])
    assert scores.mean_ap == pytest.approx((5 / 6 + 1) / 2)  # the class without clips is left out
    assert scores.auc[0] == 0.75 and scores.auc[1] == 1.0
    # d' = sqrt(2) * quantile(0.875)
    assert scores.d_prime == pytest.approx(math.sqrt(2) * norm.ppf(0.875))
    assert scores.top1 == 1.0 and scores.top5 is None
    assert scores.recall[:2].tolist() == [1.0, 1.0] and math.isnan(scores.recall[2])


def test_agrees_with_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(200, 12))
    targets = (generator.uniform(size=(200, 12)) < 0.2).astype(float)
    scores = _one(logits, targets, "sigmoid")
    assert scores.mean_ap == pytest.approx(average_precision_score(targets, logits))
    assert scores.mean_auc == pytest.approx(roc_auc_score(targets, logits))
    assert scores.top1 is None  # clips have several classes


def test_top_k_by_hand() -> None:
    logits = np.tile(np.arange(8.0), (8, 1))  # class 7 first, then 6, ...
    scores = _one(logits, np.eye(8))
    assert scores.top1 == 1 / 8 and scores.top5 == 5 / 8
    assert scores.d_prime == pytest.approx(0.0)  # all clips look alike: area 1/2
    assert scores.positives.tolist() == [1] * 8


def test_verbs_nouns_and_actions_by_hand() -> None:
    """An action is right if both are; its score is the product of the two probabilities."""
    heads = {"verb": 2, "noun": 3}
    logits = np.log([[0.6, 0.4, 0.5, 0.3, 0.2], [0.9, 0.1, 0.2, 0.3, 0.5]])
    right = np.array([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]], float)
    scores = score_heads(logits, right, heads, "softmax")
    assert scores["verb"].summary()["top1"] == 0.5 and scores["noun"].summary()["top1"] == 1.0
    action = scores["action"]
    assert isinstance(action, ActionScores)
    # Clip 0: 0.4 * 0.5 = 0.20 comes after 0.6 * 0.5 = 0.30 alone.
    assert (action.top1, action.top5) == (0.5, 1.0)


def test_a_constant_output_is_no_success() -> None:
    scores = score_heads(np.zeros((4, 6)), np.tile([0, 1, 1, 0, 0, 0], (4, 1)),
                         {"verb": 2, "noun": 4}, "softmax")  # fmt: skip
    assert scores["action"].summary() == {"top1": 0.0, "top5": 0.0}


@pytest.mark.parametrize(
    ("logits", "message"),
    [(np.zeros((0, 3)), "N > 0"), (np.full((1, 3), np.nan), "finite logits; those of rows .0.")],
)
def test_rejects(logits: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_heads(logits, np.zeros_like(logits), {"label": 3}, "softmax")
