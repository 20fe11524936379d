"""The kernels of `reconstruction_loss`: targets live in registers only.

Shape letters: B clips, S scored tokens, P values in a patch, R rows (scored tokens of all clips).

A first kernel sets every prediction against its target and keeps the difference, which is the
gradient but for a factor, and one partial sum of squares a program. A second one, a single block,
adds the partial sums in a fixed order and finds the factor of each clip. The factor is applied in
the backward pass, with the gradient that arrives there: before, a mean over 10^8 values would
underflow in fp16.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from avmae_kernels._column_sums import PROGRAMS
from avmae_kernels._resources import CompileCase
from avmae_kernels._triton import tl, triton
from avmae_kernels.patch_gather import (
    COUNTS,
    SHIPPED_PATCHES,
    SLICES,
    load_pixels,
    normalised,
    pixel_arguments,
    pixel_case,
    pixel_tile,
    reads_wide,
)
from avmae_kernels.patches import ClipView

TargetNorm = Literal["none", "patch", "patch_channel", "patch_unbiased", "videomae"]
NORMS: tuple[TargetNorm, ...] = get_args(TargetNorm)
PER_CHANNEL = ("patch_channel", "videomae")
UNBIASED = ("patch_unbiased", "videomae")
TARGET_EPS = 1e-6
# The authors divide by (scored tokens + 1e-8): a batch without a scored token has loss 0.
COUNT_EPS = 1e-8

_WARPS = 4
_TOTAL_BLOCK, _TOTAL_WARPS = 2048, 8
# n * sum(x^2) - sum(x)^2 is taken in int64, but sum(x^2) of bytes in int32.
MAX_VALUES = (2**31 - 1) // 255**2
# A kernel may read a global only if it is a constexpr.
_EPS, _COUNT_EPS = tl.constexpr(TARGET_EPS), tl.constexpr(COUNT_EPS)


@triton.jit
def _statistics(
    GROUP: tl.constexpr, GROUPS: tl.constexpr, UNBIASED: tl.constexpr, EPS_ON_STD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    clips_ptr, clip_R, token_R, live_R, crop_ptr, flip_ptr,
    stride_b, stride_t, stride_h, stride_w, stride_c, rows, columns, width,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
    YUV: tl.constexpr,
):  # fmt: skip
    """Shift and scale [R] that standardise the values p of a patch with p % GROUPS == GROUP.

    Of uint8 the shift is the sum of the group, an exact integer: see `_target`.
    """
    P: tl.constexpr = PT * PH * PW * C
    N: tl.constexpr = P // GROUPS
    DIVISOR: tl.constexpr = (N - 1 if N > 1 else 1) if UNBIASED else N
    EVEN: tl.constexpr = P % BLOCK == 0
    BYTES: tl.constexpr = clips_ptr.dtype.element_ty == tl.uint8
    UNIT: tl.constexpr = 2.0 / 255.0 / N if BYTES else 1.0
    if BYTES:
        sum_R = tl.zeros([ROWS], tl.int32)
        squares_R = tl.zeros([ROWS], tl.int32)
    else:
        sum_R = tl.zeros([ROWS], tl.float32)
        squares_R = tl.zeros([ROWS], tl.float32)
    # Unrolled, the addresses of planes would not fit the registers.
    for chunk in (tl.static_range if YUV is None else tl.range)(0, P, BLOCK):
        value_P = chunk + tl.arange(0, BLOCK)
        x_RP = load_pixels(
            clips_ptr, clip_R, token_R, live_R, value_P, crop_ptr, flip_ptr,
            stride_b, stride_t, stride_h, stride_w, stride_c, rows, columns, width,
            PT, PH, PW, C, PACKED, YUV, EVEN,
        )  # fmt: skip
        x_RP = x_RP.to(sum_R.dtype)
        if GROUPS > 1:
            x_RP = tl.where((value_P % GROUPS == GROUP)[None, :], x_RP, 0)
        sum_R += tl.sum(x_RP, 1)
        if BYTES:
            squares_R += tl.sum(x_RP * x_RP, 1)
    if BYTES:
        # Bytes: n * sum(x^2) - sum(x)^2 in integers is n^2 times the variance, exactly.
        wide_R = sum_R.to(tl.int64)
        spread_R = (N * squares_R.to(tl.int64) - wide_R * wide_R).to(tl.float32)
        variance_R = spread_R * (UNIT * (2.0 / 255.0) / DIVISOR)
    else:
        sum_R = sum_R / N
        for chunk in tl.static_range(0, P, BLOCK):
            value_P = chunk + tl.arange(0, BLOCK)
            x_RP = load_pixels(
                clips_ptr, clip_R, token_R, live_R, value_P, crop_ptr, flip_ptr,
                stride_b, stride_t, stride_h, stride_w, stride_c, rows, columns, width,
                PT, PH, PW, C, PACKED, YUV, EVEN,
            )  # fmt: skip
            mine_P = (value_P < P) & (value_P % GROUPS == GROUP)
            x_RP = tl.where(mine_P[None, :], x_RP.to(tl.float32) - sum_R[:, None], 0.0)
            squares_R += tl.sum(x_RP * x_RP, 1)
        variance_R = squares_R / DIVISOR
    if EPS_ON_STD:
        # VideoMAE's epsilon is meant for pixels in [0, 1]; these are in [-1, 1].
        return sum_R, UNIT / (tl.sqrt(variance_R) + 2.0 * _EPS)
    return sum_R, UNIT / tl.sqrt(variance_R + _EPS)


@triton.jit
def _target(x_RP, shift_R, scale_R, N: tl.constexpr):
    """Standardised values: (n x - sum) scale of bytes, whose difference is an exact integer."""
    if x_RP.dtype == tl.uint8:
        return (N * x_RP.to(tl.int32) - shift_R[:, None]).to(tl.float32) * scale_R[:, None]
    return (x_RP.to(tl.float32) - shift_R[:, None]) * scale_R[:, None]


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=SLICES)
def _difference_kernel(
    pred_ptr,  # [B, S, P], strides below
    clips_ptr,  # uint8 or floating, strides below
    index_ptr,  # [B, S] int64
    crop_ptr,  # [B, 2] int32 or None
    flip_ptr,  # [B] uint8 or None
    valid_ptr,  # [B] fp32 or None
    error_ptr,  # [programs] fp32, weighted sum of squares of a program's rows
    difference_ptr,  # [B, S, P] or None
    total, K, index_b, index_k, pred_b, pred_s, pred_p,
    stride_b, stride_t, stride_h, stride_w, stride_c, rows, columns, width,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
    YUV: tl.constexpr, GROUPS: tl.constexpr, UNBIASED: tl.constexpr, EPS_ON_STD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program compares ROWS whole patches.
    P: tl.constexpr = PT * PH * PW * C
    EVEN: tl.constexpr = P % BLOCK == 0
    program = tl.program_id(0)
    row_R = program * ROWS + tl.arange(0, ROWS)
    live_R = row_R < total
    clip_R = (row_R // K).to(tl.int64)
    own_R = row_R % K
    counts_R = live_R
    if valid_ptr is not None:
        weight_R = tl.load(valid_ptr + clip_R, mask=live_R, other=0.0)
        # A clip of weight 0 is not read: whatever it holds, even NaN, must not come through.
        counts_R = live_R & (weight_R != 0)
    token_R = tl.load(index_ptr + clip_R * index_b + own_R * index_k, mask=live_R, other=0)
    token_R = token_R.to(tl.int32)
    if GROUPS > 0:
        shift0_R, scale0_R = _statistics(
            0, GROUPS, UNBIASED, EPS_ON_STD, ROWS, BLOCK,
            clips_ptr, clip_R, token_R, counts_R, crop_ptr, flip_ptr,
            stride_b, stride_t, stride_h, stride_w, stride_c, rows, columns, width,
            PT, PH, PW, C, PACKED, YUV,
        )  # fmt: skip
    if GROUPS == 3:
        shift1_R, scale1_R = _statistics(
            1, GROUPS, UNBIASED, EPS_ON_STD, ROWS, BLOCK,
            clips_ptr, clip_R, token_R, counts_R, crop_ptr, flip_ptr,
            stride_b, stride_t, stride_h, stride_w, stride_c, rows, columns, width,
            PT, PH, PW, C, PACKED, YUV,
        )  # fmt: skip
        shift2_R, scale2_R = _statistics(
            2, GROUPS, UNBIASED, EPS_ON_STD, ROWS, BLOCK,
            clips_ptr, clip_R, token_R, counts_R, crop_ptr, flip_ptr,
            stride_b, stride_t, stride_h, stride_w, stride_c, rows, columns, width,
            PT, PH, PW, C, PACKED, YUV,
        )  # fmt: skip
    error_R = tl.zeros([ROWS], tl.float32)
    for chunk in (tl.static_range if YUV is None else tl.range)(0, P, BLOCK):
        value_P = chunk + tl.arange(0, BLOCK)
        x_RP = load_pixels(
            clips_ptr, clip_R, token_R, counts_R, value_P, crop_ptr, flip_ptr,
            stride_b, stride_t, stride_h, stride_w, stride_c, rows, columns, width,
            PT, PH, PW, C, PACKED, YUV, EVEN,
        )  # fmt: skip
        if GROUPS == 0:
            target_RP = normalised(x_RP)
        elif GROUPS == 1:
            target_RP = _target(x_RP, shift0_R, scale0_R, P)
        else:
            channel_P = (value_P % 3)[None, :]
            target_RP = _target(x_RP, shift2_R, scale2_R, P // 3)
            target_RP = tl.where(
                channel_P == 1, _target(x_RP, shift1_R, scale1_R, P // 3), target_RP
            )
            target_RP = tl.where(
                channel_P == 0, _target(x_RP, shift0_R, scale0_R, P // 3), target_RP
            )
        live_RP, counts_RP = live_R[:, None], counts_R[:, None]
        if not EVEN:
            live_RP = live_RP & (value_P < P)[None, :]
            counts_RP = counts_RP & (value_P < P)[None, :]
        pred_RP = pred_ptr + (clip_R * pred_b + own_R.to(tl.int64) * pred_s)[:, None]
        pred_RP += (value_P.to(tl.int64) * pred_p)[None, :]
        pred_RP = tl.load(pred_RP, mask=counts_RP, other=0.0)
        difference_RP = tl.where(counts_RP, pred_RP.to(tl.float32) - target_RP, 0.0)
        error_R += tl.sum(difference_RP * difference_RP, 1)
        if difference_ptr is not None:
            out_RP = difference_ptr + row_R.to(tl.int64)[:, None] * P + value_P[None, :]
            tl.store(out_RP, difference_RP.to(difference_ptr.dtype.element_ty), mask=live_RP)
    if valid_ptr is not None:
        error_R *= weight_R
    tl.store(error_ptr + program, tl.sum(error_R, 0))


@triton.jit(do_not_specialize=["programs", "B", "S"])
def _total_kernel(
    error_ptr,  # [programs] fp32
    valid_ptr,  # [B] fp32 or None
    loss_ptr,  # [1] fp32
    factor_ptr,  # [B] fp32, gradient of the loss per unit of difference
    programs, B, S,
    VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    error = tl.zeros([BLOCK], tl.float32)
    for start in range(0, programs, BLOCK):
        n = start + tl.arange(0, BLOCK)
        error += tl.load(error_ptr + n, mask=n < programs, other=0.0)
    if valid_ptr is None:
        clips = B.to(tl.float32)
    else:
        weight = tl.zeros([BLOCK], tl.float32)
        for start in range(0, B, BLOCK):
            b = start + tl.arange(0, BLOCK)
            weight += tl.load(valid_ptr + b, mask=b < B, other=0.0)
        clips = tl.sum(weight, 0)
    count = clips * S.to(tl.float32) + _COUNT_EPS
    tl.store(loss_ptr, tl.sum(error, 0) / count / VALUES)
    for start in range(0, B, BLOCK):
        b = start + tl.arange(0, BLOCK)
        factor = 2.0 / count / VALUES
        if valid_ptr is not None:
            factor *= tl.load(valid_ptr + b, mask=b < B, other=0.0)
        else:
            factor = tl.zeros([BLOCK], tl.float32) + factor
        tl.store(factor_ptr + b, factor, mask=b < B)


@triton.jit(do_not_specialize=["total", "S"], do_not_specialize_on_alignment=["grad_ptr"])
def _scale_kernel(
    difference_ptr,  # [B, S, P]
    factor_ptr,  # [B] fp32
    grad_ptr,  # [1] fp32
    out_ptr,  # [B, S, P]
    total, S,
    P: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value_P = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live_R = row_R < total
    live_RP = live_R[:, None]
    if P % BLOCK != 0:
        live_RP = live_RP & (value_P < P)[None, :]
    factor_R = tl.load(factor_ptr + row_R // S, mask=live_R, other=0.0) * tl.load(grad_ptr)
    offset_RP = row_R.to(tl.int64)[:, None] * P + value_P[None, :]
    x_RP = tl.load(difference_ptr + offset_RP, mask=live_RP, other=0.0).to(tl.float32)
    x_RP *= factor_R[:, None]
    tl.store(out_ptr + offset_RP, x_RP.to(out_ptr.dtype.element_ty), mask=live_RP)


def statistics_of(norm: TargetNorm) -> dict[str, Any]:
    """A normalisation as the kernel takes it: how many groups of values, and what divides them."""
    return {
        "GROUPS": 0 if norm == "none" else 3 if norm in PER_CHANNEL else 1,
        "UNBIASED": norm in UNBIASED,
        "EPS_ON_STD": norm == "videomae",
    }


def launch_loss(
    pred: Tensor,
    view: ClipView,
    scored: Tensor,
    norm: TargetNorm,
    valid: Tensor | None,
    mean_over_patch: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, difference [B, S, P] (or empty) and factor [B]."""
    B, S, P = pred.shape
    tile = pixel_tile(P, view.pixels != "rgb")
    programs = triton.cdiv(B * S, tile["ROWS"]) if P else 0
    if valid is not None:
        valid = valid.to(torch.float32).contiguous()
    loss, factor = pred.new_empty((), dtype=torch.float32), pred.new_empty(B, dtype=torch.float32)
    errors = pred.new_empty(programs, dtype=torch.float32)
    # Contiguous whatever the prediction's strides are, as the fake says.
    difference = pred.new_empty((B, S, P) if with_gradient else 0)
    if programs:
        _difference_kernel[(programs,)](
            pred_ptr=pred,
            index_ptr=scored,
            valid_ptr=valid,
            error_ptr=errors,
            difference_ptr=difference if with_gradient else None,
            total=B * S,
            K=S,
            index_b=scored.stride(0),
            index_k=scored.stride(1),
            pred_b=pred.stride(0),
            pred_s=pred.stride(1),
            pred_p=pred.stride(2),
            **pixel_arguments(view),
            **statistics_of(norm),
            **tile,
            num_warps=_WARPS,
        )
    _total_kernel[(1,)](
        errors,
        valid,
        loss,
        factor,
        programs,
        B,
        S,
        VALUES=P if mean_over_patch else 1,
        BLOCK=_TOTAL_BLOCK,
        num_warps=_TOTAL_WARPS,
    )
    return loss, difference, factor


