"""The backward kernels of packed attention: dQ (and delta), then dK and dV. No atomics.

Shape letters: Q, T query and key tokens, S sequences, H heads, d head_dim; M, N queries and keys
of a tile. Source: arXiv:2307.08691, algorithm 2, as two passes: each output row has one writer, so
the gradient is the same in every run. P = 2^(s * scale * log2(e) - lse) is built again in each.
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
def backward_q_kernel(
    grad_ptr,  # [Q, H, d], gradient of the output, rows grad_stride apart
    q_ptr,  # [Q, H, d], rows q_stride apart
    k_ptr,  # [T, H, d], rows kv_stride apart
    v_ptr,  # [T, H, d], rows kv_stride apart
    out_ptr,  # [Q, H, d], rows grad_stride apart
    lse_ptr,  # [H, slots * 128] fp32
    statistics_ptr,  # [H, slots * 128, 2] fp32: lse and delta side by side, written here
    grad_q_ptr,  # [Q, H, d], rows grad_q_stride apart
    cu_q_ptr,  # [S + 1] int32
    cu_kv_ptr,  # [S + 1] int32
    owners_ptr,  # [slots] int32
    grad_stride,
    q_stride,
    kv_stride,
    grad_q_stride,
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
    grad_ptr += q_row * grad_stride + h * HEAD_DIM
    out_ptr += q_row * grad_stride + h * HEAD_DIM
    k_ptr += kv_start.to(tl.int64) * kv_stride + h * HEAD_DIM
    v_ptr += kv_start.to(tl.int64) * kv_stride + h * HEAD_DIM

    q_low = load_rows(q_ptr, q_stride, m, in_q, 0, LOW, HEAD_DIM, True)
    g_low = load_rows(grad_ptr, grad_stride, m, in_q, 0, LOW, HEAD_DIM, True)
    out = load_rows(out_ptr, grad_stride, m, in_q, 0, LOW, HEAD_DIM, True)
    delta = tl.sum(g_low.to(tl.float32) * out.to(tl.float32), 1)
    q_high = q_low
    g_high = g_low
    if HIGH > 0:
        q_high = load_rows(q_ptr, q_stride, m, in_q, LOW, HIGH, HEAD_DIM, True)
        g_high = load_rows(grad_ptr, grad_stride, m, in_q, LOW, HIGH, HEAD_DIM, True)
        out = load_rows(out_ptr, grad_stride, m, in_q, LOW, HIGH, HEAD_DIM, True)
        delta += tl.sum(g_high.to(tl.float32) * out.to(tl.float32), 1)
    entry = h.to(tl.int64) * slots * 128 + statistics_row(s, q_start, FIXED_Q) + row
    lse = tl.load(lse_ptr + entry + m, mask=in_q, other=float("inf"))
    pair = statistics_ptr + 2 * entry + 2 * m
    tl.store(pair, lse)
    tl.store(pair + 1, delta)

    low = tl.zeros([BLOCK_M, LOW], tl.float32)
    high = tl.zeros([BLOCK_M, HIGH if HIGH > 0 else 1], tl.float32)
    # As in the forward pass: the one block of keys that may be short goes first.
    last = tl.maximum((kv_length + BLOCK_N - 1) // BLOCK_N - 1, 0) * BLOCK_N
    low, high = _add_to_grad_q(
        q_low, q_high, g_low, g_high, lse, delta, k_ptr, v_ptr, kv_stride, last, kv_length,
        low, high, HEAD_DIM, LOW, HIGH, SCALE_LOG2, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    for start in range(0, last, BLOCK_N):
        low, high = _add_to_grad_q(
            q_low, q_high, g_low, g_high, lse, delta, k_ptr, v_ptr, kv_stride, start, kv_length,
            low, high, HEAD_DIM, LOW, HIGH, SCALE_LOG2, BLOCK_N, False, PRECISION,
        )  # fmt: skip

    grad_q_ptr += q_row * grad_q_stride + h * HEAD_DIM
    store_rows(grad_q_ptr, grad_q_stride, m, in_q, low * SCALE, 0, LOW, HEAD_DIM)
    if HIGH > 0:
        store_rows(grad_q_ptr, grad_q_stride, m, in_q, high * SCALE, LOW, HIGH, HEAD_DIM)


@triton.jit
def _add_to_grad_q(
    q_low, q_high, g_low, g_high, lse, delta, k_ptr, v_ptr, stride, start, length, low, high,
    HEAD_DIM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BLOCK_N)
    in_kv = start + n < length
    first = tl.cast(start, tl.int64) * stride
    k_low = load_rows(k_ptr + first, stride, n, in_kv, 0, LOW, HEAD_DIM, MASKED)
    v_low = load_rows(v_ptr + first, stride, n, in_kv, 0, LOW, HEAD_DIM, MASKED)
    s_MN = tl.dot(q_low, k_low.T, input_precision=PRECISION)
    dp_MN = tl.dot(g_low, v_low.T, input_precision=PRECISION)
    k_high = k_low
    if HIGH > 0:
        k_high = load_rows(k_ptr + first, stride, n, in_kv, LOW, HIGH, HEAD_DIM, MASKED)
        v_high = load_rows(v_ptr + first, stride, n, in_kv, LOW, HIGH, HEAD_DIM, MASKED)
        s_MN = tl.dot(q_high, k_high.T, s_MN, input_precision=PRECISION)
        dp_MN = tl.dot(g_high, v_high.T, dp_MN, input_precision=PRECISION)
    p_MN = tl.math.exp2(s_MN * SCALE_LOG2 - lse[:, None])
    if MASKED:
        # A row of zeros for a key gives s = 0, and 2^-lse overflows where all scores are low.
        p_MN = tl.where(in_kv[None, :], p_MN, 0.0)
    ds_MN = (p_MN * (dp_MN - delta[:, None])).to(k_low.dtype)
    low = tl.dot(ds_MN, k_low, low, input_precision=PRECISION)
    if HIGH > 0:
        high = tl.dot(ds_MN, k_high, high, input_precision=PRECISION)
    return low, high


@triton.jit(do_not_specialize=_VARYING)
def backward_kv_kernel(
    grad_ptr,  # [Q, H, d], gradient of the output, rows grad_stride apart
    q_ptr,  # [Q, H, d], rows q_stride apart
    k_ptr,  # [T, H, d], rows kv_stride apart
    v_ptr,  # [T, H, d], rows kv_stride apart
    statistics_ptr,  # [H, slots * 128, 2] fp32: lse and delta side by side
    grad_k_ptr,  # [T, H, d], rows grad_kv_stride apart
    grad_v_ptr,  # [T, H, d], rows grad_kv_stride apart
    cu_q_ptr,  # [S + 1] int32
    cu_kv_ptr,  # [S + 1] int32
    owners_ptr,  # [slots of the keys] int32
    grad_stride,
    q_stride,
    kv_stride,
    grad_kv_stride,
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
    h = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    s, kv_start, kv_length, row, q_start, q_length = find_tile(
        tile, cu_kv_ptr, owners_ptr, cu_q_ptr, S, tokens, FIXED_K, FIXED_Q, BLOCK_N
    )
    if row >= kv_length:
        return
    n = tl.arange(0, BLOCK_N)
    in_kv = row + n < kv_length
    kv_row = (kv_start + row).to(tl.int64)
    k_ptr += kv_row * kv_stride + h * HEAD_DIM
    v_ptr += kv_row * kv_stride + h * HEAD_DIM
    q_ptr += q_start.to(tl.int64) * q_stride + h * HEAD_DIM
    grad_ptr += q_start.to(tl.int64) * grad_stride + h * HEAD_DIM
    statistics_ptr += 2 * (h.to(tl.int64) * slots * 128 + statistics_row(s, q_start, FIXED_Q))
    k_low = load_rows(k_ptr, kv_stride, n, in_kv, 0, LOW, HEAD_DIM, True)
    v_low = load_rows(v_ptr, kv_stride, n, in_kv, 0, LOW, HEAD_DIM, True)
    k_high = k_low
    v_high = v_low
    if HIGH > 0:
        k_high = load_rows(k_ptr, kv_stride, n, in_kv, LOW, HIGH, HEAD_DIM, True)
        v_high = load_rows(v_ptr, kv_stride, n, in_kv, LOW, HIGH, HEAD_DIM, True)

    dk_low = tl.zeros([BLOCK_N, LOW], tl.float32)
    dv_low = tl.zeros([BLOCK_N, LOW], tl.float32)
    dk_high = tl.zeros([BLOCK_N, HIGH if HIGH > 0 else 1], tl.float32)
    dv_high = tl.zeros([BLOCK_N, HIGH if HIGH > 0 else 1], tl.float32)
    for start in range(0, q_length, BLOCK_M):
        dk_low, dk_high, dv_low, dv_high = _add_to_grad_kv(
            k_low, k_high, v_low, v_high, q_ptr, grad_ptr, statistics_ptr, q_stride, grad_stride,
            start, q_length, dk_low, dk_high, dv_low, dv_high,
            HEAD_DIM, LOW, HIGH, SCALE_LOG2, BLOCK_M, FIXED_Q == 0 or FIXED_Q % BLOCK_M > 0, PRECISION,
        )  # fmt: skip

    grad_k_ptr += kv_row * grad_kv_stride + h * HEAD_DIM
    grad_v_ptr += kv_row * grad_kv_stride + h * HEAD_DIM
    store_rows(grad_k_ptr, grad_kv_stride, n, in_kv, dk_low * SCALE, 0, LOW, HEAD_DIM)
    store_rows(grad_v_ptr, grad_kv_stride, n, in_kv, dv_low, 0, LOW, HEAD_DIM)
    if HIGH > 0:
        store_rows(grad_k_ptr, grad_kv_stride, n, in_kv, dk_high * SCALE, LOW, HIGH, HEAD_DIM)
        store_rows(grad_v_ptr, grad_kv_stride, n, in_kv, dv_high, LOW, HIGH, HEAD_DIM)


@triton.jit
def _add_to_grad_kv(
    k_low, k_high, v_low, v_high, q_ptr, grad_ptr, statistics_ptr, q_stride, grad_stride,
    start, length, dk_low, dk_high, dv_low, dv_high,
    HEAD_DIM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Everything is kept transposed, keys by queries: no product then needs a transposed result,
    # the pattern that Triton 3.4 to 3.7 miscompiles on sm_90.
    m = tl.arange(0, BLOCK_M)
    in_q = start + m < length
    q_first = q_ptr + tl.cast(start, tl.int64) * q_stride
    g_first = grad_ptr + tl.cast(start, tl.int64) * grad_stride
    q_low = load_rows(q_first, q_stride, m, in_q, 0, LOW, HEAD_DIM, MASKED)
    g_low = load_rows(g_first, grad_stride, m, in_q, 0, LOW, HEAD_DIM, MASKED)
    s_NM = tl.dot(k_low, q_low.T, input_precision=PRECISION)
    q_high = q_low
    g_high = g_low
    if HIGH > 0:
        q_high = load_rows(q_first, q_stride, m, in_q, LOW, HIGH, HEAD_DIM, MASKED)
        g_high = load_rows(g_first, grad_stride, m, in_q, LOW, HIGH, HEAD_DIM, MASKED)
        s_NM = tl.dot(k_high, q_high.T, s_NM, input_precision=PRECISION)
    # One load of both statistics: of one alone, with fewer elements than threads, Triton 3.6 makes
    # every thread fetch all it needs, 16 loads of 4 bytes each.
    pair = 2 * (start + m[:, None]) + tl.arange(0, 2)[None, :]
    lse, delta = tl.split(tl.load(statistics_ptr + pair))
    p_NM = tl.math.exp2(s_NM * SCALE_LOG2 - lse[None, :])
    p_rounded = p_NM.to(g_low.dtype)
    dv_low = tl.dot(p_rounded, g_low, dv_low, input_precision=PRECISION)
    dp_NM = tl.dot(v_low, g_low.T, input_precision=PRECISION)
    if HIGH > 0:
        dv_high = tl.dot(p_rounded, g_high, dv_high, input_precision=PRECISION)
        dp_NM = tl.dot(v_high, g_high.T, dp_NM, input_precision=PRECISION)
    ds_NM = (p_NM * (dp_NM - delta[None, :])).to(q_low.dtype)
    dk_low = tl.dot(ds_NM, q_low, dk_low, input_precision=PRECISION)
    if HIGH > 0:
        dk_high = tl.dot(ds_NM, q_high, dk_high, input_precision=PRECISION)
    return dk_low, dk_high, dv_low, dv_high


def launch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_kv: Tensor,
    owners: tuple[Tensor | None, Tensor | None],
    fixed: tuple[int, int] | None,
    grads: tuple[Tensor, Tensor, Tensor],
    tiles: tuple[Tile, Tile],
) -> None:
    """Write the gradients of q, k and v into `grads`, tensors shaped as they are.

    grad, out: [Q, H, d] contiguous. owners: of the slots of the queries and of the keys.
    tiles: of the dQ kernel and of the dK, dV kernel.
    """
    (Q, H, d), T = q.shape, len(k)
    S = len(cu_q) - 1
    grad_q, grad_k, grad_v = grads
    q_tile, kv_tile = tiles
    slots = slot_count(Q, S, fixed and fixed[0])
    # The second kernel reads statistics in whole blocks: the first must have written them so.
    assert q_tile.block_m % kv_tile.block_m == 0
    statistics = torch.empty(H, slots * SLOT, 2, dtype=torch.float32, device=q.device)
    constants = kernel_constants(d, q.dtype, fixed)
    if fixed is None:
        q_tiles = slots * (SLOT // q_tile.block_m)
        kv_tiles = slot_count(T, S, None) * (SLOT // kv_tile.block_n)
    else:
        q_tiles = S * triton.cdiv(fixed[0], q_tile.block_m)
        kv_tiles = S * triton.cdiv(fixed[1], kv_tile.block_n)
    if Q * H > 0:
        backward_q_kernel[(q_tiles * H,)](
            grad, q, k, v, out, lse, statistics, grad_q, cu_q, cu_kv,
            cu_q if owners[0] is None else owners[0],
            grad.stride(0), q.stride(0), k.stride(0), grad_q.stride(0), H, S, Q, slots,
            **constants, BLOCK_M=q_tile.block_m, BLOCK_N=q_tile.block_n,
            num_warps=q_tile.num_warps, num_stages=q_tile.num_stages,
        )  # fmt: skip
    if T * H > 0:
        backward_kv_kernel[(kv_tiles * H,)](
            grad, q, k, v, statistics, grad_k, grad_v, cu_q, cu_kv,
            cu_kv if owners[1] is None else owners[1],
            grad.stride(0), q.stride(0), k.stride(0), grad_k.stride(0), H, S, T, slots,
            **constants, BLOCK_M=kv_tile.block_m, BLOCK_N=kv_tile.block_n,
            num_warps=kv_tile.num_warps, num_stages=kv_tile.num_stages,
        )  # fmt: skip
