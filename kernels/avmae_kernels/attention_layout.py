"""Where an attention program finds its rows: slots, their owners, and the loads of one head.

Shape letters: T tokens, S sequences, H heads, d head_dim.

A *slot* is 128 rows of one sequence. Sequence s owns the slots from `cu_seqlens[s] // 128 + s` to
where those of sequence s + 1 start: at least one, and enough for its rows, because
floor((a + n) / 128) - floor(a / 128) + 1 >= ceil(n / 128). So a slot's place follows from one
offset: no prefix sum over lengths, and shapes alone decide how many slots there are,
`T // 128 + S + 1`. The slots left at the end belong to an imaginary sequence S: the rows past
`cu_seqlens[S]`. With one fixed length, sequence s owns `ceil(length / 128)` slots and nothing is
left over. Row statistics (log-sum-exp, delta) are stored by slot, [H, slots * 128], so every
sequence starts on an aligned address. Entries past its end, as far as the tile of its last row
reaches, are those of rows of zeros; the others are unspecified and never read.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from avmae_kernels._triton import tl, triton

SLOT = 128
# A sequence of at most this many keys is a short one: its keys and values fit on a chip.
SHORT = 320
MAX_HEAD_DIM = 128
# A kernel may read a global only if it is a constexpr.
ROWS_PER_SLOT = tl.constexpr(SLOT)


@dataclass(frozen=True)
class Tile:
    """Rows of a program on the side of the queries and of the keys, and how it is compiled.

    resident: all keys of a sequence stay on chip (forward pass, short fixed lengths).
    peeled: the loop over blocks of keys leaves out the last one (forward pass for Hopper).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 2
    resident: bool = False
    peeled: bool = True


class Sequences(NamedTuple):
    """Where the sequences start among the queries and among the keys.

    cu_q, cu_kv: offsets, [S + 1] int32. owners_q, owners_kv: owners of their slots, which the
    kernels need where lengths vary. fixed: (queries, keys) of every sequence if all have the same.
    """

    cu_q: Tensor
    cu_kv: Tensor
    owners_q: Tensor | None = None
    owners_kv: Tensor | None = None
    fixed: tuple[int, int] | None = None


