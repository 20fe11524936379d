"""Packed attention for Hopper (sm_90): tiles come through tensor descriptors, by the copy engine.

Shape letters: Q, T query and key tokens, S sequences, H heads, d head_dim; M, N queries and keys
of a tile. The sums are those of attention_forward and attention_backward. A descriptor knows where
a tensor ends and fills a tile with zeros from there on, so no thread computes an address or a mask,
and no register holds one. With a fixed length it knows where each sequence ends. Where lengths
vary, rows of the next sequence would follow, which may be NaN, so the one block of keys that may be
short is read by masked loads.

Descriptors are made on the host and passed by value: no allocator, and a CUDA graph keeps them.
dK and dV of fixed lengths have a kernel of their own here, in fewer registers than the one that
loads by address: three blocks on a processor instead of two for head_dim 64, four instead of three
for 32, and for 128 blocks of twice the queries. The other gradients come from the kernels for all
GPUs: no more blocks of dQ would fit, and where lengths vary every block would need a mask.

Not warp-specialised: what `tl.range(..., warp_specialize=True)` of Triton 3.6 makes of this kernel
for sm_90 compiles without a word and is of no use. A tile of 128 rows is split between two groups
of warps, but not the box of a host's descriptor: copies bring twice what a group has memory for.
Of 64 rows both groups compute all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from avmae_kernels._check import wanted
from avmae_kernels._triton import tl, triton
from avmae_kernels.attention_backward import launch_backward_kv, launch_backward_q
from avmae_kernels.attention_forward import attend_block, finish_rows
from avmae_kernels.attention_layout import (
    SLOT,
    Sequences,
    Tile,
    add_product,
    find_tile,
    inner_products,
    kernel_constants,
    load_head,
    slot_count,
    statistics_row,
    store_head,
    zero_head,
)

# Boxes of the copy engine: powers of two. Other heads, and float32, have the kernels for all GPUs.
HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16)
# What the copy engine wants of addresses and strides, in bytes.
ALIGNMENT = 16


@triton.jit(do_not_specialize=["heads", "S", "tokens", "slots"])
def hopper_forward_kernel(
    q_desc,  # [S, FIXED_Q, H * d], or [1, Q, H * d] where lengths vary; boxes [1, M, d]
    k_desc,  # [S, FIXED_K, H * d], or [1, T, H * d]; boxes [1, N, d]
    v_desc,  # likewise
    k_ptr,  # [T, H, d], rows kv_stride apart
    v_ptr,  # [T, H, d], rows kv_stride apart
    out_ptr,  # [Q, H, d]
    lse_ptr,  # [H, slots * 128] fp32, in powers of two
    cu_q_ptr,  # [S + 1] int32
    cu_kv_ptr,  # [S + 1] int32
    owners_ptr,  # [slots] int32
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
    PEELED: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head against all keys of its sequence, block after block.

    PEELED: the last block of keys, which may be short, goes first, and the loop needs no mask.
    Otherwise every block is masked, for the sake of shared memory.
    """
    tl.static_assert(HIGH == 0)
    tl.static_assert(PEELED or FIXED_K > 0)
    h = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    s, q_start, q_length, row, kv_start, kv_length = find_tile(
        tile, cu_q_ptr, owners_ptr, cu_kv_ptr, S, tokens, FIXED_Q, FIXED_K, BLOCK_M
    )
    if row >= q_length:
        return
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_q = row + m < q_length
    column = h * HEAD_DIM
    if FIXED_K > 0:
        q = load_box(q_desc, s, row, column)
        box, kv_row = s, 0
    else:
        # Rows past the end are those of the next sequence: they are computed, and not stored.
        q = load_box(q_desc, 0, q_start + row, column)
        box, kv_row = 0, kv_start

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = zero_head(BLOCK_M, LOW, HIGH)
    if PEELED:
        end = tl.maximum((kv_length + BLOCK_N - 1) // BLOCK_N - 1, 0) * BLOCK_N
        in_kv = end + n < kv_length
        if FIXED_K > 0:
            k = load_box(k_desc, box, end, column)
            v = load_box(v_desc, box, end, column)
        else:
            first = (kv_start + end).to(tl.int64) * kv_stride + column
            k = load_head(k_ptr + first, kv_stride, n, in_kv, HEAD_DIM, LOW, HIGH, True)
            v = load_head(v_ptr + first, kv_stride, n, in_kv, HEAD_DIM, LOW, HIGH, True)
        top, total, out = attend_block(q, k, v, in_kv, top, total, out, SCALE_LOG2, True, PRECISION)
    else:
        end = kv_length
    for start in range(0, end, BLOCK_N):
        in_kv = start + n < kv_length
        k = load_box(k_desc, box, kv_row + start, column)
        v = load_box(v_desc, box, kv_row + start, column)
        top, total, out = attend_block(
            q, k, v, in_kv, top, total, out, SCALE_LOG2, not PEELED, PRECISION
        )

    lse_ptr += h.to(tl.int64) * slots * 128 + statistics_row(s, q_start, FIXED_Q) + row
    out_ptr += (q_start + row).to(tl.int64) * out_stride + column
    finish_rows(out_ptr, out_stride, lse_ptr, m, in_q, top, total, out, HEAD_DIM)


@triton.jit(do_not_specialize=["heads"])
def hopper_backward_kv_kernel(
    grad_desc,  # [S, FIXED_Q, H * d], gradient of the output; boxes [1, M, d]
    q_desc,  # [S, FIXED_Q, H * d]; boxes [1, M, d]
    k_desc,  # [S, FIXED_K, H * d]; boxes [1, N, d]
    v_desc,  # [S, FIXED_K, H * d]; boxes [1, N, d]
    lse_desc,  # [H, slots * 128] fp32; boxes [1, M]
    delta_desc,  # [H, slots * 128] fp32; boxes [1, M]
    grad_k_ptr,  # [S * FIXED_K, H, d], rows grad_kv_stride apart
    grad_v_ptr,  # [S * FIXED_K, H, d], rows grad_kv_stride apart
    grad_kv_stride,
    heads,
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
    tl.static_assert(HIGH == 0)
    TILES: tl.constexpr = (FIXED_K + BLOCK_N - 1) // BLOCK_N
    h = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    s, row = tile // TILES, (tile % TILES) * BLOCK_N
    column = h * HEAD_DIM
    k = load_box(k_desc, s, row, column)
    v = load_box(v_desc, s, row, column)
    entry = statistics_row(s, s * FIXED_Q, FIXED_Q)

    grad_k, grad_v = zero_head(BLOCK_N, LOW, HIGH), zero_head(BLOCK_N, LOW, HIGH)
    for start in range(0, FIXED_Q, BLOCK_M):
        # Past the end q, its gradient and delta are zeros, and the log-sum-exp is some number: what
        # such rows weigh is finite, and adds nothing. All is kept transposed, as in the kernel for
        # all GPUs: no product needs a transposed result.
        q = load_box(q_desc, s, start, column)
        s_NM = inner_products(k, q, PRECISION)
        lse = load_numbers(lse_desc, h, entry + start)
        p_NM = tl.math.exp2(s_NM * SCALE_LOG2 - lse[None, :])
        g = load_box(grad_desc, s, start, column)
        grad_v = add_product(grad_v, p_NM.to(g[0].dtype), g, PRECISION)
        dp_NM = inner_products(v, g, PRECISION)
        delta = load_numbers(delta_desc, h, entry + start)
        ds_NM = p_NM * (dp_NM - delta[None, :])
        grad_k = add_product(grad_k, ds_NM.to(q[0].dtype), q, PRECISION)

    n = tl.arange(0, BLOCK_N)
    in_kv = row + n < FIXED_K
    first = (s * FIXED_K + row).to(tl.int64) * grad_kv_stride + column
    store_head(grad_k_ptr + first, grad_kv_stride, n, in_kv, grad_k, SCALE, HEAD_DIM)
    store_head(grad_v_ptr + first, grad_kv_stride, n, in_kv, grad_v, 1.0, HEAD_DIM)


@triton.jit
def load_box(desc, box, row, column):
    """Rows of one head from descriptor [boxes, rows, H * d], as a tuple of one tile; zeros past
    its end."""
    tile = desc.load([box, row, column])
    return (tile.reshape(tile.shape[1], tile.shape[2]),)


@triton.jit
def load_numbers(desc, h, row):
    """One number for each row of head h from descriptor [H, rows]."""
    numbers = desc.load([h, row])
    return numbers.reshape(numbers.shape[1])


def why_unsupported(dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps these kernels from heads of this kind, or None."""
    if dtype not in DTYPES:
        return f"it wants bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"it wants head_dim {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    return None


def why_misplaced(**heads: Tensor) -> str | None:
    """What keeps the copy engine from reading these tensors [T, H, d] where they lie, or None.

    Where they start is not known while torch.compile traces: the launch looks again.
    """
    for name, x in heads.items():
        apart = x.stride(0) * x.itemsize
        if apart % ALIGNMENT:
            where = f"those of {name} are {apart}"
            return f"it wants tokens a multiple of {ALIGNMENT} bytes apart, {where}"
        if torch.compiler.is_compiling():
            continue
        offset = x.storage_offset() * x.itemsize
        if offset % ALIGNMENT:
            where = f"{name} starts {offset} bytes into its storage"
            return f"it wants tensors that start on a multiple of {ALIGNMENT} bytes, {where}"
    return None


def launch_hopper_forward(
    q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, tile: Tile
) -> tuple[Tensor, Tensor]:
    """As `launch_forward`: the output [Q, H, d] and its log-sum-exp by slot."""
    cu_q, cu_kv, owners, _, fixed = seqs
    Q, H, d = q.shape
    S = len(cu_q) - 1
    slots = slot_count(Q, S, fixed and fixed[0])
    out = torch.empty(Q, H, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(H, slots * SLOT, dtype=torch.float32, device=q.device)
    if Q * H == 0:
        return out, lse
    if len(k) == 0:
        # There is nothing to describe.
        return out.zero_(), lse.fill_(float("inf"))
    q_length, kv_length = fixed or (None, None)
    descriptors = (
        _rows_of_heads(q, q_length, tile.block_m),
        _rows_of_heads(k, kv_length, tile.block_n),
        _rows_of_heads(v, kv_length, tile.block_n),
    )
    if fixed is None:
        tiles = slots * (SLOT // tile.block_m)
    else:
        tiles = S * -(-fixed[0] // tile.block_m)
    hopper_forward_kernel[(tiles * H,)](
        *descriptors, k, v, out, lse, cu_q, cu_kv, cu_q if owners is None else owners,
        k.stride(0), out.stride(0), H, S, Q, slots,
        **kernel_constants(d, q.dtype, fixed), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        PEELED=tile.peeled, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out, lse


def launch_hopper_backward(
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
    """As `launch_backward`; `lse` may come from any forward kernel of a tile of as many rows."""
    grad_q, *grad_kv = grads
    q_tile, kv_tile = tiles
    delta = launch_backward_q(grad, q, k, v, out, lse, seqs, grad_q, q_tile)
    if seqs.fixed is None:
        launch_backward_kv(grad, q, k, v, lse, delta, seqs, grad_kv, kv_tile)
    else:
        _backward_kv(grad, q, k, v, lse, delta, seqs.fixed, grad_kv, kv_tile)


def _backward_kv(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    fixed: tuple[int, int],
    grads: Sequence[Tensor],
    tile: Tile,
) -> None:
    T, H, d = k.shape
    if T * H == 0:
        return
    if grad.data_ptr() % ALIGNMENT:
        grad = grad.clone()
    grad_k, grad_v = grads
    q_length, kv_length = fixed
    tiles = T // kv_length * -(-kv_length // tile.block_n)
    hopper_backward_kv_kernel[(tiles * H,)](
        _rows_of_heads(grad, q_length, tile.block_m), _rows_of_heads(q, q_length, tile.block_m),
        _rows_of_heads(k, kv_length, tile.block_n), _rows_of_heads(v, kv_length, tile.block_n),
        _describe(lse, lse.shape, lse.stride(), (1, tile.block_m)),
        _describe(delta, delta.shape, delta.stride(), (1, tile.block_m)),
        grad_k, grad_v, grad_k.stride(0), H,
        **kernel_constants(d, q.dtype, fixed), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _rows_of_heads(x: Tensor, length: int | None, block: int) -> Any:
    """A descriptor of x [T, H, d] as [S, length, H * d], or [1, T, H * d] where lengths vary."""
    T, H, d = x.shape
    length = T if length is None else length
    row = x.stride(0)
    # The stride of a single sequence is never used, and must be a small number.
    sequence = length * row if T > length else row
    return _describe(x, (T // length, length, H * d), (sequence, row, 1), (1, block, d))


def _describe(
    x: Tensor, shape: Sequence[int], strides: Sequence[int], block: tuple[int, ...]
) -> Any:
    if x.data_ptr() % ALIGNMENT:
        want = f"tensors that start on a multiple of {ALIGNMENT} bytes"
        raise wanted("packed attention by 'triton-hopper'", want, tensor=x)
    # Not at the top: this file is imported where Triton is not installed, too.
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(shape), list(strides), list(block))
