"""Position tables against their formulas, value by value."""

import math

import numpy as np
import pytest

from avmae_fast.positions import sincos1d, sincos_grid


def test_sincos1d_interleaves() -> None:
    table = sincos1d(5, 6)
    for p in range(5):
        for i in range(3):
            angle = p * 10000 ** (-2 * i / 6)
            assert table[p, 2 * i] == pytest.approx(math.sin(angle), abs=6e-8)
            assert table[p, 2 * i + 1] == pytest.approx(math.cos(angle), abs=6e-8)
    assert table.dtype == np.float32


@pytest.mark.parametrize(
    ("grid", "width", "zeros"),
    [((3, 5), 16, 0), ((3, 5), 18, 2), ((2, 3, 4), 24, 0), ((2, 3, 4), 22, 4)],
)
def test_sincos_grid(grid: tuple[int, ...], width: int, zeros: int) -> None:
    table = sincos_grid(grid, width)
    count = width // (2 * len(grid))
    assert table.shape == (math.prod(grid), width) and table.dtype == np.float32
    for token, coordinates in enumerate(np.ndindex(*grid)):
        # The last axis, x, comes before y; time comes first.
        *z, y, x = coordinates
        expected = []
        for coordinate in (*z, x, y):
            angles = [coordinate * 10000 ** (-j / count) for j in range(count)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        np.testing.assert_allclose(table[token], expected + zeros * [0.0], rtol=0, atol=6e-8)


def test_grid_tokens_are_all_different() -> None:
    table = sincos_grid((8, 14, 14), 512)
    assert len(np.unique(table, axis=0)) == 8 * 14 * 14


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="even width"):
        sincos1d(4, 5)
    with pytest.raises(ValueError, match="two or three positive axes"):
        sincos_grid((4,), 16)
    with pytest.raises(ValueError, match="at least two an axis"):
        sincos_grid((2, 2, 2), 5)
