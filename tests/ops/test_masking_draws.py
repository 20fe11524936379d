"""Permutations and keyed draws: what they promise, and what they refuse."""

import numpy as np
import pytest
from scipy import stats

from avmae_kernels.masking import keyed_integers, keyed_uniform, permute, philox

KEYS = np.arange(5)
# Seeds are fixed, so a test that passes once passes always; 1e-4 leaves 1 chance in 10,000 that a
# perfect generator would have failed the day it was written, and real faults give far less.
P_VALUE = 1e-4


def _p_of_equal_counts(counts):
    return stats.chisquare(np.ravel(counts)).pvalue


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, want):
    """The vectors published with Random123 for philox4x32-10."""
    words = philox(np.array([counter], dtype=np.uint32), np.array([key], dtype=np.uint32))
    assert words.dtype == np.uint32
    assert words.tolist() == [want]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 1024, 1025, 30_000])
def test_permute_is_a_bijection(n):
    for key in (0, 1, -7):
        np.testing.assert_array_equal(np.sort(permute(np.arange(n), n, key=key)), np.arange(n))


def test_permute_one_index_or_many():
    indices = np.arange(12).reshape(3, 4)
    images = permute(indices, 1000, key=4, seed=2)
    assert images.shape == (3, 4) and images.dtype == np.int64
    np.testing.assert_array_equal(permute(indices.T, 1000, key=4, seed=2), images.T)
    for index, image in zip(indices.flat, images.flat, strict=True):
        one = permute(int(index), 1000, key=4, seed=2)
        assert type(one) is int and one == image
    assert permute(np.empty(0, dtype=np.int64), 5, key=0).shape == (0,)


