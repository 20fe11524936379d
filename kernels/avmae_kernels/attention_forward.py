"""The forward kernel of packed attention: one tile of queries against all keys of its sequence.

Shape letters: Q, T query and key tokens, S sequences, H heads, d head_dim; M, N queries and keys
of a tile. Source: online softmax, arXiv:2205.14135 and arXiv:2307.08691, in base 2.
"""

import torch
from torch import Tensor

from avmae_kernels._triton import tl, triton
from avmae_kernels.attention_layout import (
    SLOT,
    Tile,
    find_tile,
    kernel_constants,
    load_rows,
    slot_count,
    statistics_row,
    store_rows,
)

_VARYING = ["heads", "S", "tokens", "slots"]


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Heads vary fastest: programs that run together read neighbouring columns of the same rows.
    h = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    s, q_start, q_length, row, kv_start, kv_length = find_tile(
        tile, cu_q_ptr, owners_ptr, cu_kv_ptr, S, tokens, FIXED_Q, FIXED_K, BLOCK_M
    )
    if row >= q_length:
        return
    m = tl.arange(0, BLOCK_M)
    in_q = row + m < q_length
    q_row = (q_start + row).to(tl.int64)
    q_ptr += q_row * q_stride + h * HEAD_DIM
    k_ptr += kv_start.to(tl.int64) * kv_stride + h * HEAD_DIM
    v_ptr += kv_start.to(tl.int64) * kv_stride + h * HEAD_DIM
    q_low = load_rows(q_ptr, q_stride, m, in_q, 0, LOW, HEAD_DIM, True)
    q_high = q_low
    if HIGH > 0:
        q_high = load_rows(q_ptr, q_stride, m, in_q, LOW, HIGH, HEAD_DIM, True)

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    low = tl.zeros([BLOCK_M, LOW], tl.float32)
    high = tl.zeros([BLOCK_M, HIGH if HIGH > 0 else 1], tl.float32)
    # The last block of keys, the only one that may be short, goes first: the loop needs no mask.
    last = tl.maximum((kv_length + BLOCK_N - 1) // BLOCK_N - 1, 0) * BLOCK_N
    top, total, low, high = _attend(
        q_low, q_high, k_ptr, v_ptr, kv_stride, last, kv_length, top, total, low, high,
        HEAD_DIM, LOW, HIGH, SCALE_LOG2, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    for start in range(0, last, BLOCK_N):
        top, total, low, high = _attend(
            q_low, q_high, k_ptr, v_ptr, kv_stride, start, kv_length, top, total, low, high,
            HEAD_DIM, LOW, HIGH, SCALE_LOG2, BLOCK_N, False, PRECISION,
        )  # fmt: skip

    # The largest score alone adds about 1 to the sum. Without keys it is 0, and so is the output;
    # an infinite log-sum-exp keeps such a row out of the gradients.
    floor = tl.maximum(total, 0.5)
    share = 1.0 / floor
    lse = tl.where(total > 0, top + tl.math.log2(floor), float("inf"))
    lse_row = statistics_row(s, q_start, FIXED_Q) + row
    tl.store(lse_ptr + h.to(tl.int64) * slots * 128 + lse_row + m, lse, mask=in_q)
    out_ptr += q_row * out_stride + h * HEAD_DIM
    store_rows(out_ptr, out_stride, m, in_q, low * share[:, None], 0, LOW, HEAD_DIM)
    if HIGH > 0:
        store_rows(out_ptr, out_stride, m, in_q, high * share[:, None], LOW, HIGH, HEAD_DIM)


@triton.jit
def _attend(
    q_low, q_high, k_ptr, v_ptr, stride, start, length, top, total, low, high,
    HEAD_DIM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one block of keys into the running maximum, the running sum and the output."""
    n = tl.arange(0, BLOCK_N)
    in_kv = start + n < length
    first = tl.cast(start, tl.int64) * stride
    k_low = load_rows(k_ptr + first, stride, n, in_kv, 0, LOW, HEAD_DIM, MASKED)
    s_MN = tl.dot(q_low, k_low.T, input_precision=PRECISION)
    if HIGH > 0:
        k_high = load_rows(k_ptr + first, stride, n, in_kv, LOW, HIGH, HEAD_DIM, MASKED)
        s_MN = tl.dot(q_high, k_high.T, s_MN, input_precision=PRECISION)
    if MASKED:
        s_MN = tl.where(in_kv[None, :], s_MN, -float("inf"))
    new_top = tl.maximum(top, tl.max(s_MN, 1) * SCALE_LOG2)
    if MASKED:
        # Without a single key the maximum is -inf, and -inf - -inf is no number.
        new_top = tl.where(length > 0, new_top, 0.0)
    p_MN = tl.math.exp2(s_MN * SCALE_LOG2 - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    total = total * shrink + tl.sum(p_MN, 1)
    v_low = load_rows(v_ptr + first, stride, n, in_kv, 0, LOW, HEAD_DIM, MASKED)
    p_MN = p_MN.to(v_low.dtype)
    low = tl.dot(p_MN, v_low, low * shrink[:, None], input_precision=PRECISION)
    if HIGH > 0:
        v_high = load_rows(v_ptr + first, stride, n, in_kv, LOW, HIGH, HEAD_DIM, MASKED)
        high = tl.dot(p_MN, v_high, high * shrink[:, None], input_precision=PRECISION)
    return new_top, total, low, high


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_kv: Tensor,
    owners: Tensor | None,
    fixed: tuple[int, int] | None,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """The output [Q, H, d] and its log-sum-exp by slot, [H, slots * 128] fp32 in powers of two."""
    Q, H, d = q.shape
    S = len(cu_q) - 1
    slots = slot_count(Q, S, fixed and fixed[0])
    out = torch.empty(Q, H, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(H, slots * SLOT, dtype=torch.float32, device=q.device)
    if fixed is None:
        tiles = slots * (SLOT // tile.block_m)
    else:
        tiles = S * triton.cdiv(fixed[0], tile.block_m)
    if Q == 0 or H == 0:
        return out, lse
    forward_kernel[(tiles * H,)](
        q, k, v, out, lse, cu_q, cu_kv, cu_q if owners is None else owners,
        q.stride(0), k.stride(0), out.stride(0), H, S, Q, slots,
        **kernel_constants(d, q.dtype, fixed), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out, lse
