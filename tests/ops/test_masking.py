import logging
import sys
import threading
import time

import numpy as np
import pytest

from avmae_kernels import masking
from avmae_kernels._compiled import compiled
from avmae_kernels.masking import MaskSpec, permute, sample_masks

VIDEO, AUDIO = (8, 14, 14), (62, 8)

# One of each kind on the paper's grids and on small odd ones, with both conventions of the count.
SPECS = [
    MaskSpec("random", VIDEO, 0.9),
    MaskSpec("random", AUDIO, 0.7, "kept"),
    MaskSpec("random", (7,), 0.5),
    MaskSpec("tube", VIDEO, 0.9),
    MaskSpec("tube", (3, 5, 2), 0.4, "kept"),
    MaskSpec("block", VIDEO, 0.9),
    MaskSpec("block", AUDIO, 0.99),
    MaskSpec("block", (5,), 0.5),
    MaskSpec("time", VIDEO, 0.5),
    MaskSpec("time", AUDIO, 0.7),
    MaskSpec("frequency", AUDIO, 0.7),
    MaskSpec("time_frequency", AUDIO, 0.3),
]
KEYS = np.array([0, 1, 2, -1, 2**63 - 1, -(2**63), 31 * 2**32], dtype=np.int64)

by_spec = pytest.mark.parametrize("spec", SPECS, ids="{0.kind}-{0.grid}-{0.ratio}".format)


def _is_masked(masks, spec):
    """[B, *grid] bool."""
    return (masks.inverse >= spec.n_visible).reshape(-1, *spec.grid)


@pytest.mark.parametrize(
    ("kind", "grid", "ratio", "count", "n_visible"),
    [
        ("random", VIDEO, 0.9, "masked", 157),
        ("random", VIDEO, 0.9, "kept", 156),
        ("random", AUDIO, 0.7, "masked", 149),
        ("random", AUDIO, 0.7, "kept", 148),
        ("random", (400,), 0.5, "masked", 200),
        ("random", (100,), 0.57, "masked", 44),  # 0.57 * 100 is just below 57
        ("random", (1000,), 0.001, "masked", 999),
        ("random", (7,), 0.9, "masked", 1),
        ("random", (13,), 0.33, "masked", 9),
        ("random", AUDIO, 0, "masked", 496),
        ("random", (1,), 0.999, "masked", 1),
        ("block", VIDEO, 0.9, "masked", 157),
        ("tube", VIDEO, 0.9, "masked", 8 * 20),
        ("tube", VIDEO, 0.9, "kept", 8 * 19),
        ("time", AUDIO, 0.7, "masked", 19 * 8),
        ("time", VIDEO, 0.5, "masked", 4 * 196),
        ("frequency", AUDIO, 0.7, "masked", 62 * 3),
        ("time_frequency", AUDIO, 0.3, "masked", (62 - 18) * (8 - 2)),
        ("time_frequency", AUDIO, 0.3, "kept", 43 * 5),
    ],
)
def test_counts(kind, grid, ratio, count, n_visible):
    spec = MaskSpec(kind, grid, ratio, count)
    assert spec.n_visible == n_visible
    assert spec.n_masked == spec.n_tokens - n_visible
    assert sample_masks(spec, KEYS, seed=0, modality="video").visible.shape == (7, n_visible)


@by_spec
def test_lists_are_ascending_and_inverse_finds_every_token(spec):
    masks = sample_masks(spec, KEYS, seed=3, modality="audio")
    assert masks.visible.shape == (7, spec.n_visible)
    assert masks.masked.shape == (7, spec.n_masked)
    for array in (masks.visible, masks.masked, masks.inverse):
        assert array.dtype == np.int32 and array.flags.c_contiguous and array.flags.writeable
    assert (np.diff(masks.visible) > 0).all() and (np.diff(masks.masked) > 0).all()
    both = np.concatenate([masks.visible, masks.masked], axis=1)
    found = np.take_along_axis(both, masks.inverse, axis=1)
    np.testing.assert_array_equal(found, np.tile(np.arange(spec.n_tokens), (7, 1)))


def test_tube_masks_the_same_places_in_every_frame():
    spec = MaskSpec("tube", VIDEO, 0.9)
    masked = _is_masked(sample_masks(spec, KEYS, seed=0, modality="video"), spec)
    assert (masked == masked[:, :1]).all()
    assert (masked[:, 0].sum(axis=(1, 2)) == 176).all()


