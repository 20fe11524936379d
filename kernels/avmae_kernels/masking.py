"""Masks, permutations and random draws that are functions of a key, so that nothing else matters.

A mask depends on (seed, sample key, modality) alone: not on the batch a clip is in, the worker that
loads it, the rank that trains on it, or the number of threads. There is no state to save.

Computed by `avmae_kernels._C` (`csrc/`); where that is not built, by
`avmae_kernels.masking_reference` in NumPy: the same bits, slower, said once in the log.

Shape letters: B sample keys, N tokens, V visible, M masked (N = V + M).
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import ModuleType
from typing import overload

import numpy as np
from numpy.typing import NDArray

from avmae_kernels import masking_reference
from avmae_kernels._compiled import compiled

# Axes of the grids each kind fits: video is (time, height, width), sound is (time, frequency).
KIND_AXES: dict[str, tuple[int, ...]] = {
    "random": (1, 2, 3),
    "tube": (3,),
    "block": (1, 2, 3),
    "time": (1, 2, 3),
    "frequency": (2,),
    "time_frequency": (2,),
}
COUNTS = ("masked", "kept")
# The stream of each modality. The numbers are part of every mask: never renumber them.
MODALITIES = {"video": 0, "audio": 1}

MAX_TOKENS = 2**31 - 1
MAX_PERMUTATION = 2**40

_GRID_NAMES = {2: "(time, frequency)", 3: "(time, height, width)"}


@dataclass(frozen=True)
class MaskSpec:
    """Which tokens of a grid may be masked together, and how many; the same for every clip.

    kind: what is masked.
        `random`: single tokens, every subset of the right size equally likely.
        `tube`: places of a frame, over all of time; video only.
        `block`: the union of random boxes, the last one trimmed to the exact number. Sides are
            between a quarter and a half of each axis. Boxes may hang over the edge, so that a
            token at the edge is masked about as often as one in the middle (within 0.03 of the
            ratio on the paper's grids). After 256 boxes (high ratios) the rest are single tokens.
        `time`: whole rows, that is every token of a time step.
        `frequency`: whole columns, that is every token of a frequency band; sound only.
        `time_frequency`: rows and columns; sound only.
    grid: tokens along each axis, video (time, height, width), sound (time, frequency), or one axis.
        Tokens are numbered row-major.
    ratio: how much is masked, in [0, 1). It applies to tokens (random, block), to the h * w places
        (tube), to rows (time), to columns (frequency), and for time_frequency to rows and to
        columns each, as in Audio-MAE (Huang et al. 2022), so that about (1 - ratio)**2 is visible.
    count: how n of those become a number. `masked` masks int(ratio * n), as AV-MAE does (Georgescu
        et al. 2023): 1568 tokens at 0.9 leave 157. `kept` keeps int(n * (1 - ratio)), as MAE does
        (He et al. 2021): 1568 at 0.9 leave 156.

    Raises:
        ValueError: a field is not as above, the kind does not fit the grid, there are 2**31 tokens
            or more, or no token would be visible.
    """

    kind: str
    grid: tuple[int, ...]
    ratio: float
    count: str = "masked"

    def __post_init__(self) -> None:
        _check_name("MaskSpec", "kind", self.kind, tuple(KIND_AXES))
        _check_name("MaskSpec", "count", self.count, COUNTS)
        self._check_grid()
        ratio_ok = isinstance(self.ratio, Real) and 0 <= self.ratio < 1  # False for NaN
        if not ratio_ok:
            raise ValueError(f"MaskSpec wants ratio in [0, 1), got {self.ratio!r}")
        if self.n_visible < 1:
            raise ValueError(
                f"{self} leaves no token visible; lower the ratio, enlarge the grid or use "
                "count='masked'"
            )

    def _check_grid(self) -> None:
        axes = KIND_AXES[self.kind]
        sizes = tuple(self.grid) if isinstance(self.grid, Sequence) else ()
        if not 1 <= len(sizes) <= 3:
            raise ValueError(f"MaskSpec wants grid of 1 to 3 axes, got {self.grid}")
        if not all(isinstance(size, Integral) and size >= 1 for size in sizes):
            raise ValueError(f"MaskSpec wants grid of whole numbers from 1, got {self.grid}")
        if len(sizes) not in axes:
            fits = " or ".join(_GRID_NAMES.get(n, f"of {n} axis") for n in axes)
            kinds = ", ".join(kind for kind, fit in KIND_AXES.items() if len(sizes) in fit)
            raise ValueError(
                f"MaskSpec kind {self.kind!r} wants a grid {fits}, got {self.grid}; "
                f"kinds that fit it: {kinds}"
            )
        if math.prod(map(int, sizes)) > MAX_TOKENS:
            raise ValueError(f"MaskSpec wants grid of fewer than 2**31 tokens, got {self.grid}")
        object.__setattr__(self, "grid", tuple(int(size) for size in sizes))

    @property
    def n_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def n_masked(self) -> int:
        return masking_reference.masked_count(self.kind, self._grid3, *self._masked_units)

    @property
    def n_visible(self) -> int:
        return self.n_tokens - self.n_masked

    @property
    def _grid3(self) -> tuple[int, int, int]:
        time, height, width = (*self.grid, 1, 1)[:3]
        return time, height, width

    @property
    def _masked_units(self) -> tuple[int, int]:
        """How many of the kind's units (tokens, places, rows, columns) are masked, and for
        time_frequency how many columns besides its rows."""
        time, height, width = self._grid3
        row_tokens = height * width
        units = {"tube": row_tokens, "frequency": row_tokens, "time": time, "time_frequency": time}
        columns = row_tokens if self.kind == "time_frequency" else 0
        return self._masked_of(units.get(self.kind, self.n_tokens)), self._masked_of(columns)

    def _masked_of(self, n: int) -> int:
        ratio = float(self.ratio)
        return int(ratio * n) if self.count == "masked" else n - int(n * (1 - ratio))


@dataclass(frozen=True)
class Masks:
    """The masks of B clips as int32 index lists.

    visible: [B, V], ascending. masked: [B, M], ascending.
    inverse: [B, N], the place of each token in (visible, masked) laid end to end: token n is
        visible exactly if inverse[b, n] < V. Also known as ids_restore.
    """

    visible: NDArray[np.int32]
    masked: NDArray[np.int32]
    inverse: NDArray[np.int32]


def sample_masks(spec: MaskSpec, keys: NDArray[np.int64], *, seed: int, modality: str) -> Masks:
    """The mask of each sample, a function of (spec, seed, key, modality) alone.

    Args:
        spec: what is masked.
        keys: a key for each sample, [B] int64, any values; equal keys give equal masks.
        seed: from 0 to 2**64 - 1.
        modality: `video` or `audio`; the masks of one sample's modalities are independent.

    Raises:
        ValueError: an argument is not as above.
    """
    keys = _check_keys("sample_masks", keys)
    _check_range("sample_masks", "seed", seed, 0, 2**64 - 1)
    _check_name("sample_masks", "modality", modality, tuple(MODALITIES))
    return Masks(
        *implementation().sample_masks(
            spec.kind, spec._grid3, *spec._masked_units, keys, int(seed), MODALITIES[modality]
        )
    )


@overload
def permute(indices: int, n: int, *, key: int, seed: int = 0) -> int: ...
@overload
def permute(
    indices: NDArray[np.int64], n: int, *, key: int, seed: int = 0
) -> NDArray[np.int64]: ...
def permute(
    indices: int | NDArray[np.int64], n: int, *, key: int, seed: int = 0
) -> int | NDArray[np.int64]:
    """Where a random-looking permutation of 0..n-1, chosen by (seed, key), sends each index.

    It holds no table: one index costs the same for any n. Not a cipher.

    Args:
        indices: one int, or an int64 array of any shape; each in [0, n).
        n: from 1 to 2**40.
        key: any int64, for instance the epoch.
        seed: from 0 to 2**64 - 1.

    Returns:
        An int, or an int64 array of the shape of `indices`.

    Raises:
        ValueError: an argument is not as above.
    """
    _check_range("permute", "n", n, 1, MAX_PERMUTATION)
    _check_range("permute", "key", key, -(2**63), 2**63 - 1)
    _check_range("permute", "seed", seed, 0, 2**64 - 1)
    if not isinstance(indices, np.ndarray):
        _check_range("permute", "indices", indices, 0, n - 1)
        return int(permute(np.array([indices], dtype=np.int64), n, key=key, seed=seed)[0])
    if indices.dtype != np.int64:
        raise ValueError(f"permute wants indices as int64, got {_describe(indices)}")
    if indices.size and not (indices.min() >= 0 and indices.max() < n):
        raise ValueError(
            f"permute wants indices in [0, {n}), got {indices.min()} to {indices.max()}"
        )
    flat = np.ascontiguousarray(indices).reshape(-1)
    return implementation().permute(flat, int(n), int(seed), int(key)).reshape(indices.shape)


def keyed_uniform(
    seed: int, keys: NDArray[np.int64], stream: int, count: int
) -> NDArray[np.float64]:
    """Uniform random numbers in [0, 1), `count` for each key: [B, count] float64.

    Number i of a key is a function of (seed, key, stream, i): asking for more changes none.

    Args:
        seed: from 0 to 2**64 - 1.
        keys: [B] int64, any values.
        stream: from 0 to 65535; draws for different uses take different streams.
        count: numbers for each key, 0 or more.

    Raises:
        ValueError: an argument is not as above.
    """
    keys = _check_draws("keyed_uniform", seed, keys, stream, count)
    return implementation().keyed_uniform(int(seed), keys, int(stream), int(count))


def keyed_integers(
    seed: int, keys: NDArray[np.int64], stream: int, count: int, high: int | NDArray[np.int64]
) -> NDArray[np.int64]:
    """Uniform random integers in [0, high), `count` for each key, without bias: [B, count] int64.

    Args:
        seed, keys, stream, count: as in `keyed_uniform`; the two share no randomness.
        high: one int, or [B] int64 for each key its own; from 1 to 2**32.

    Raises:
        ValueError: an argument is not as above.
    """
    keys = _check_draws("keyed_integers", seed, keys, stream, count)
    if isinstance(high, Integral):
        _check_range("keyed_integers", "high", high, 1, 2**32)
        high = np.full(keys.shape, high, dtype=np.int64)
    if not isinstance(high, np.ndarray) or high.dtype != np.int64 or high.shape != keys.shape:
        raise ValueError(
            "keyed_integers wants high as an int or an int64 array like keys "
            f"{list(keys.shape)}, got {_describe(high)}"
        )
    if high.size and not (high.min() >= 1 and high.max() <= 2**32):
        raise ValueError(
            f"keyed_integers wants high from 1 to 2**32, got {high.min()} to {high.max()}"
        )
    return implementation().keyed_integers(
        int(seed), keys, int(stream), int(count), np.ascontiguousarray(high)
    )


def philox(counters: NDArray[np.uint32], keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Philox 4x32-10 of each counter [M, 4] under its key [M, 2]: [M, 4] uint32.

    The random bits under everything here (Salmon et al., SC 2011).

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    for name, array, width in (("counters", counters, 4), ("keys", keys, 2)):
        shape_ok = isinstance(array, np.ndarray) and array.shape == (len(counters), width)
        if not shape_ok or array.dtype != np.uint32:
            raise ValueError(f"philox wants {name} as uint32 [M, {width}], got {_describe(array)}")
    return implementation().philox(np.ascontiguousarray(counters), np.ascontiguousarray(keys))


def implementation() -> ModuleType:
    """What computes everything here: the compiled module or its stand-in."""
    return compiled() or masking_reference


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def _check_name(op: str, field: str, value: str, valid: tuple[str, ...]) -> None:
    if value in valid:
        return
    nearest = difflib.get_close_matches(str(value), valid, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"{op} wants {field} to be one of {', '.join(valid)}, got {value!r}{hint}")


def _check_range(op: str, field: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, Integral) or not low <= value <= high:
        raise ValueError(
            f"{op} wants {field} as a whole number from {low} to {high}, got {value!r}"
        )


def _check_keys(op: str, keys: NDArray[np.int64]) -> NDArray[np.int64]:
    if not isinstance(keys, np.ndarray) or keys.dtype != np.int64 or keys.ndim != 1:
        raise ValueError(f"{op} wants keys as int64 [B], got {_describe(keys)}")
    return np.ascontiguousarray(keys)


def _check_draws(
    op: str, seed: int, keys: NDArray[np.int64], stream: int, count: int
) -> NDArray[np.int64]:
    _check_range(op, "seed", seed, 0, 2**64 - 1)
    _check_range(op, "stream", stream, 0, 2**16 - 1)
    _check_range(op, "count", count, 0, 2**31 - 1)
    return _check_keys(op, keys)
