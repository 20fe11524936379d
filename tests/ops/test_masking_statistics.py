"""Masks are uniform over what their kind may choose, and independent of one another.

Seeds are fixed, so a test that passes once passes always; 1e-4 leaves 1 chance in 10,000 that
perfect masks would have failed the day it was written, and real faults give far smaller p-values.
"""

from math import comb

import numpy as np
import pytest
from scipy import stats

from avmae_kernels import masking
from avmae_kernels.masking import MaskSpec, sample_masks

P_VALUE = 1e-4


def _masked(spec, draws, seed=0, modality="video", first_key=0):
    """[draws, N] bool."""
    keys = np.arange(first_key, first_key + draws)
    return sample_masks(spec, keys, seed=seed, modality=modality).inverse >= spec.n_visible


def _as_number(masked):
    """Each mask of up to 62 tokens as the number whose bits it is."""
    return masked.astype(np.int64) @ (1 << np.arange(masked.shape[1]))


@pytest.mark.parametrize(
    ("kind", "grid", "ratio", "choices"),
    [
        ("random", (2, 2, 2), 0.25, comb(8, 2)),
        ("random", (2, 2, 2), 0.5, comb(8, 4)),
        ("random", (8,), 0.75, comb(8, 6)),
        ("tube", (2, 2, 3), 0.5, comb(6, 3)),
        ("time", (6, 2), 0.5, comb(6, 3)),
        ("frequency", (2, 7), 0.3, comb(7, 2)),
        ("time_frequency", (4, 4), 0.5, comb(4, 2) ** 2),
    ],
)
def test_every_choice_is_equally_likely(kind, grid, ratio, choices):
    masks = _as_number(_masked(MaskSpec(kind, grid, ratio), 200 * choices))
    _, counts = np.unique(masks, return_counts=True)
    assert len(counts) == choices
    assert stats.chisquare(counts).pvalue > P_VALUE


@pytest.mark.parametrize("ratio", [0.1, 0.7, 0.9])
def test_positions_and_pairs_of_a_whole_grid(ratio):
    """How often each token, and each pair of tokens, is masked over many draws.

    For a uniform choice of M in N the counts of positions scatter in N - 1 directions with
    variance p1 = M(N-M) / N(N-1) a draw, and what the pairs' counts hold beyond the positions'
    scatters in N(N-3)/2 directions with p2 = M(M-1)(N-M)(N-M-1) / N(N-1)(N-2)(N-3).
    """
    draws = 4000
    spec = MaskSpec("random", (62, 8), ratio)
    N, M = spec.n_tokens, spec.n_masked
    masked = _masked(spec, draws).astype(np.float32)

    positions = masked.sum(axis=0)
    p1 = M * (N - M) / (N * (N - 1))
    chi2 = ((positions - draws * M / N) ** 2).sum() / (draws * p1)
    assert stats.chi2.sf(chi2, N - 1) > P_VALUE

    pairs = (masked.T @ masked).astype(np.float64)
    np.fill_diagonal(pairs, 0)
    mean = pairs.sum() / (N * (N - 1))
    of_token = (pairs.sum(axis=1) - mean * (N - 1)) / (N - 2)
    beyond = pairs - mean - of_token[:, None] - of_token[None, :]
    np.fill_diagonal(beyond, 0)
    p2 = M * (M - 1) * (N - M) * (N - M - 1) / (N * (N - 1) * (N - 2) * (N - 3))
    chi2 = (beyond**2).sum() / 2 / (draws * p2)
    dof = N * (N - 3) // 2
    assert stats.chi2.sf(chi2, dof) > P_VALUE
    assert stats.chi2.cdf(chi2, dof) > P_VALUE  # too even is a fault as well


@pytest.mark.parametrize(
    "other",
    [{"modality": "audio"}, {"seed": 1}, {"first_key": 1}, {"first_key": 2**32}],
    ids=["modality", "seed", "next-key", "far-key"],
)
def test_masks_are_independent(other):
    """Of one key's modalities, of seeds, and of keys: no pair of masks is more common."""
    spec, draws = MaskSpec("random", (5,), 0.4), 20_000
    one, two = _as_number(_masked(spec, draws)), _as_number(_masked(spec, draws, **other))
    _, counts = np.unique(one * 32 + two, return_counts=True)
    assert len(counts) == comb(5, 2) ** 2
    assert stats.chisquare(counts).pvalue > P_VALUE


@pytest.mark.skipif(
    masking.implementation() is masking.masking_reference,
    reason="NumPy takes minutes for so many block masks; csrc/ is not built here",
)
@pytest.mark.parametrize(
    ("grid", "ratio"),
    [((8, 14, 14), 0.9), ((8, 14, 14), 0.5), ((62, 8), 0.7), ((62, 8), 0.2), ((14, 14), 0.75)],
)
def test_block_masks_favour_no_place_by_much(grid, ratio):
    """Their docstring says 0.03; sampling adds 0.0025 a standard deviation, five are allowed."""
    spec, rounds, draws = MaskSpec("block", grid, ratio), 5, 8000
    rate = sum(_masked(spec, draws, first_key=draws * i).mean(axis=0) for i in range(rounds))
    rate = rate / rounds
    assert np.abs(rate - spec.n_masked / spec.n_tokens).max() < 0.03 + 0.0125
