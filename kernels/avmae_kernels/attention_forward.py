"""The forward kernels of packed attention.

Shape letters: Q, T query and key tokens, S sequences, H heads, d head_dim; M, N queries and keys
of a tile. Source: online softmax, arXiv:2205.14135 and arXiv:2307.08691, in base 2.
"""

import torch
from torch import Tensor

from avmae_kernels._triton import tl, triton
from avmae_kernels.attention_layout import (
    SLOT,
    Sequences,
    Tile,
    add_product,
    find_tile,
    inner_products,
    kernel_constants,
    load_head,
    scale_head,
    slot_count,
    statistics_row,
    store_head,
    zero_head,
)

# Arguments that change from batch to batch, and must not make a new kernel each time.
_VARYING = ["heads", "S", "tokens", "slots", "parts"]


@triton.jit(do_not_specialize=_VARYING)
def forward_kernel(
    q_ptr,  # [Q, H, d], rows q_stride apart
    k_ptr,  # [T, H, d], rows kv_stride apart
    v_ptr,  # [T, H, d], rows kv_stride apart
    out_ptr,  # [Q, H, d]
    lse_ptr,  # [H, slots * 128] fp32, in powers of two
    cu_q_ptr,  # [S + 1] int32
    cu_kv_ptr,  # [S + 1] int32
    owners_ptr,  # [slots] int32
    q_stride,
    kv_stride,
    out_stride,
    heads,
    S,
    tokens,
    slots,
    FIXED_Q: tl.constexpr,
    FIXED_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head against all keys of its sequence, block after block."""
    # Heads vary fastest: programs that run together read neighbouring columns of the same rows.
    h = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    s, q_start, q_length, row, kv_start, kv_length = find_tile(
        tile, cu_q_ptr, owners_ptr, cu_kv_ptr, S, tokens, FIXED_Q, FIXED_K, BLOCK_M
    )
    if row >= q_length:
        return
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_q = row + m < q_length
    q_row = (q_start + row).to(tl.int64)
    q_ptr += q_row * q_stride + h * HEAD_DIM
    kv_first = kv_start.to(tl.int64) * kv_stride + h * HEAD_DIM
    q = load_head(q_ptr, q_stride, m, in_q, HEAD_DIM, LOW, HIGH, True)

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = zero_head(BLOCK_M, LOW, HIGH)
    # The last block of keys, the only one that may be short, goes first: the loop needs no mask.
    last = tl.maximum((kv_length + BLOCK_N - 1) // BLOCK_N - 1, 0) * BLOCK_N
    in_kv = last + n < kv_length
    first = kv_first + tl.cast(last, tl.int64) * kv_stride
    k = load_head(k_ptr + first, kv_stride, n, in_kv, HEAD_DIM, LOW, HIGH, True)
    v = load_head(v_ptr + first, kv_stride, n, in_kv, HEAD_DIM, LOW, HIGH, True)
    top, total, out = attend_block(q, k, v, in_kv, top, total, out, SCALE_LOG2, True, PRECISION)
    for start in range(0, last, BLOCK_N):
        first = kv_first + tl.cast(start, tl.int64) * kv_stride
        k = load_head(k_ptr + first, kv_stride, n, in_kv, HEAD_DIM, LOW, HIGH, False)
        v = load_head(v_ptr + first, kv_stride, n, in_kv, HEAD_DIM, LOW, HIGH, False)
        top, total, out = attend_block(
            q, k, v, in_kv, top, total, out, SCALE_LOG2, False, PRECISION
        )

    lse_ptr += h.to(tl.int64) * slots * 128 + statistics_row(s, q_start, FIXED_Q) + row
    out_ptr += q_row * out_stride + h * HEAD_DIM
    finish_rows(out_ptr, out_stride, lse_ptr, m, in_q, top, total, out, HEAD_DIM)


@triton.jit(do_not_specialize=_VARYING)
def short_forward_kernel(
    q_ptr,  # [Q, H, d], rows q_stride apart
    k_ptr,  # [T, H, d], rows kv_stride apart
    v_ptr,  # [T, H, d], rows kv_stride apart
    out_ptr,  # [Q, H, d]
    lse_ptr,  # [H, slots * 128] fp32, in powers of two
    q_stride,
    kv_stride,
    out_stride,
    heads,
    slots,
    parts,
    FIXED_Q: tl.constexpr,
    FIXED_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS_N: tl.constexpr,
):  # fmt: skip
    """Every `parts`-th tile of queries of one sequence and head, whose keys and values stay on
    chip: as many blocks of them as BLOCKS_N has sizes, equal but for the last."""
    h = tl.program_id(0) % heads
    s = tl.program_id(0) // heads // parts
    part = tl.program_id(0) // heads % parts
    q_start, kv_start = s * FIXED_Q, s * FIXED_K
    kv_first = kv_start.to(tl.int64) * kv_stride + h * HEAD_DIM
    keys, values = (), ()
    for i in tl.static_range(len(BLOCKS_N)):
        n = i * BLOCKS_N[0] + tl.arange(0, BLOCKS_N[i])
        in_kv = n < FIXED_K
        k = load_head(k_ptr + kv_first, kv_stride, n, in_kv, HEAD_DIM, LOW, HIGH, True)
        v = load_head(v_ptr + kv_first, kv_stride, n, in_kv, HEAD_DIM, LOW, HIGH, True)
        keys, values = keys + (k,), values + (v,)  # type: ignore[assignment]

    m = tl.arange(0, BLOCK_M)
    lse_ptr += h.to(tl.int64) * slots * 128 + statistics_row(s, q_start, FIXED_Q)
    for row in range(part * BLOCK_M, FIXED_Q, parts * BLOCK_M):
        in_q = row + m < FIXED_Q
        q_row = (q_start + row).to(tl.int64)
        q_first = q_ptr + q_row * q_stride + h * HEAD_DIM
        q = load_head(q_first, q_stride, m, in_q, HEAD_DIM, LOW, HIGH, True)
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        out = zero_head(BLOCK_M, LOW, HIGH)
        for i in tl.static_range(len(BLOCKS_N)):
            in_kv = i * BLOCKS_N[0] + tl.arange(0, BLOCKS_N[i]) < FIXED_K
            top, total, out = attend_block(
                q, keys[i], values[i], in_kv, top, total, out, SCALE_LOG2,
                FIXED_K < (i + 1) * BLOCKS_N[0], PRECISION,
            )  # fmt: skip
        out_first = out_ptr + q_row * out_stride + h * HEAD_DIM
        finish_rows(out_first, out_stride, lse_ptr + row, m, in_q, top, total, out, HEAD_DIM)


@triton.jit
def attend_block(
    q, k, v, in_kv, top, total, out,
    SCALE_LOG2: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one block of keys into the running maximum, the running sum and the output."""
    s_MN = inner_products(q, k, PRECISION)
    if MASKED:
        s_MN = tl.where(in_kv[None, :], s_MN, -float("inf"))
    new_top = tl.maximum(top, tl.max(s_MN, 1) * SCALE_LOG2)
    if MASKED:
        # As long as there is no key the maximum is -inf, and -inf - -inf is no number.
        new_top = tl.where(new_top == -float("inf"), 0.0, new_top)
    p_MN = tl.math.exp2(s_MN * SCALE_LOG2 - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    total = total * shrink + tl.sum(p_MN, 1)
    out = add_product(scale_head(out, shrink), p_MN.to(v[0].dtype), v, PRECISION)
    return new_top, total, out


@triton.jit
def finish_rows(out_ptr, out_stride, lse_ptr, m, in_q, top, total, out, HEAD_DIM: tl.constexpr):
    """Write the normalised output of the rows m, and their log-sum-exp.

    That of rows past the end as well: a finite number, as for any query of zeros.
    """
    # Without keys the sum is 0, and so is the output; an infinite log-sum-exp keeps such a row out
    # of the gradients. A NaN stays one.
    no_keys = total == 0
    total = tl.where(no_keys, 1.0, total)
    lse = tl.where(no_keys, float("inf"), top + tl.math.log2(total))
    tl.store(lse_ptr + m, lse)
    store_head(out_ptr, out_stride, m, in_q, out, (1.0 / total)[:, None], HEAD_DIM)


# Four programs for each of the 132 processors of an H100; the result does not depend on it.
_ENOUGH_PROGRAMS = 528


def short_blocks(length: int, block: int) -> tuple[int, ...]:
    """Blocks that hold `length` keys, equal but for the last: 157 keys are 64 + 64 + 32."""
    whole, rest = divmod(length, block)
    tail = (max(16, 1 << (rest - 1).bit_length()),) if rest else ()
    return (block,) * whole + tail


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, tile: Tile
) -> tuple[Tensor, Tensor]:
    """The output [Q, H, d] and its log-sum-exp by slot, [H, slots * 128] fp32 in powers of two."""
    cu_q, cu_kv, owners, _, fixed = seqs
    Q, H, d = q.shape
    S = len(cu_q) - 1
    slots = slot_count(Q, S, fixed and fixed[0])
    out = torch.empty(Q, H, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(H, slots * SLOT, dtype=torch.float32, device=q.device)
    if Q * H == 0:
        return out, lse
    strides = q.stride(0), k.stride(0), out.stride(0)
    constants = kernel_constants(d, q.dtype, fixed) | {"BLOCK_M": tile.block_m}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if fixed is not None and tile.resident:
        tiles = -(-fixed[0] // tile.block_m)
        # Where sequences are few, the tiles of one are shared out among programs.
        parts = min(tiles, -(-_ENOUGH_PROGRAMS // (S * H)))
        short_forward_kernel[(S * parts * H,)](
            q, k, v, out, lse, *strides, H, slots, parts, **constants,
            BLOCKS_N=short_blocks(fixed[1], tile.block_n), **options,
        )  # fmt: skip
        return out, lse
    if fixed is None:
        tiles = slots * (SLOT // tile.block_m)
    else:
        tiles = S * -(-fixed[0] // tile.block_m)
    forward_kernel[(tiles * H,)](
        q, k, v, out, lse, cu_q, cu_kv, cu_q if owners is None else owners, *strides, H, S, Q,
        slots, **constants, BLOCK_N=tile.block_n, **options,
    )  # fmt: skip
    return out, lse