def launch_scale(difference: Tensor, factor: Tensor, grad: Tensor) -> Tensor:
    """`difference[b] * factor[b] * grad`, [B, S, P], with one rounding."""
    B, S, P = difference.shape
    out = torch.empty_like(difference)
    if out.numel() == 0:
        return out
    tile = pixel_tile(P, planes=False)
    grid = (triton.cdiv(B * S, tile["ROWS"]), triton.cdiv(P, tile["BLOCK"]))
    _scale_kernel[grid](difference, factor, grad, out, B * S, S, P, **tile, num_warps=_WARPS)
    return out


def compile_cases() -> list[CompileCase]:
    """The shipped configurations of the three kernels."""
    cases = [_difference_case(*choice) for choice in _difference_choices()]
    for arch, P, kind in itertools.product(PROGRAMS, (1536, 256), ("bf16", "fp32")):
        cases.append(
            CompileCase(
                op="reconstruction_loss",
                config=f"P{P} {kind}",
                kernel=_scale_kernel,
                arch=arch,
                signature={
                    **dict.fromkeys(("difference_ptr", "out_ptr"), f"*{kind}"),
                    **dict.fromkeys(("factor_ptr", "grad_ptr"), "*fp32"),
                    **dict.fromkeys(("total", "S"), "i32"),
                },
                constexprs={"P": P, **pixel_tile(P, planes=False)},
                aligned=("difference_ptr", "out_ptr", "factor_ptr"),
                num_warps=_WARPS,
                min_blocks=8,
            )
        )
    for arch, weighted in itertools.product(PROGRAMS, (False, True)):
        pointers = ["error_ptr", "loss_ptr", "factor_ptr", *(["valid_ptr"] if weighted else [])]
        cases.append(
            CompileCase(
                op="reconstruction_loss",
                config="weighted sum" if weighted else "sum",
                kernel=_total_kernel,
                arch=arch,
                signature={
                    **dict.fromkeys(pointers, "*fp32"),
                    **dict.fromkeys(("programs", "B", "S"), "i32"),
                },
                constexprs={
                    "VALUES": 1536,
                    "BLOCK": _TOTAL_BLOCK,
                    **({} if weighted else {"valid_ptr": None}),
                },
                num_warps=_TOTAL_WARPS,
                # One block on the whole GPU: what it reads is far too little to matter.
                wide_loads=False,
                wide_stores=False,
            )
        )
    return cases


