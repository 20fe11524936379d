"""The kernels of `add_layer_norm`: one pass over memory forward, one backward.

Shape letters: T tokens, D channels, R tokens of one block, P partial sums.
"""

import torch
from torch import Tensor

from avmae_kernels._column_sums import PROGRAMS, add_partials, partial_count
from avmae_kernels._resources import CompileCase
from avmae_kernels._triton import tl, triton


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    x_ptr,  # [T, D]
    update_ptr,  # [T, D]
    update_bias_ptr,  # [D]
    row_scale_ptr,  # [T]
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    total_ptr,  # [T, D]
    y_ptr,  # [T, D]
    mean_ptr,  # [T] fp32
    rstd_ptr,  # [T] fp32
    T,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_UPDATE_BIAS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
):  # fmt: skip
    row_R1 = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    d_1D = tl.arange(0, BLOCK_D)[None, :]
    in_rows, in_row = row_R1 < T, d_1D < D
    inside = in_rows & in_row
    offset = row_R1.to(tl.int64) * D + d_1D

    total_RD = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        update_RD = tl.load(update_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if HAS_UPDATE_BIAS:
            update_RD += tl.load(update_bias_ptr + d_1D, mask=in_row, other=0.0).to(tl.float32)
        if HAS_ROW_SCALE:
            update_RD *= tl.load(row_scale_ptr + row_R1, mask=in_rows, other=0.0)
        # The backward pass reads the rounded sum again, so the statistics are of that one.
        rounded_RD = (total_RD + update_RD).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offset, rounded_RD, mask=inside)
        total_RD = rounded_RD.to(tl.float32)

    # Two passes over registers: the mean of squares minus the squared mean would cancel.
    mean_R1 = tl.sum(total_RD, 1, keep_dims=True) / D
    centred_RD = tl.where(in_row, total_RD - mean_R1, 0.0)
    rstd_R1 = tl.rsqrt(tl.sum(centred_RD * centred_RD, 1, keep_dims=True) / D + eps)
    weight_1D = tl.load(weight_ptr + d_1D, mask=in_row, other=0.0).to(tl.float32)
    bias_1D = tl.load(bias_ptr + d_1D, mask=in_row, other=0.0).to(tl.float32)
    y_RD = centred_RD * rstd_R1 * weight_1D + bias_1D
    tl.store(y_ptr + offset, y_RD.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row_R1, mean_R1, mask=in_rows)
    tl.store(rstd_ptr + row_R1, rstd_R1, mask=in_rows)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    grad_y_ptr,  # [T, D]
    grad_total_ptr,  # [T, D]
    total_ptr,  # [T, D]
    mean_ptr,  # [T] fp32
    rstd_ptr,  # [T] fp32
    weight_ptr,  # [D]
    row_scale_ptr,  # [T]
    grad_x_ptr,  # [T, D]
    grad_update_ptr,  # [T, D]
    partial_ptr,  # [2 or 3, P, D] fp32: weight, bias, update_bias
    T,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_GRAD_TOTAL: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    WRITES_UPDATE: tl.constexpr,
    HAS_UPDATE_BIAS: tl.constexpr,
):  # fmt: skip
    p, P = tl.program_id(0), tl.num_programs(0)
    d_1D = tl.arange(0, BLOCK_D)[None, :]
    in_row = d_1D < D
    weight_1D = tl.load(weight_ptr + d_1D, mask=in_row, other=0.0).to(tl.float32)
    grad_weight_RD = tl.zeros([ROWS, BLOCK_D], tl.float32)
    grad_bias_RD = tl.zeros([ROWS, BLOCK_D], tl.float32)
    grad_update_bias_RD = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for block in tl.range(p, tl.cdiv(T, ROWS), P, num_stages=STAGES):
        row_R1 = (block * ROWS + tl.arange(0, ROWS))[:, None]
        in_rows = row_R1 < T
        inside = in_rows & in_row
        offset = row_R1.to(tl.int64) * D + d_1D
        grad_y_RD = tl.load(grad_y_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        total_RD = tl.load(total_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        mean_R1 = tl.load(mean_ptr + row_R1, mask=in_rows, other=0.0)
        rstd_R1 = tl.load(rstd_ptr + row_R1, mask=in_rows, other=0.0)

        normal_RD = (total_RD - mean_R1) * rstd_R1
        grad_normal_RD = grad_y_RD * weight_1D
        along_R1 = tl.sum(normal_RD * grad_normal_RD, 1, keep_dims=True) / D
        level_R1 = tl.sum(grad_normal_RD, 1, keep_dims=True) / D
        grad_RD = (grad_normal_RD - normal_RD * along_R1 - level_R1) * rstd_R1
        if HAS_GRAD_TOTAL:
            grad_RD += tl.load(grad_total_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + offset, grad_RD.to(grad_x_ptr.dtype.element_ty), mask=inside)
        grad_weight_RD += grad_y_RD * normal_RD
        grad_bias_RD += grad_y_RD
        if HAS_ROW_SCALE:
            grad_RD *= tl.load(row_scale_ptr + row_R1, mask=in_rows, other=0.0)
        if WRITES_UPDATE:
            grad_update_RD = grad_RD.to(grad_update_ptr.dtype.element_ty)
            tl.store(grad_update_ptr + offset, grad_update_RD, mask=inside)
        if HAS_UPDATE_BIAS:
            grad_update_bias_RD += grad_RD

    d = tl.arange(0, BLOCK_D)
    partial_ptr += p.to(tl.int64) * D + d
    tl.store(partial_ptr, tl.sum(grad_weight_RD, 0), mask=d < D)
    partial_ptr += P.to(tl.int64) * D
    tl.store(partial_ptr, tl.sum(grad_bias_RD, 0), mask=d < D)
    if HAS_UPDATE_BIAS:
        partial_ptr += P.to(tl.int64) * D
        tl.store(partial_ptr, tl.sum(grad_update_bias_RD, 0), mask=d < D)


# A warp holds whole rows in the forward pass, so its sums need no shared memory. The backward pass
# keeps sums of every channel as well and spreads a row over the block; its warps an SM, of all
# blocks together, are the same for every width.
_STAGES = 2
_BACKWARD_REGISTERS = 96


def _forward_tile(D: int) -> dict[str, int]:
    block = triton.next_power_of_2(D)
    return {"BLOCK_D": block, "ROWS": max(1, 512 // block)}


def _backward_tile(D: int) -> dict[str, int]:
    block = triton.next_power_of_2(D)
    return {"BLOCK_D": block, "ROWS": max(1, 1024 // block), "STAGES": _STAGES}


def _warps(D: int) -> tuple[int, int]:
    """Warps of a block, forward and backward."""
    return (2, 8) if D > 1024 else (1, 4)


def launch_forward(
    outs: tuple[Tensor, ...],
    x: Tensor,
    update: Tensor | None,
    update_bias: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> None:
    """Write the sum, its LayerNorm, and mean and rstd of each row."""
    D = x.shape[-1]
    T = x.numel() // D
    if T == 0:
        return
    tile = _forward_tile(D)
    _forward_kernel[(triton.cdiv(T, tile["ROWS"]),)](
        x,
        update,
        update_bias,
        row_scale,
        weight,
        bias,
        *outs,
        T,
        eps,
        D=D,
        **tile,
        HAS_UPDATE=update is not None,
        HAS_UPDATE_BIAS=update_bias is not None,
        HAS_ROW_SCALE=row_scale is not None,
        num_warps=_warps(D)[0],
    )


def launch_backward(
    outs: tuple[Tensor, ...],
    grad_total: Tensor | None,
    grad_y: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
) -> None:
    """Write the gradients of x, update, weight, bias and update_bias.

    The second is left out where its shape is not that of the first, the last where it is empty.
    """
    grad_x, grad_update, *sums = outs
    sums = [grad for grad in sums if grad.numel()]
    D = total.shape[-1]
    T = total.numel() // D
    tile = _backward_tile(D)
    warps = _warps(D)[1]
    P = partial_count(total.device, triton.cdiv(T, tile["ROWS"]), warps // 4)
    partials = total.new_empty(len(sums), P, D, dtype=torch.float32)
    _backward_kernel[(P,)](
        # Autograd hands out expanded gradients, as that of a sum; only those are copied.
        grad_y.contiguous(),
        None if grad_total is None else grad_total.contiguous(),
        total,
        mean,
        rstd,
        weight,
        row_scale,
        grad_x,
        grad_update,
        partials,
        T,
        D=D,
        **tile,
        HAS_GRAD_TOTAL=grad_total is not None,
        HAS_ROW_SCALE=row_scale is not None,
        WRITES_UPDATE=grad_update.shape == grad_x.shape,
        HAS_UPDATE_BIAS=len(sums) == 3,
        num_warps=warps,
        maxnreg=_BACKWARD_REGISTERS,
    )
    add_partials(partials, sums)


def compile_cases() -> list[CompileCase]:
    """The shipped configurations: released and common widths, bare and with everything on."""
    narrow, wide = "*bf16", "*fp32"
    # Dtypes of x, update and y; the first is a float32 stream under autocast.
    mixed, bf16, fp32 = (wide, narrow, narrow), (narrow,) * 3, (wide,) * 3
    some, common = (384, 768, 1280), (384, 512, 768, 1024, 1280, 2048)
    kinds = [
        ("fp32+bf16", mixed, False, (192, *common)),
        ("fp32+bf16 bias, scale", mixed, True, some),
        ("bf16", bf16, False, common),
        ("fp32 bias, scale", fp32, True, some),
    ]
    return [
        make(arch, D, name, dtypes, options)
        for arch in PROGRAMS
        for name, dtypes, options, widths in kinds
        for D in widths
        for make in (_forward_case, _backward_case)
    ]


_Dtypes = tuple[str, ...]


def _forward_case(arch: int, D: int, name: str, dtypes: _Dtypes, options: bool) -> CompileCase:
    x, update, y = dtypes
    vectors = ("update_bias", "row_scale", "weight", "bias", "mean", "rstd")
    flags = {"HAS_UPDATE": True, "HAS_UPDATE_BIAS": options, "HAS_ROW_SCALE": options}
    return CompileCase(
        op="add_layer_norm",
        config=f"D{D} {name}",
        kernel=_forward_kernel,
        arch=arch,
        signature={"x_ptr": x, "update_ptr": update, "total_ptr": x, "y_ptr": y}
        | {f"{vector}_ptr": "*fp32" for vector in vectors}
        | {"T": "i32", "eps": "fp32"},
        constexprs={"D": D, **_forward_tile(D), **flags},
        num_warps=_warps(D)[0],
        min_blocks=8,
    )


def _backward_case(arch: int, D: int, name: str, dtypes: _Dtypes, options: bool) -> CompileCase:
    x, update, y = dtypes
    vectors = ("mean", "rstd", "weight", "row_scale", "partial")
    matrices = {"grad_y": y, "grad_total": x, "total": x, "grad_x": x, "grad_update": update}
    flags = {
        "HAS_GRAD_TOTAL": True,
        "HAS_ROW_SCALE": options,
        "WRITES_UPDATE": options or update != x,
        "HAS_UPDATE_BIAS": options,
    }
    warps = _warps(D)[1]
    return CompileCase(
        op="add_layer_norm",
        config=f"D{D} {name}",
        kernel=_backward_kernel,
        arch=arch,
        signature={f"{matrix}_ptr": kind for matrix, kind in matrices.items()}
        | {f"{vector}_ptr": "*fp32" for vector in vectors}
        | {"T": "i32"},
        constexprs={"D": D, **_backward_tile(D), **flags},
        num_warps=warps,
        maxnreg=_BACKWARD_REGISTERS,
        # All programs run at once, whatever the width: none is left for a second round.
        min_blocks=16 // warps,
    )
