"""Mixup: shares, partners, and labels that go with them."""

import numpy as np
import torch

from avmae_fast.train.mixup import draw_shares, mix, mix_labels


def test_mix_by_hand() -> None:
    x = torch.tensor([[0.0], [2.0], [10.0]])
    assert mix(x, 0.75).tolist() == [[2.5], [2.0], [7.5]]
    pixels = torch.tensor([[0], [255]], dtype=torch.uint8)
    # 0.3 * 255 = 76.5 and 178.5, rounded to even.
    assert mix(pixels, 0.7).tolist() == [[76], [178]]


def test_labels_go_with_their_modality() -> None:
    labels = torch.eye(3)
    mixed = mix_labels(labels, {"video": 0.75, "audio": 1.0})
    assert mixed["video"].tolist() == [[0.75, 0, 0.25], [0, 1, 0], [0.25, 0, 0.75]]
    assert torch.equal(mixed["audio"], labels)


def test_shares_are_drawn_by_place_and_modality() -> None:
    drawn = [draw_shares(("video", "audio"), 0.5, 3, first) for first in range(0, 8000, 4)]
    assert drawn[5] == draw_shares(("video", "audio"), 0.5, 3, 20)
    assert draw_shares(("audio",), 0.5, 3, 20)["audio"] == drawn[5]["audio"]
    shares = np.array([[d["video"], d["audio"]] for d in drawn])
    # Beta(1/2, 1/2): mean 1/2, variance 1/8; 2000 draws know the mean to 0.008 and the
    # variance, whose fourth moment about the mean is 3/128, to 0.002: five of those each.
    assert np.abs(shares.mean(0) - 0.5).max() < 0.04
    assert np.abs(shares.var(0) - 0.125).max() < 0.01
    assert abs(np.corrcoef(shares.T)[0, 1]) < 5 / np.sqrt(2000)
