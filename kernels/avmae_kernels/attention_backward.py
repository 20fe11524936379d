"""The backward kernels of packed attention: dQ (and delta), then dK and dV. No atomics.

Shape letters: Q, T query and key tokens, S sequences, H heads, d head_dim; M, N queries and keys
of a tile. Source: arXiv:2307.08691, algorithm 2, as two passes: each output row has one writer, so
the gradient is the same in every run. P = 2^(s * scale * log2(e) - lse) is built again in each.
"""

from collections.abc import Sequence

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
    load_statistics,
    slot_count,
    statistics_row,
    store_head,
    zero_head,
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
    delta_ptr,  # [H, slots * 128] fp32, written here
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
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta and dQ of one tile of queries of one head: dQ = (P * (dO V^T - delta)) K."""
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
    grad_first = q_row * grad_stride + h * HEAD_DIM
    kv_first = kv_start.to(tl.int64) * kv_stride + h * HEAD_DIM
    q = load_head(q_ptr, q_stride, m, in_q, HEAD_DIM, LOW, HIGH, True)
    g = load_head(grad_ptr + grad_first, grad_stride, m, in_q, HEAD_DIM, LOW, HIGH, True)
    out = load_head(out_ptr + grad_first, grad_stride, m, in_q, HEAD_DIM, LOW, HIGH, True)
    delta = tl.sum(g[0].to(tl.float32) * out[0].to(tl.float32), 1)
    if HIGH > 0:
        delta += tl.sum(g[1].to(tl.float32) * out[1].to(tl.float32), 1)
    entry = h.to(tl.int64) * slots * 128 + statistics_row(s, q_start, FIXED_Q) + row
    lse = tl.load(lse_ptr + entry + m, mask=in_q, other=float("inf"))
    # Rows past the end get a zero: a block that reads them must find a number.
    tl.store(delta_ptr + entry + m, delta)

    grad_q = zero_head(BLOCK_M, LOW, HIGH)
    # As in the forward pass: the one block of keys that may be short goes first.
    last = tl.maximum((kv_length + BLOCK_N - 1) // BLOCK_N - 1, 0) * BLOCK_N
    in_kv = last + n < kv_length
    first = kv_first + tl.cast(last, tl.int64) * kv_stride
    k = load_head(k_ptr + first, kv_stride, n, in_kv, HEAD_DIM, LOW, HIGH, True)
    v = load_head(v_ptr + first, kv_stride, n, in_kv, HEAD_DIM, LOW, HIGH, True)
    grad_q = _add_to_grad_q(grad_q, q, g, k, v, lse, delta, in_kv, SCALE_LOG2, True, PRECISION)
    for start in range(0, last, BLOCK_N):
        first = kv_first + tl.cast(start, tl.int64) * kv_stride
        k = load_head(k_ptr + first, kv_stride, n, in_kv, HEAD_DIM, LOW, HIGH, False)
        v = load_head(v_ptr + first, kv_stride, n, in_kv, HEAD_DIM, LOW, HIGH, False)
        grad_q = _add_to_grad_q(grad_q, q, g, k, v, lse, delta, in_kv, SCALE_LOG2, False, PRECISION)

    grad_q_ptr += q_row * grad_q_stride + h * HEAD_DIM
    store_head(grad_q_ptr, grad_q_stride, m, in_q, grad_q, SCALE, HEAD_DIM)


@triton.jit
def _add_to_grad_q(
    grad_q, q, g, k, v, lse, delta, in_kv,
    SCALE_LOG2: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    s_MN = inner_products(q, k, PRECISION)
    dp_MN = inner_products(g, v, PRECISION)
    p_MN = tl.math.exp2(s_MN * SCALE_LOG2 - lse[:, None])
    if MASKED:
        # A row of zeros for a key gives s = 0, and 2^-lse overflows where all scores are low.
        p_MN = tl.where(in_kv[None, :], p_MN, 0.0)
    ds_MN = p_MN * (dp_MN - delta[:, None])
    return add_product(grad_q, ds_MN.to(k[0].dtype), k, PRECISION)


@triton.jit(do_not_specialize=_VARYING)
def backward_kv_kernel(
    grad_ptr,  # [Q, H, d], gradient of the output, rows grad_stride apart
    q_ptr,  # [Q, H, d], rows q_stride apart
    k_ptr,  # [T, H, d], rows kv_stride apart
    v_ptr,  # [T, H, d], rows kv_stride apart
    lse_ptr,  # [H, slots * 128] fp32
    delta_ptr,  # [H, slots * 128] fp32
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
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one head: dV = P^T dO, dK = (P * (dO V^T - delta))^T Q."""
    h = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    s, kv_start, kv_length, row, q_start, q_length = find_tile(
        tile, cu_kv_ptr, owners_ptr, cu_q_ptr, S, tokens, FIXED_K, FIXED_Q, BLOCK_N
    )
    if row >= kv_length:
        return
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_kv = row + n < kv_length
    kv_row = (kv_start + row).to(tl.int64)
    kv_first = kv_row * kv_stride + h * HEAD_DIM
    k = load_head(k_ptr + kv_first, kv_stride, n, in_kv, HEAD_DIM, LOW, HIGH, True)
    v = load_head(v_ptr + kv_first, kv_stride, n, in_kv, HEAD_DIM, LOW, HIGH, True)
    q_ptr += q_start.to(tl.int64) * q_stride + h * HEAD_DIM
    grad_ptr += q_start.to(tl.int64) * grad_stride + h * HEAD_DIM
    entry = h.to(tl.int64) * slots * 128 + statistics_row(s, q_start, FIXED_Q)

    grad_k, grad_v = zero_head(BLOCK_N, LOW, HIGH), zero_head(BLOCK_N, LOW, HIGH)
    MASKED: tl.constexpr = FIXED_Q == 0 or FIXED_Q % BLOCK_M != 0
    for start in range(0, q_length, BLOCK_M):
        in_q = start + m < q_length
        q_first = q_ptr + tl.cast(start, tl.int64) * q_stride
        grad_first = grad_ptr + tl.cast(start, tl.int64) * grad_stride
        q = load_head(q_first, q_stride, m, in_q, HEAD_DIM, LOW, HIGH, MASKED)
        g = load_head(grad_first, grad_stride, m, in_q, HEAD_DIM, LOW, HIGH, MASKED)
        # All is kept transposed, keys by queries: no product then needs a transposed result, the
        # pattern that Triton 3.4 to 3.7 miscompiles on sm_90.
        s_NM = inner_products(k, q, PRECISION)
        # Rows past the end are zeros, statistics included: they weigh 1, and add nothing.
        lse = load_statistics(lse_ptr + entry + start, m, in_q, MASKED)
        p_NM = tl.math.exp2(s_NM * SCALE_LOG2 - lse[None, :])
        grad_v = add_product(grad_v, p_NM.to(g[0].dtype), g, PRECISION)
        dp_NM = inner_products(v, g, PRECISION)
        # Loaded as late as it is needed, for the sake of registers.
        delta = load_statistics(delta_ptr + entry + start, m, in_q, MASKED)
        ds_NM = p_NM * (dp_NM - delta[None, :])
        grad_k = add_product(grad_k, ds_NM.to(q[0].dtype), q, PRECISION)

    grad_first = kv_row * grad_kv_stride + h * HEAD_DIM
    store_head(grad_k_ptr + grad_first, grad_kv_stride, n, in_kv, grad_k, SCALE, HEAD_DIM)
    store_head(grad_v_ptr + grad_first, grad_kv_stride, n, in_kv, grad_v, 1.0, HEAD_DIM)


