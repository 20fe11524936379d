"""`avmae_kernels._C` against its definition in NumPy, bit for bit."""

import importlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmae_kernels import masking_reference as reference
from avmae_kernels.masking import KIND_AXES, MaskSpec

if os.environ.get("AVMAE_CSRC") == "1":
    compiled = importlib.import_module("avmae_kernels._C")
else:
    compiled = pytest.importorskip("avmae_kernels._C", reason="csrc/ is not built here")

SEEDS = st.integers(0, 2**64 - 1)
STREAMS = st.integers(0, 2**16 - 1)
KEY = st.integers(-(2**63), 2**63 - 1)
KEYS = st.lists(KEY, max_size=5).map(lambda keys: np.array(keys, dtype=np.int64))
MOST = settings(max_examples=100, deadline=None)


@st.composite
def specs(draw):
    kind = draw(st.sampled_from(sorted(KIND_AXES)))
    axes = draw(st.sampled_from(KIND_AXES[kind]))
    grid = draw(st.tuples(*[st.integers(1, 40 if axes < 3 else 9)] * axes))
    return MaskSpec(kind, grid, draw(st.floats(0, 1, exclude_max=True)))


def _assert_identical(got, want):
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_array_equal(one, other)


@MOST
@given(specs(), KEYS, SEEDS, STREAMS)
def test_masks(spec, keys, seed, stream):
    arguments = (spec.kind, spec._grid3, *spec._masked_units, keys, seed, stream)
    _assert_identical(compiled.sample_masks(*arguments), reference.sample_masks(*arguments))


@pytest.mark.parametrize("kind", ["random", "tube", "block", "time"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 0.999])
def test_masks_of_a_whole_video(kind, ratio):
    """0.999 is where a block mask runs out of boxes and fills up with single tokens."""
    spec = MaskSpec(kind, (8, 14, 14), ratio)
    arguments = (kind, spec._grid3, *spec._masked_units, np.arange(8), 3, 0)
    _assert_identical(compiled.sample_masks(*arguments), reference.sample_masks(*arguments))


@MOST
@given(st.integers(1, 2**40) | st.integers(1, 50), st.data(), SEEDS, KEY)
def test_permute(n, data, seed, key):
    indices = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), dtype=np.int64)
    _assert_identical(
        [compiled.permute(indices, n, seed, key)], [reference.permute(indices, n, seed, key)]
    )


@MOST
@given(SEEDS, KEYS, STREAMS, st.integers(0, 9), st.data())
def test_draws(seed, keys, stream, count, data):
    _assert_identical(
        [compiled.keyed_uniform(seed, keys, stream, count)],
        [reference.keyed_uniform(seed, keys, stream, count)],
    )
    bound = st.integers(1, 2**32) | st.sampled_from([1, 2**31 + 1, 3 * 2**30, 2**32 - 1, 2**32])
    high = st.lists(bound, min_size=len(keys), max_size=len(keys))
    highs = np.array(data.draw(high), dtype=np.int64)
    _assert_identical(
        [compiled.keyed_integers(seed, keys, stream, count, highs)],
        [reference.keyed_integers(seed, keys, stream, count, highs)],
    )


def test_philox():
    words = np.random.default_rng(0).integers(0, 2**32, (1000, 6), dtype=np.uint32)
    counters, keys = words[:, :4].copy(), words[:, 4:].copy()
    _assert_identical([compiled.philox(counters, keys)], [reference.philox(counters, keys)])


@pytest.mark.parametrize(
    ("kind", "grid", "masked_units", "masked_columns", "match"),
    [
        ("spiral", (8, 1, 1), 1, 0, "kind: unknown"),
        ("random", (2**20, 2**20, 1), 1, 0, "grid: "),
        ("random", (0, 1, 1), 0, 0, "grid: "),
        ("random", (2, 2, 2), 9, 0, "masked counts: "),
        ("time", (2, 2, 2), 3, 0, "masked counts: "),
        ("tube", (8, 2, 2), 5, 0, "masked counts: "),
        ("random", (2, 2, 2), -1, 0, "masked counts: "),
        ("time_frequency", (4, 3, 1), 1, 4, "masked counts: "),
    ],
)
def test_what_would_write_out_of_bounds_is_refused(kind, grid, masked_units, masked_columns, match):
    with pytest.raises(ValueError, match=match):
        compiled.sample_masks(kind, grid, masked_units, masked_columns, np.arange(2), 0, 0)


def test_permute_refuses_an_index_that_would_walk_for_ever():
    with pytest.raises(ValueError, match="indices: "):
        compiled.permute(np.array([5]), 5, 0, 0)