@pytest.mark.parametrize("n", [2**40, 2**40 - 1, 3 * 2**38 + 1])
def test_permute_huge(n):
    ends = np.concatenate([np.arange(5000), n - 1 - np.arange(5000)])
    images = permute(ends, n, key=9)
    assert images.min() >= 0 and images.max() < n
    assert len(np.unique(images)) == len(ends)
    counts = np.bincount(images // (n // 32), minlength=33)[:32]
    assert _p_of_equal_counts(counts) > P_VALUE


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_permute_gives_every_order_of_few_numbers_equally_often(n):
    indices = np.arange(n)
    orders = [tuple(permute(indices, n, key=key)) for key in range(20 * int(np.prod(indices + 1)))]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == np.prod(indices + 1)
    assert _p_of_equal_counts(counts) > P_VALUE


@pytest.mark.parametrize("n", [30_011, 65_536])
def test_permute_has_no_structure(n):
    """Where an index goes, and how far apart neighbours land, say nothing about it."""
    indices = np.arange(n)
    images = permute(indices, n, key=123)
    table = np.histogram2d(indices, images, bins=16)[0]
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / n
    chi2 = ((table - expected) ** 2 / expected).sum()
    assert P_VALUE < stats.chi2.sf(chi2, 15 * 15) < 1 - P_VALUE
    steps = (np.diff(images) % n) * 64 // n
    assert _p_of_equal_counts(np.bincount(steps, minlength=64)) > P_VALUE
    assert (images == indices).sum() < 10  # fixed points: Poisson with mean 1


def test_permute_changes_with_key_and_seed():
    orders = {
        permute(np.arange(100), 100, key=key, seed=seed).tobytes()
        for key in (0, 1, -1, 2**32, 2**63 - 1)
        for seed in (0, 1, 2**32, 2**64 - 1)
    }
    assert len(orders) == 20


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_draws_do_not_depend_on_count_or_batch(count):
    every = keyed_uniform(1, KEYS, 2, 8)
    np.testing.assert_array_equal(keyed_uniform(1, KEYS, 2, count), every[:, :count])
    np.testing.assert_array_equal(keyed_uniform(1, KEYS[3:4], 2, count), every[3:4, :count])
    every = keyed_integers(1, KEYS, 2, 8, 1000)
    np.testing.assert_array_equal(keyed_integers(1, KEYS, 2, count, 1000), every[:, :count])
    np.testing.assert_array_equal(keyed_integers(1, KEYS[::-1], 2, 8, 1000), every[::-1])


def test_streams_seeds_and_keys_are_different_numbers():
    draws = [
        keyed_uniform(seed, np.array([key]), stream, 2).tobytes()
        for seed in (0, 1, 2**63)
        for key in (0, 1, -1, 2**32)
        for stream in (0, 1, 2**16 - 1)
    ]
    assert len(set(draws)) == len(draws)
    assert keyed_uniform(0, KEYS, 0, 0).shape == (5, 0)


def test_uniform_is_uniform():
    values = keyed_uniform(0, np.arange(20_000), 0, 3)
    assert values.dtype == np.float64 and values.min() >= 0 and values.max() < 1
    for column in values.T:
        assert stats.kstest(column, "uniform").pvalue > P_VALUE
    pairs = np.histogram2d(values[:, 0], values[:, 1], bins=16, range=[[0, 1], [0, 1]])[0]
    assert _p_of_equal_counts(pairs) > P_VALUE
    # 53 bits: the last ones are random too.
    last_bits = (values * 2**53).astype(np.int64) % 16
    assert _p_of_equal_counts(np.bincount(last_bits.ravel(), minlength=16)) > P_VALUE


@pytest.mark.parametrize(("high", "modulus"), [(7, 7), (1000, 1000), (3 * 2**30, 3), (2**32, 64)])
def test_integers_are_uniform(high, modulus):
    """3 * 2**30 would show, as every third number drawn twice, a missing rejection."""
    values = keyed_integers(0, np.arange(10_000), 0, 3, high)
    assert values.dtype == np.int64 and values.min() >= 0 and values.max() < high
    assert _p_of_equal_counts(np.bincount(values.ravel() % modulus, minlength=modulus)) > P_VALUE


def test_integers_with_a_bound_for_each_key():
    highs = np.array([1, 2, 3, 2**31, 2**32])
    values = keyed_integers(0, KEYS, 0, 50, highs)
    assert (values >= 0).all() and (values < highs[:, None]).all()
    for row, high in enumerate(highs):
        alone = keyed_integers(0, KEYS[row : row + 1], 0, 50, int(high))
        np.testing.assert_array_equal(alone[0], values[row])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: permute(0, 0, key=0), "permute wants n as a whole number from 1 to 1099511627776"),
        (lambda: permute(0, 2**40 + 1, key=0), "permute wants n"),
        (
            lambda: permute(5, 5, key=0),
            "permute wants indices as a whole number from 0 to 4, got 5",
        ),
        (lambda: permute(np.array([0, 5]), 5, key=0), r"wants indices in \[0, 5\), got 0 to 5"),
        (lambda: permute(np.array([-1]), 5, key=0), r"wants indices in \[0, 5\), got -1 to -1"),
        (lambda: permute(np.zeros(2), 5, key=0), r"wants indices as int64, got float64 \[2\]"),
        (lambda: permute(1.5, 5, key=0), "wants indices as a whole number"),
        (lambda: permute(0, 5, key=2**63), "permute wants key"),
        (lambda: permute(0, 5, key=0, seed=-1), "permute wants seed"),
        (lambda: keyed_uniform(-1, KEYS, 0, 1), "keyed_uniform wants seed"),
        (
            lambda: keyed_uniform(0, KEYS, 2**16, 1),
            "wants stream as a whole number from 0 to 65535",
        ),
        (lambda: keyed_uniform(0, KEYS, 0, -1), "keyed_uniform wants count"),
        (
            lambda: keyed_uniform(0, KEYS.astype(float), 0, 1),
            r"wants keys as int64 \[B\], got float",
        ),
        (lambda: keyed_integers(0, KEYS, 0, 1, 0), "keyed_integers wants high .* 1 to 4294967296"),
        (lambda: keyed_integers(0, KEYS, 0, 1, KEYS), "wants high from 1 to 2.* got 0 to 4"),
        (
            lambda: keyed_integers(0, KEYS, 0, 1, np.ones(2, int)),
            r"like keys \[5\], got int64 \[2\]",
        ),
        (lambda: keyed_integers(0, KEYS, 0, 1, 2.5), "wants high as an int or .* got float 2.5"),
        (
            lambda: philox(np.zeros((2, 3), np.uint32), np.zeros((2, 2), np.uint32)),
            r"philox wants counters as uint32 \[M, 4\], got uint32 \[2, 3\]",
        ),
        (
            lambda: philox(np.zeros((2, 4), np.uint32), np.zeros((1, 2), np.uint32)),
            r"philox wants keys as uint32 \[M, 2\], got uint32 \[1, 2\]",
        ),
        (
            lambda: philox(np.zeros((2, 4), np.int64), np.zeros((2, 2), np.uint32)),
            "philox wants counters .* got int64",
        ),
    ],
)
def test_rejects(call, match):
    with pytest.raises(ValueError, match=match):
        call()