def launch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seqs: Sequences,
    grads: Sequence[Tensor],
    tiles: tuple[Tile, Tile],
) -> None:
    """Write the gradients of q, k and v into the three `grads`, tensors shaped as they are.

    grad, out: [Q, H, d] contiguous. tiles: of the dQ kernel and of the dK, dV kernel.
    """
    grad_q, *grad_kv = grads
    q_tile, kv_tile = tiles
    delta = launch_backward_q(grad, q, k, v, out, lse, seqs, grad_q, q_tile)
    launch_backward_kv(grad, q, k, v, lse, delta, seqs, grad_kv, kv_tile)


def launch_backward_q(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seqs: Sequences,
    grad_q: Tensor,
    tile: Tile,
) -> Tensor:
    """Write the gradient of q, and return delta, the row sums of grad * out, laid out as `lse`."""
    cu_q, cu_kv, owners, _, fixed = seqs
    Q, H, d = q.shape
    S = len(cu_q) - 1
    slots = slot_count(Q, S, fixed and fixed[0])
    delta = torch.empty(H, slots * SLOT, dtype=torch.float32, device=q.device)
    if Q * H == 0:
        return delta
    if fixed is None:
        tiles = slots * (SLOT // tile.block_m)
    else:
        tiles = S * -(-fixed[0] // tile.block_m)
    backward_q_kernel[(tiles * H,)](
        grad, q, k, v, out, lse, delta, grad_q, cu_q, cu_kv, cu_q if owners is None else owners,
        grad.stride(0), q.stride(0), k.stride(0), grad_q.stride(0), H, S, Q, slots,
        **kernel_constants(d, q.dtype, fixed), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return delta


def launch_backward_kv(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    seqs: Sequences,
    grads: Sequence[Tensor],
    tile: Tile,
) -> None:
    """Write the gradients of k and v into the two `grads`; delta: from `launch_backward_q`."""
    cu_q, cu_kv, _, owners, fixed = seqs
    T, H, d = k.shape
    S = len(cu_q) - 1
    slots = slot_count(len(q), S, fixed and fixed[0])
    grad_k, grad_v = grads
    if T * H == 0:
        return
    if fixed is None:
        tiles = slot_count(T, S, None) * (SLOT // tile.block_n)
    else:
        tiles = S * -(-fixed[1] // tile.block_n)
    backward_kv_kernel[(tiles * H,)](
        grad, q, k, v, lse, delta, grad_k, grad_v, cu_q, cu_kv, cu_kv if owners is None else owners,
        grad.stride(0), q.stride(0), k.stride(0), grad_k.stride(0), H, S, T, slots,
        **kernel_constants(d, q.dtype, fixed), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