@pytest.mark.parametrize("grid", [VIDEO, AUDIO])
def test_time_masks_whole_rows(grid):
    spec = MaskSpec("time", grid, 0.5)
    masked = _is_masked(sample_masks(spec, KEYS, seed=0, modality="audio"), spec)
    masked = masked.reshape(len(KEYS), grid[0], -1)
    assert (masked == masked[:, :, :1]).all()
    assert (masked[:, :, 0].sum(axis=1) == grid[0] // 2).all()


def test_frequency_masks_whole_columns():
    spec = MaskSpec("frequency", AUDIO, 0.7)
    masked = _is_masked(sample_masks(spec, KEYS, seed=0, modality="audio"), spec)
    assert (masked == masked[:, :1]).all()
    assert (masked[:, 0].sum(axis=1) == 5).all()


def test_time_frequency_leaves_a_product_of_rows_and_columns():
    spec = MaskSpec("time_frequency", AUDIO, 0.3)
    visible = ~_is_masked(sample_masks(spec, KEYS, seed=0, modality="audio"), spec)
    rows, columns = visible.any(axis=2), visible.any(axis=1)
    np.testing.assert_array_equal(visible, rows[:, :, None] & columns[:, None, :])
    assert (rows.sum(axis=1) == 44).all() and (columns.sum(axis=1) == 6).all()


@pytest.mark.parametrize("grid", [VIDEO, AUDIO])
def test_block_masks_lie_together(grid):
    """Neighbours agree far more often than the 1 - 2 * 0.5 * 0.5 of independent tokens."""
    spec = MaskSpec("block", grid, 0.5)
    masked = _is_masked(sample_masks(spec, np.arange(50), seed=0, modality="audio"), spec)
    for axis in range(1, masked.ndim):
        agree = np.diff(masked.astype(int), axis=axis) == 0
        assert agree.mean() > 0.75


@by_spec
def test_a_mask_is_a_function_of_its_key_alone(spec):
    batch = sample_masks(spec, KEYS, seed=5, modality="video")
    reversed_batch = sample_masks(spec, KEYS[::-1], seed=5, modality="video")
    for row, key in enumerate(KEYS):
        alone = sample_masks(spec, np.array([key]), seed=5, modality="video")
        for name in ("visible", "masked", "inverse"):
            want = getattr(batch, name)[row]
            np.testing.assert_array_equal(getattr(alone, name)[0], want)
            np.testing.assert_array_equal(getattr(reversed_batch, name)[-1 - row], want)


def test_key_seed_and_modality_each_change_the_mask():
    spec = SPECS[0]
    draws = [(key, seed, "video") for key in KEYS for seed in (0, 1, 2**32, 2**63, 2**64 - 1)]
    draws += [(key, seed, "audio") for key, seed, _ in draws]
    masks = {
        sample_masks(spec, np.array([key]), seed=seed, modality=modality).visible.tobytes()
        for key, seed, modality in draws
    }
    assert len(masks) == len(draws)


def test_results_are_pinned():
    """A seed means the same masks and orders in every version, or resumed runs would change."""
    spec = MaskSpec("random", (4, 4), 0.75)
    masks = sample_masks(spec, np.array([0, 1]), seed=0, modality="video")
    assert masks.visible.tolist() == [[5, 9, 11, 12], [0, 6, 8, 13]]
    block = sample_masks(MaskSpec("block", (4, 4), 0.75), np.array([0]), seed=0, modality="audio")
    assert block.visible.tolist() == [[2, 3, 7, 11]]
    assert permute(np.arange(10), 10, key=1).tolist() == [5, 8, 7, 3, 2, 9, 1, 4, 0, 6]


def test_empty_batch():
    masks = sample_masks(SPECS[0], np.empty(0, dtype=np.int64), seed=0, modality="video")
    assert (masks.visible.shape, masks.masked.shape) == ((0, 157), (0, 1411))
    assert masks.inverse.shape == (0, 1568)


def test_threads_do_not_disturb_each_other():
    keys = np.arange(100)
    want = [sample_masks(spec, keys, seed=1, modality="video").inverse for spec in SPECS]
    got = [[] for _ in range(4)]

    def draw(into):
        into += [sample_masks(spec, keys, seed=1, modality="video").inverse for spec in SPECS]

    threads = [threading.Thread(target=draw, args=(into,)) for into in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for inverses in got:
        for inverse, expected in zip(inverses, want, strict=True):
            np.testing.assert_array_equal(inverse, expected)


def test_other_python_threads_run_meanwhile():
    masking.implementation()
    # Once is enough: while the lock is held it never happens, and a busy machine may not let it.
    assert any(_another_thread_ran_meanwhile() for _ in range(20))


def _another_thread_ran_meanwhile():
    called = []

    def call():
        called.append(time.perf_counter())
        permute(np.arange(500_000), 500_000, key=0)
        called.append(time.perf_counter())

    thread = threading.Thread(target=call)
    thread.start()
    ticks = []
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    # The first and last fifth of the call are left out: Python runs at both ends of it.
    start, end = called
    fifth = (end - start) / 5
    return any(start + fifth < tick < end - fifth for tick in ticks)


def test_without_the_compiled_module_numpy_stands_in_and_says_so_once(monkeypatch, caplog):
    spec = SPECS[0]
    want = sample_masks(spec, KEYS, seed=0, modality="video")
    monkeypatch.setitem(sys.modules, "avmae_kernels._C", None)
    compiled.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="avmae_kernels._compiled"):
            for _ in range(2):
                got = sample_masks(spec, KEYS, seed=0, modality="video")
    finally:
        compiled.cache_clear()
    np.testing.assert_array_equal(got.inverse, want.inverse)
    assert len(caplog.records) == 1
    assert "Install a C++17 compiler" in caplog.text


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (("random", AUDIO, 1.0), r"wants ratio in \[0, 1\), got 1.0"),
        (("random", AUDIO, -0.1), r"wants ratio in \[0, 1\), got -0.1"),
        (("random", AUDIO, float("nan")), r"wants ratio in \[0, 1\), got nan"),
        (("random", AUDIO, "0.7"), r"wants ratio in \[0, 1\), got '0.7'"),
        (("random", (), 0.5), r"wants grid of 1 to 3 axes, got \(\)"),
        (("random", (1, 2, 3, 4), 0.5), "wants grid of 1 to 3 axes"),
        (("random", (0, 8), 0.5), r"wants grid of whole numbers from 1, got \(0, 8\)"),
        (("random", (-2, 8), 0.5), "wants grid of whole numbers from 1"),
        (("random", (2.5, 8), 0.5), "wants grid of whole numbers from 1"),
        (("random", 1568, 0.5), "wants grid of 1 to 3 axes, got 1568"),
        (("random", (2**16, 2**15), 0.5), r"wants grid of fewer than 2\*\*31 tokens"),
        (("random", (2**40, 2**40), 0.5), r"wants grid of fewer than 2\*\*31 tokens"),
        (
            ("tubes", VIDEO, 0.5),
            "kind to be one of random, tube, .*got 'tubes'; did you mean 'tube'",
        ),
        (("random", VIDEO, 0.5, "keep"), "count to be one of masked, kept, got 'keep'"),
        (
            ("tube", AUDIO, 0.5),
            r"'tube' wants a grid \(time, height, width\), got \(62, 8\); kinds",
        ),
        (("frequency", VIDEO, 0.5), r"'frequency' wants a grid \(time, frequency\), got \(8, 14"),
        (("time_frequency", (62,), 0.5), r"'time_frequency' wants a grid \(time, frequency\)"),
        (("random", (2, 2), 0.9, "kept"), "leaves no token visible; lower the ratio"),
        (("time_frequency", AUDIO, 0.9, "kept"), "leaves no token visible"),
    ],
)
def test_mask_spec_rejects(fields, match):
    with pytest.raises(ValueError, match=match):
        MaskSpec(*fields)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"keys": [1, 2]}, r"wants keys as int64 \[B\], got list"),
        ({"keys": np.arange(3, dtype=np.int32)}, r"wants keys as int64 \[B\], got int32 \[3\]"),
        ({"keys": np.zeros((2, 2), dtype=np.int64)}, r"wants keys .* got int64 \[2, 2\]"),
        ({"seed": -1}, "wants seed as a whole number from 0 to 18446744073709551615, got -1"),
        ({"seed": 2**64}, "wants seed"),
        ({"seed": 0.5}, "wants seed"),
        ({"modality": "vidoe"}, "modality .* got 'vidoe'; did you mean 'video'"),
    ],
)
def test_sample_masks_rejects(changed, match):
    arguments = {"keys": KEYS, "seed": 0, "modality": "video", **changed}
    with pytest.raises(ValueError, match=match):
        sample_masks(SPECS[0], **arguments)