def _difference_choices() -> Iterator[tuple[int, str, TargetNorm, str, bool]]:
    """Architecture, source, normalisation, dtype of the prediction, crop and flip."""
    for arch in PROGRAMS:
        for kind in ("bf16", "fp32"):
            yield arch, "video", "none", kind, False
            yield arch, "spectrogram", "none", kind, False
        for norm in NORMS[1:]:
            yield arch, "video", norm, "bf16", False
        yield arch, "spectrogram", "patch", "bf16", False
        yield arch, "video", "none", "bf16", True
        for norm in NORMS:
            yield arch, "planes", norm, "bf16", False
        yield arch, "planes", "none", "bf16", True


def _difference_case(
    arch: int, source: str, norm: TargetNorm, kind: str, moved: bool
) -> CompileCase:
    signature, constants, aligned = pixel_case(source, moved)
    P = math.prod(SHIPPED_PATCHES[source].values())
    pred = {"pred_ptr": f"*{kind}", "pred_b": "i32", "pred_s": "i32", "difference_ptr": f"*{kind}"}
    return CompileCase(
        op="reconstruction_loss",
        config=f"{source} {norm} {kind}{' crop flip' if moved else ''}",
        kernel=_difference_kernel,
        arch=arch,
        signature={**signature, **pred, "error_ptr": "*fp32"},
        constexprs={
            **constants,
            "pred_p": 1,
            "valid_ptr": None,
            **statistics_of(norm),
            **pixel_tile(P, source == "planes"),
        },
        aligned=(*aligned, *pred, "error_ptr"),
        num_warps=_WARPS,
        wide_loads=reads_wide(source, moved),
        min_blocks=4,
    )
