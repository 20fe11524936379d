"""What `avmae_kernels._C` computes, in NumPy and bit for bit: its definition and its stand-in.

Each function has the name and the arguments of its twin in `csrc/bindings.cpp`; the public face
with the checks is `avmae_kernels.masking`.

Every random word is Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) of a counter that says what the word is for:
[word index / 4 | stream + purpose * 2**16 + attempt * 2**24 | key, low half | key, high half],
keyed by the seed. Shape letters: B sample keys, N tokens, V visible, M masked.
"""

import math

import numpy as np
from numpy.typing import NDArray

# What words are for. The numbers are part of every result: never renumber them.
MASK, MASK_COLUMNS, BOXES, BOX_REMAINDER, UNIFORM, INTEGERS, PERMUTATION = range(7)

BOX_LIMIT = 256
PERMUTATION_ROUNDS = 16
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


def philox(counters: NDArray[np.uint32], keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Philox 4x32-10 of each counter [M, 4] under its key, [M, 2] or one for all: [M, 4] uint32."""
    c0, c1, c2, c3 = counters.astype(np.uint64).T
    k0, k1 = keys.astype(np.uint64).T
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = k0 + np.uint64(0x9E3779B9) & _LOW, k1 + np.uint64(0xBB67AE85) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


class Draws:
    """The random words of one (seed, purpose, stream), a row for each sample key [B]."""

    def __init__(self, seed: int, purpose: int, stream: int, keys: Int64):
        self.seed = np.array([[seed & 0xFFFFFFFF, seed >> 32]], dtype=np.uint32)
        self.tag = stream + (purpose << 16)
        self.keys = keys.view(np.uint64)[:, None]

    def blocks(self, index: Int64, attempt: int = 0) -> NDArray[np.uint64]:
        """Four words of each block `index` (broadcast to [B, count]): [B, count, 4] below 2**32."""
        index, keys = np.broadcast_arrays(index.astype(np.uint64), self.keys)
        tag = np.full(index.shape, self.tag + (attempt << 24), dtype=np.uint64)
        counters = np.stack([index, tag, keys & _LOW, keys >> _HALF], axis=-1)
        words = philox(counters.reshape(-1, 4).astype(np.uint32), self.seed)
        return words.reshape(counters.shape).astype(np.uint64)

    def words(self, index: Int64, attempt: int = 0) -> NDArray[np.uint64]:
        """Word number `index` of the blocks laid end to end: [B, count]."""
        blocks = self.blocks(index // 4, attempt)
        return np.take_along_axis(blocks, np.atleast_2d(index)[..., None] % 4, axis=-1)[..., 0]

    def integers(self, index: Int64, ranges: Int64) -> Int64:
        """Draws number `index` in [0, ranges), both broadcast to [B, count]; no bias.

        A word that would favour some values is replaced by that of the next attempt (Lemire,
        "Fast random integer generation in an interval", 2019).
        """
        wide = np.broadcast_to(ranges, (len(self.keys), np.shape(ranges)[-1])).astype(np.uint64)
        scaled = self.words(index) * wide
        biased_below = np.uint64(1 << 32) % wide
        attempt = 0
        while (refused := (scaled & _LOW) < biased_below).any():
            attempt += 1
            scaled = np.where(refused, self.words(index, attempt) * wide, scaled)
        return (scaled >> _HALF).astype(np.int64)


def _choose(draws: Draws, n: int, count: int) -> Bool:
    """A uniformly random subset of exactly `count` of n sites for each key: [B, n] bool.

    Floyd's method (Bentley and Floyd, CACM 1987); the smaller of the subset and its complement is
    what is drawn.
    """
    rows = np.arange(len(draws.keys))
    complement = 2 * count > n
    drawn = n - count if complement else count
    last = np.arange(n - drawn, n)
    picks = draws.integers(np.arange(drawn), last + 1)
    chosen = np.zeros((len(rows), n), dtype=bool)
    for i in range(drawn):
        # A site drawn before gives way to the last one, which no earlier draw could reach.
        site = np.where(chosen[rows, picks[:, i]], last[i], picks[:, i])
        chosen[rows, site] = True
    return ~chosen if complement else chosen


def _block_mask(grid: tuple[int, int, int], count: int, seed: int, stream: int, key: Int64) -> Bool:
    """The union of random boxes, cut to exactly `count` tokens, for one key [1]: [N] bool.

    The sides of a box are uniform between a quarter and a half of each axis. Its place is uniform
    over all that touch the grid, and what hangs over the edge is cut, so each token is equally
    likely to be hit. Boxes come until `count` is reached; the last adds its tokens in row-major
    order or the reverse until then. If BOX_LIMIT boxes do not suffice (at high ratios most of a
    box is masked already), the rest are single tokens.
    """
    size, axes = np.array(grid), np.arange(3)
    first_word = 8 * np.arange(BOX_LIMIT)[:, None]
    shortest, longest = (size + 3) // 4, (size + 1) // 2
    draws = Draws(seed, BOXES, stream, key)

    def draw(word: Int64, ranges: Int64) -> Int64:
        return draws.integers(word.ravel(), ranges.ravel()).reshape(word.shape)

    sides = shortest + draw(first_word + 2 * axes, np.tile(longest - shortest + 1, (BOX_LIMIT, 1)))
    begins = draw(first_word + 2 * axes + 1, size + sides - 1) - (sides - 1)
    reverse = draw(first_word + 6, np.full_like(first_word, 2))[:, 0] == 1

    masked = np.zeros(math.prod(grid), dtype=bool)
    tokens = np.arange(len(masked)).reshape(grid)
    missing = count
    for begin, end, backwards in zip(begins, begins + sides, reverse, strict=True):
        if missing == 0:
            return masked
        box = tokens[tuple(map(slice, np.maximum(begin, 0), end))]
        added = box[~masked[box]][:: -1 if backwards else 1][:missing]
        masked[added] = True
        missing -= len(added)
    free = np.flatnonzero(~masked)
    masked[free] = _choose(Draws(seed, BOX_REMAINDER, stream, key), len(free), missing)[0]
    return masked


def _masked(
    kind: str,
    grid: tuple[int, int, int],
    masked_units: int,
    masked_columns: int,
    keys: Int64,
    seed: int,
    stream: int,
) -> Bool:
    """Which tokens are masked: [B, N] bool."""
    batch, tokens, rows = len(keys), math.prod(grid), grid[0]
    if kind == "block":
        masks = [_block_mask(grid, masked_units, seed, stream, key) for key in keys[:, None]]
        return np.reshape(masks, (batch, tokens)).astype(bool)
    draws = Draws(seed, MASK, stream, keys)
    if kind == "random":
        return _choose(draws, tokens, masked_units)
    by_row = np.zeros((batch, rows, tokens // rows), dtype=bool)
    if kind in ("tube", "frequency"):
        by_row |= _choose(draws, tokens // rows, masked_units)[:, None, :]
    else:
        by_row |= _choose(draws, rows, masked_units)[:, :, None]
    if kind == "time_frequency":
        columns = Draws(seed, MASK_COLUMNS, stream, keys)
        by_row |= _choose(columns, tokens // rows, masked_columns)[:, None, :]
    return by_row.reshape(batch, tokens)


def masked_count(kind: str, grid: tuple[int, int, int], units: int, columns: int) -> int:
    """How many tokens are masked if so many of a kind's units are (see `avmae_kernels.masking`)."""
    rows, row_tokens = grid[0], grid[1] * grid[2]
    if kind == "time_frequency":
        return rows * row_tokens - (rows - units) * (row_tokens - columns)
    return units * {"tube": rows, "frequency": rows, "time": row_tokens}.get(kind, 1)


def sample_masks(
    kind: str,
    grid: tuple[int, int, int],
    masked_units: int,
    masked_columns: int,
    keys: Int64,
    seed: int,
    stream: int,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Visible [B, V] and masked [B, M] tokens, ascending, and inverse [B, N]; all int32."""
    masked = _masked(kind, grid, masked_units, masked_columns, keys, seed, stream)
    batch, tokens = masked.shape
    visible_count = tokens - masked_count(kind, grid, masked_units, masked_columns)
    token = np.broadcast_to(np.arange(tokens, dtype=np.int32), masked.shape)
    masked_before = np.cumsum(masked, axis=1, dtype=np.int32) - masked
    inverse = np.where(masked, visible_count + masked_before, token - masked_before)
    return (
        token[~masked].reshape(batch, visible_count),
        token[masked].reshape(batch, tokens - visible_count),
        inverse.astype(np.int32),
    )


def permute(indices: Int64, n: int, seed: int, key: int) -> Int64:
    """Image of each index [count] under the keyed permutation of 0..n-1.

    A Feistel network on (row, column) of the rectangle that just holds n, with cycle walking
    (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, section 5).
    """
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)

    def shift(number: int, place: Int64, side: int) -> Int64:
        blocks = Draws(seed, PERMUTATION, number, np.array([key], dtype=np.int64)).blocks(place)[0]
        bits = (blocks[:, 1] << _HALF | blocks[:, 0]) >> np.uint64(20)
        return (bits * np.uint64(side) >> np.uint64(44)).astype(np.int64)

    image = indices.copy()
    walking = np.arange(len(image))
    while len(walking):
        row, column = np.divmod(image[walking], columns)
        for number in range(0, PERMUTATION_ROUNDS, 2):
            row = (row + shift(number, column, rows)) % rows
            column = (column + shift(number + 1, row, columns)) % columns
        image[walking] = row * columns + column
        walking = walking[image[walking] >= n]
    return image


def keyed_uniform(seed: int, keys: Int64, stream: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), multiples of 2**-53: [B, count] float64."""
    blocks = Draws(seed, UNIFORM, stream, keys).blocks(np.arange((count + 1) // 2))
    words = blocks.reshape(len(keys), 4 * blocks.shape[1])[:, : 2 * count]
    bits = words[:, 1::2] << _HALF | words[:, 0::2]
    return (bits >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)


def keyed_integers(seed: int, keys: Int64, stream: int, count: int, highs: Int64) -> Int64:
    """Uniform integers in [0, highs[b]): [B, count] int64."""
    draws = Draws(seed, INTEGERS, stream, keys)
    return draws.integers(np.arange(count), np.repeat(highs[:, None], count, axis=1))
