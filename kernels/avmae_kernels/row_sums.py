"""Sums over the rows of a gradient in a fixed order: parameter gradients without atomics.

Shape letters: B clips, L rows of a clip, D channels, K rows picked in each clip, N positions of a
table.
"""

import itertools

import torch
from torch import Tensor

from avmae_kernels._column_sums import PROGRAMS, add_partials, partial_count
from avmae_kernels._resources import CompileCase
from avmae_kernels._tiles import column_block
from avmae_kernels._triton import tl, triton

_ELEMENTS, _WARPS = 2048, 4
_COUNTS = ["total", "K", "first", "per_part", "index_b", "index_k", "B", "N"]


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=["index_ptr"])
def _partial_sums_kernel(
    x_ptr,  # [B, L, D], strides of B and L below
    index_ptr,  # [B, K] int64 or None
    partial_ptr,  # [parts, D] fp32
    total, K, first, per_part, index_b, index_k, x_b, x_l,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program sums the rows [part * per_part, (part + 1) * per_part) of BLOCK channels.
    part = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sum_RD = tl.zeros([ROWS, BLOCK], tl.float32)
    last = tl.minimum(part * per_part + per_part, total)
    for start in range(part * per_part, last, ROWS):
        row_R = start + tl.arange(0, ROWS)
        live_R = row_R < last
        clip_R = (row_R // K).to(tl.int64)
        if index_ptr is None:
            line_R = (first + row_R % K).to(tl.int64)
        else:
            where_R = index_ptr + clip_R * index_b + row_R % K * index_k
            line_R = tl.load(where_R, mask=live_R, other=0)
        live_RD = live_R[:, None]
        if D % BLOCK != 0:
            live_RD = live_RD & (d < D)[None, :]
        x_RD = x_ptr + (clip_R * x_b + line_R * x_l)[:, None] + d[None, :]
        sum_RD += tl.load(x_RD, mask=live_RD, other=0.0).to(tl.float32)
    tl.store(partial_ptr + part * D + d, tl.sum(sum_RD, 0), mask=d < D)


@triton.jit(do_not_specialize=_COUNTS)
def _sum_by_position_kernel(
    x_ptr,  # [B, L, D], strides of B and L below
    line_ptr,  # [B, N] int32, the row of x that belongs to a position, -1 for none
    out_ptr,  # [N, D] fp32
    B, N, x_b, x_l,
    D: tl.constexpr, CLIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program sums over the clips at one position, for BLOCK channels.
    position = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sum_BD = tl.zeros([CLIPS, BLOCK], tl.float32)
    for start in range(0, B, CLIPS):
        clip_B = (start + tl.arange(0, CLIPS)).to(tl.int64)
        line_B = tl.load(line_ptr + clip_B * N + position, mask=clip_B < B, other=-1)
        live_BD = (line_B >= 0)[:, None]
        if D % BLOCK != 0:
            live_BD = live_BD & (d < D)[None, :]
        x_BD = x_ptr + (clip_B * x_b + line_B.to(tl.int64) * x_l)[:, None] + d[None, :]
        sum_BD += tl.load(x_BD, mask=live_BD, other=0.0).to(tl.float32)
    tl.store(out_ptr + position * D + d, tl.sum(sum_BD, 0), mask=d < D)


def sum_rows(x: Tensor, count: int, *, first: int = 0, index: Tensor | None = None) -> Tensor:
    """The sum of `count` rows of every clip of x [B, L, D], in fp32: [D].

    The rows are `index[b]` where there is an index [B, count], else the `count` from `first` on.
    """
    x = _with_packed_channels(x)
    B, _, D = x.shape
    block = column_block(D, 128)
    rows, columns = _ELEMENTS // block, triton.cdiv(D, block)
    total = B * count
    parts = partial_count(x.device, triton.cdiv(total, rows), columns)
    partial = x.new_empty(1, parts, D, dtype=torch.float32)
    out = x.new_empty(D, dtype=torch.float32)
    _partial_sums_kernel[(parts, columns)](
        x,
        index,
        partial,
        total,
        max(count, 1),
        first,
        triton.cdiv(total, parts),
        *((0, 0) if index is None else index.stride()),
        x.stride(0),
        x.stride(1),
        D=D,
        ROWS=rows,
        BLOCK=block,
        num_warps=_WARPS,
    )
    add_partials(partial, [out])
    return out


def sum_by_position(x: Tensor, index: Tensor, line: Tensor, positions: int) -> Tensor:
    """The gradient of a table that was read at `index`, in fp32: [positions, D].

    Args:
        x: gradient rows of every clip, [B, L, D].
        index: the position that was read, [B, K] int64, no position twice in a clip.
        line: the row of x that belongs to it, [B, K] or [1, K] integers.
        positions: rows of the table.
    """
    x = _with_packed_channels(x)
    B, _, D = x.shape
    # Which row belongs to a position: the other way round than a gather has it.
    lines = index.new_full((B, positions), -1, dtype=torch.int32)
    lines.scatter_(1, index, line.to(torch.int32).expand_as(index))
    out = x.new_empty(positions, D, dtype=torch.float32)
    block = column_block(D, 128)
    _sum_by_position_kernel[(positions, triton.cdiv(D, block))](
        x,
        lines,
        out,
        B,
        positions,
        x.stride(0),
        x.stride(1),
        D=D,
        CLIPS=_ELEMENTS // block,
        BLOCK=block,
        num_warps=_WARPS,
    )
    return out


def _with_packed_channels(x: Tensor) -> Tensor:
    # Autograd hands out expanded gradients, as that of a sum; only those are copied.
    return x if x.stride(-1) == 1 else x.contiguous()


def compile_cases() -> list[CompileCase]:
    """The shipped configurations of both sums."""
    cases = []
    for arch, D, kind in itertools.product(PROGRAMS, (192, 384), ("fp32", "bf16")):
        block = column_block(D, 128)
        shared = {"D": D, "BLOCK": block}
        lines = {"x_ptr": f"*{kind}", "x_b": "i32", "x_l": "i32"}
        counts = dict.fromkeys(("total", "K", "first", "per_part", "index_b", "index_k"), "i32")
        cases.append(
            CompileCase(
                op="sum_rows",
                config=f"D{D} {kind}",
                kernel=_partial_sums_kernel,
                arch=arch,
                signature={**lines, **counts, "partial_ptr": "*fp32"},
                constexprs={**shared, "ROWS": _ELEMENTS // block, "index_ptr": None},
                aligned=("x_ptr", "x_b", "x_l", "partial_ptr"),
                num_warps=_WARPS,
                wide_stores=False,
                min_blocks=8,
            )
        )
        cases.append(
            CompileCase(
                op="sum_by_position",
                config=f"D{D} {kind}",
                kernel=_sum_by_position_kernel,
                arch=arch,
                signature={**lines, "line_ptr": "*i32", "out_ptr": "*fp32", "B": "i32", "N": "i32"},
                constexprs={**shared, "CLIPS": _ELEMENTS // block},
                aligned=("x_ptr", "x_b", "x_l", "out_ptr"),
                num_warps=_WARPS,
                wide_stores=False,
                min_blocks=8,
            )
        )
    return cases
