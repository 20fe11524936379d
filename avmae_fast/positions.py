"""Fixed position tables of sines and cosines, computed in float64 and rounded to float32 once.

`sincos1d` is what the released audiovisual model adds to its tokens; `sincos_grid` is the form of
image and video autoencoders (Beyer et al., arXiv:2205.01580). Frequencies fall from 1 to 1/10000.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_PERIOD = 10000.0


def sincos1d(n: int, width: int) -> NDArray[np.float32]:
    """Return `[p, 2i] = sin(p w_i)`, `[p, 2i + 1] = cos(p w_i)`, `w_i = 10000^(-2i / width)`.

    Args:
        n: number of tokens; p is the index of a token in the flattened grid.
        width: channels, even.

    Returns:
        [n, width] float32.

    Raises:
        ValueError: n is negative, or width is not a positive even number.
    """
    if n < 0 or width < 2 or width % 2:
        raise ValueError(f"sincos1d wants n >= 0 and an even width >= 2, got {n} and {width}")
    frequency = np.exp(np.arange(0, width, 2) * (-math.log(_PERIOD) / width))
    angle = np.arange(n)[:, None] * frequency
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(n, width).astype(np.float32)


def sincos_grid(grid: Sequence[int], width: int) -> NDArray[np.float32]:
    """Return the sines and cosines of each coordinate of a token, side by side.

    With k frequencies `w_j = 10000^(-j / k)` a token at (y, x) gets
    [sin(x w), cos(x w), sin(y w), cos(y w)], a token at (z, y, x)
    [sin(z w), cos(z w), sin(x w), cos(x w), sin(y w), cos(y w)]. k is width // 4 or width // 6;
    channels left over where the division is not exact stay zero. One time step is no axis: the
    grid (1, height, width) has the table of a picture.

    Args:
        grid: tokens along (time, frequency) or (time, height, width); tokens run row-major.
        width: channels, at least two for each axis.

    Returns:
        [tokens, width] float32.

    Raises:
        ValueError: the grid has not two or three positive axes, or width is too small for one
            frequency.
    """
    if len(grid) == 3 and grid[0] == 1:
        grid = grid[1:]
    if len(grid) not in (2, 3) or min(grid) < 1 or width < 2 * len(grid):
        raise ValueError(
            "sincos_grid wants two or three positive axes and a width of at least two an axis, "
            f"got {tuple(grid)} and {width}"
        )
    count = width // (2 * len(grid))
    frequency = _PERIOD ** (-np.arange(count) / count)
    *z, y, x = (axis.reshape(-1, 1) * frequency for axis in np.indices(grid))
    parts = [wave(angle) for angle in (*z, x, y) for wave in (np.sin, np.cos)]
    table = np.zeros((math.prod(grid), width))
    table[:, : len(parts) * count] = np.concatenate(parts, axis=1)
    return table.astype(np.float32)