def slot_count(tokens: int, sequences: int, fixed_length: int | None) -> int:
    """How many slots `sequences` of `tokens` rows together take."""
    if fixed_length is None:
        return tokens // SLOT + sequences + 1
    return sequences * -(-fixed_length // SLOT)


def slot_starts(cu_seqlens: Tensor) -> Tensor:
    """The first slot of every sequence and of the rows past the last one, [S + 1] int32."""
    numbers = torch.arange(len(cu_seqlens), dtype=torch.int32, device=cu_seqlens.device)
    return cu_seqlens // SLOT + numbers


def slot_owners_reference(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The sequence every slot belongs to, [slots] int32, in plain PyTorch."""
    slots = slot_count(tokens, len(cu_seqlens) - 1, None)
    number = torch.arange(slots, dtype=torch.int32, device=cu_seqlens.device)
    return (torch.searchsorted(slot_starts(cu_seqlens), number, right=True) - 1).to(torch.int32)


@triton.jit(do_not_specialize=["S", "slots"])
def slot_owners_kernel(
    cu_ptr,  # [S + 1] int32
    owners_ptr,  # [slots] int32
    S,
    slots,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # One program writes the slots of one sequence; program S those that are left.
    s = tl.program_id(0)
    first = tl.load(cu_ptr + s) // ROWS_PER_SLOT + s
    after = tl.load(cu_ptr + s + 1, mask=s < S, other=0) // ROWS_PER_SLOT + s + 1
    # Offsets that do not rise are the caller's mistake; they must not become stray writes.
    first = tl.maximum(first, 0)
    after = tl.minimum(tl.where(s < S, after, slots), slots)
    for start in range(first, after, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(owners_ptr + slot, s, mask=slot < after)


@triton.jit
def find_tile(
    tile,
    cu_ptr,
    owners_ptr,
    other_cu_ptr,
    S,
    tokens,
    FIXED: tl.constexpr,
    FIXED_OTHER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sequence s of tile number `tile` (BLOCK rows), on this side and on the other side.

    Returns (s, start, length, row, other_start, other_length): where s starts and how long it is,
    the tile's first row within it, and start and length of s among the rows it attends to, or is
    attended by. A FIXED length of 0 means that lengths vary; then `row` may lie past the end.
    """
    tl.static_assert(ROWS_PER_SLOT % BLOCK == 0)
    if FIXED > 0:
        TILES: tl.constexpr = (FIXED + BLOCK - 1) // BLOCK
        s = tile // TILES
        start, length, row = s * FIXED, FIXED, (tile % TILES) * BLOCK
        other_start, other_length = s * FIXED_OTHER, FIXED_OTHER
    else:
        TILES_PER_SLOT: tl.constexpr = ROWS_PER_SLOT // BLOCK
        slot = tile // TILES_PER_SLOT
        s = tl.load(owners_ptr + slot)
        start = tl.load(cu_ptr + s)
        length = tl.load(cu_ptr + s + 1, mask=s < S, other=tokens) - start
        other_start = tl.load(other_cu_ptr + s)
        # The rows past the last sequence are a sequence that attends to nothing.
        other_end = tl.load(other_cu_ptr + s + 1, mask=s < S, other=other_start)
        other_length = other_end - other_start
        first_slot = start // ROWS_PER_SLOT + s
        row = (slot - first_slot) * ROWS_PER_SLOT + (tile % TILES_PER_SLOT) * BLOCK
    return s, start, length, row, other_start, other_length


@triton.jit
def statistics_row(s, start, FIXED: tl.constexpr):
    """Where the row statistics of sequence s begin, a multiple of 128."""
    if FIXED > 0:
        slot = s * ((FIXED + ROWS_PER_SLOT - 1) // ROWS_PER_SLOT)
    else:
        slot = start // ROWS_PER_SLOT + s
    return slot * ROWS_PER_SLOT


@triton.jit
def load_head(
    ptr,
    stride,
    rows,
    valid,
    HEAD_DIM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Some rows of one head as a tuple of one or two tiles: columns 0 .. LOW, and HIGH more.

    Zero past the head and, if MASKED, where a row is not `valid`. Rows are small numbers: the
    caller moves `ptr` by 64-bit offsets.
    """
    low = _load_columns(ptr, stride, rows, valid, 0, LOW, HEAD_DIM, MASKED)
    if HIGH == 0:
        return (low,)
    else:
        return low, _load_columns(ptr, stride, rows, valid, LOW, HIGH, HEAD_DIM, MASKED)


@triton.jit
def _load_columns(
    ptr,
    stride,
    rows,
    valid,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    columns = FIRST + tl.arange(0, WIDTH)
    offsets = rows[:, None] * stride + columns[None, :]
    if FIRST + WIDTH > HEAD_DIM:
        keep = (columns < HEAD_DIM)[None, :]
        if MASKED:
            keep = keep & valid[:, None]
        tile = tl.load(ptr + offsets, mask=keep, other=0.0)
    elif MASKED:
        tile = tl.load(ptr + offsets, mask=valid[:, None], other=0.0)
    else:
        tile = tl.load(ptr + offsets)
    return tile


@triton.jit
def store_head(ptr, stride, rows, valid, head, factor, HEAD_DIM: tl.constexpr):
    """Undo `load_head`: `head * factor`, rounded to the dtype stored."""
    LOW: tl.constexpr = head[0].shape[1]
    _store_columns(ptr, stride, rows, valid, head[0] * factor, 0, HEAD_DIM)
    if len(head) > 1:
        _store_columns(ptr, stride, rows, valid, head[1] * factor, LOW, HEAD_DIM)


@triton.jit
def _store_columns(ptr, stride, rows, valid, tile, FIRST: tl.constexpr, HEAD_DIM: tl.constexpr):
    WIDTH: tl.constexpr = tile.shape[1]
    columns = FIRST + tl.arange(0, WIDTH)
    offsets = rows[:, None] * stride + columns[None, :]
    keep = valid[:, None]
    if FIRST + WIDTH > HEAD_DIM:
        keep = keep & (columns < HEAD_DIM)[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=keep)


@triton.jit
def load_statistics(ptr, rows, valid, MASKED: tl.constexpr):
    """One fp32 number for each row; zero, if MASKED, where a row is not `valid`."""
    if rows.shape[0] < 64:
        values = tl.load(ptr + rows, mask=valid, other=0.0)
    else:
        # Loaded twice, side by side: of a tensor with fewer elements than threads, Triton 3.6
        # makes every thread fetch all that it will need, 16 loads of 4 bytes instead of one.
        twice = rows[:, None] + tl.zeros([1, 2], tl.int32)
        if MASKED:
            both = tl.load(ptr + twice, mask=valid[:, None], other=0.0)
        else:
            both = tl.load(ptr + twice)
        values, _ = tl.split(both)
    return values


@triton.jit
def zero_head(ROWS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """An fp32 accumulator for rows of one head."""
    low = tl.zeros([ROWS, LOW], tl.float32)
    if HIGH == 0:
        return (low,)
    else:
        return low, tl.zeros([ROWS, HIGH], tl.float32)


@triton.jit
def inner_products(a, b, PRECISION: tl.constexpr):
    """Of every row of head `a` with every row of head `b`, fp32."""
    product = tl.dot(a[0], b[0].T, input_precision=PRECISION)
    if len(a) > 1:
        product = tl.dot(a[1], b[1].T, product, input_precision=PRECISION)
    return product


@triton.jit
def add_product(head, weights, rows, PRECISION: tl.constexpr):
    """`head + weights @ rows`, where head and rows are tuples of tiles."""
    low = tl.dot(weights, rows[0], head[0], input_precision=PRECISION)
    if len(rows) == 1:
        return (low,)
    else:
        return low, tl.dot(weights, rows[1], head[1], input_precision=PRECISION)


@triton.jit
def scale_head(head, factor):
    """Every row of `head` times its `factor`."""
    if len(head) == 1:
        return (head[0] * factor[:, None],)
    else:
        return head[0] * factor[:, None], head[1] * factor[:, None]


def split_head(head_dim: int) -> tuple[int, int]:
    """head_dim as two powers of two of at least 16 (the second may be 0): 80 is 64 + 16.

    Padding 80 to 128 would cost 1.6 times the products and more registers than there are.
    """
    low = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - low
    return low, 0 if rest <= 0 else max(16, 1 << (rest - 1).bit_length())


def owners_by_kernel(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """`slot_owners_reference` by a kernel: nothing of it is read on the host."""
    S = len(cu_seqlens) - 1
    slots = slot_count(tokens, S, None)
    owners = torch.empty(slots, dtype=torch.int32, device=cu_seqlens.device)
    slot_owners_kernel[(S + 1,)](cu_seqlens, owners, S, slots, BLOCK=64, num_warps=1)
    return owners


def kernel_constants(
    head_dim: int, dtype: torch.dtype, fixed: tuple[int, int] | None
) -> dict[str, int | float | str]:
    """The constexpr arguments that all attention kernels share."""
    low, high = split_head(head_dim)
    scale = head_dim**-0.5
    use_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    fixed_q, fixed_k = fixed or (0, 0)
    return {
        "FIXED_Q": fixed_q,
        "FIXED_K": fixed_k,
        "HEAD_DIM": head_dim,
        "LOW": low,
        "HIGH": high,
        "SCALE": scale,
        # Powers of two instead of e: one multiplication less for each exponential.
        "SCALE_LOG2": scale * math.log2(math.e),
        "PRECISION": "tf32" if use_tf32 else "ieee",
    }
