"""The activation of the MLP with the bias of the product before it.

Shape letters: T tokens, M hidden channels, R tokens of one block, P partial sums.
Source: arXiv:1606.08415; the authors' models use the tanh approximation, timm and VideoMAE the
erf form.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from avmae_kernels._check import wanted
from avmae_kernels._column_sums import PROGRAMS, add_partials, partial_count
from avmae_kernels._library import define, eager_float32_on_cpu, register_backward
from avmae_kernels._resources import CompileCase
from avmae_kernels._tiles import column_block
from avmae_kernels._triton import tl, triton

Approximation = Literal["tanh", "erf"]
_TORCH_NAME = {"tanh": "tanh", "erf": "none"}


def bias_gelu_reference(z: Tensor, bias: Tensor, approximate: Approximation) -> Tensor:
    """What `bias_gelu` must return, in plain PyTorch; it defines the operation."""
    return F.gelu(z + bias.to(z.dtype), approximate=_TORCH_NAME[approximate])


@triton.jit
def _logistic(v):
    """e and s = 1 / (1 + e), where s = 0.5 * (1 + tanh(u)) is the share of v that passes."""
    # 2 u log2(e); the bound keeps e finite, so that e * s is never infinity times zero.
    doubled = 2.302208198144325 * v * (1.0 + 0.044715 * v * v)
    e = tl.exp2(tl.minimum(-doubled, 126.0))
    return e, 1.0 / (1.0 + e)


@triton.jit
def _gelu(v, TANH: tl.constexpr):
    if TANH:
        _, s = _logistic(v)
        y = v * s
    else:
        y = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    return y


@triton.jit
def _gelu_derivative(v, TANH: tl.constexpr):
    if TANH:
        e, s = _logistic(v)
        # e * s is 1 - s without the cancellation; what follows is the derivative of 2 u.
        slope = s + v * s * (e * s) * (1.5957691216057308 * (1.0 + 0.134145 * v * v))
    else:
        # exp(-v^2 / 2) / sqrt(2 pi), the density of the normal distribution.
        density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * v * v)
        slope = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476)) + v * density
    return slope


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    z_ptr,  # [T, M]
    bias_ptr,  # [M]
    y_ptr,  # [T, M]
    T,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    TANH: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    row_R1 = (tl.program_id(0) // columns * ROWS + tl.arange(0, ROWS))[:, None]
    m_1M = (tl.program_id(0) % columns * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    in_row = m_1M < M
    inside = (row_R1 < T) & in_row
    offset = row_R1.to(tl.int64) * M + m_1M
    z_RM = tl.load(z_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    v_RM = z_RM + tl.load(bias_ptr + m_1M, mask=in_row, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, _gelu(v_RM, TANH).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "P"])
def _backward_kernel(
    grad_y_ptr,  # [T, M]
    z_ptr,  # [T, M]
    bias_ptr,  # [M]
    grad_z_ptr,  # [T, M]
    partial_ptr,  # [1, P, M] fp32
    T,
    P,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    TANH: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    p = tl.program_id(0) // columns
    first = tl.program_id(0) % columns * BLOCK_M
    m_1M = (first + tl.arange(0, BLOCK_M))[None, :]
    in_row = m_1M < M
    bias_1M = tl.load(bias_ptr + m_1M, mask=in_row, other=0.0).to(tl.float32)
    grad_bias_RM = tl.zeros([ROWS, BLOCK_M], tl.float32)
    for block in tl.range(p, tl.cdiv(T, ROWS), P, num_stages=STAGES):
        row_R1 = (block * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row_R1 < T) & in_row
        offset = row_R1.to(tl.int64) * M + m_1M
        grad_y_RM = tl.load(grad_y_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        z_RM = tl.load(z_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        grad_RM = grad_y_RM * _gelu_derivative(z_RM + bias_1M, TANH)
        tl.store(grad_z_ptr + offset, grad_RM.to(grad_z_ptr.dtype.element_ty), mask=inside)
        grad_bias_RM += grad_RM
    m = first + tl.arange(0, BLOCK_M)
    tl.store(partial_ptr + p.to(tl.int64) * M + m, tl.sum(grad_bias_RM, 0), mask=m < M)


# Elements of a tile: eight for each of 128 threads in one 128-bit access of bf16, so many times.
_FORWARD_TILE, _BACKWARD_TILE = 4096, 2048
_STAGES, _WARPS = 2, 4


def _tile(M: int, elements: int) -> dict[str, int]:
    block = column_block(M, 1024)
    return {"BLOCK_M": block, "ROWS": max(1, elements // block)}


def _launch_forward(z: Tensor, bias: Tensor, approximate: str) -> Tensor:
    M = z.shape[-1]
    T = z.numel() // M
    y = torch.empty_like(z)
    tile = _tile(M, _FORWARD_TILE)
    programs = triton.cdiv(T, tile["ROWS"]) * triton.cdiv(M, tile["BLOCK_M"])
    if programs:
        _forward_kernel[(programs,)](
            z, bias, y, T, M=M, **tile, TANH=approximate == "tanh", num_warps=_WARPS
        )
    return y


def _launch_backward(
    grad_y: Tensor, z: Tensor, bias: Tensor, approximate: str
) -> tuple[Tensor, Tensor]:
    M = z.shape[-1]
    T = z.numel() // M
    grad_z, grad_bias = _empty_backward(grad_y, z, bias, approximate)
    tile = _tile(M, _BACKWARD_TILE)
    columns = triton.cdiv(M, tile["BLOCK_M"])
    P = partial_count(z.device, triton.cdiv(T, tile["ROWS"]), columns)
    partials = z.new_empty(1, P, M, dtype=torch.float32)
    _backward_kernel[(P * columns,)](
        # Autograd hands out expanded gradients, as that of a sum; only those are copied.
        grad_y.contiguous(),
        z,
        bias,
        grad_z,
        partials,
        T,
        P,
        M=M,
        **tile,
        STAGES=_STAGES,
        TANH=approximate == "tanh",
        num_warps=_WARPS,
    )
    add_partials(partials, [grad_bias])
    return grad_z, grad_bias


def _forward(z: Tensor, bias: Tensor, approximate: str) -> Tensor:
    # In place: a second tensor of this size would cost more than the arithmetic.
    return torch.ops.aten.gelu_(z + bias.to(z.dtype), approximate=_TORCH_NAME[approximate])


def _backward(grad_y: Tensor, z: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Gradients of z, and of the bias in fp32 or wider."""
    v = z + bias.to(z.dtype)
    grad_z = torch.ops.aten.gelu_backward.grad_input(
        grad_y, v, approximate=_TORCH_NAME[approximate], grad_input=v
    )
    dtype = torch.promote_types(z.dtype, torch.float32)
    return grad_z, grad_z.flatten(0, -2).sum(0, dtype=dtype)


def _empty_backward(
    grad_y: Tensor, z: Tensor, bias: Tensor, approximate: str
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(z.dtype, torch.float32)
    return torch.empty_like(z), bias.new_empty(bias.shape, dtype=dtype)


_bias_gelu = define(
    "bias_gelu(Tensor z, Tensor bias, str approximate) -> Tensor",
    meaning=_forward,
    kernels=_launch_forward,
    fake=lambda z, bias, approximate: torch.empty_like(z),
)
_bias_gelu_backward = define(
    "bias_gelu_backward(Tensor grad_y, Tensor z, Tensor bias, str approximate) -> (Tensor, Tensor)",
    meaning=_backward,
    kernels=_launch_backward,
    fake=_empty_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, bias, ctx.approximate = inputs
    ctx.save_for_backward(z, bias)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
    z, bias = ctx.saved_tensors
    grad_z, grad_bias = _bias_gelu_backward(grad_y, z, bias, ctx.approximate)
    return grad_z, grad_bias.to(bias.dtype), None


register_backward("bias_gelu", _differentiate, _setup_context)


def compile_cases() -> list[CompileCase]:
    """The shipped configurations: four times the released and common widths."""
    return [
        make(arch, M, kind, approximate)
        for arch in PROGRAMS
        for M, kind in ((1536, "bf16"), (3072, "bf16"), (5120, "bf16"), (3072, "fp32"))
        for approximate in _TORCH_NAME
        for make in (_forward_case, _backward_case)
    ]


def _forward_case(arch: int, M: int, kind: str, approximate: str) -> CompileCase:
    return CompileCase(
        op="bias_gelu",
        config=f"M{M} {kind} {approximate}",
        kernel=_forward_kernel,
        arch=arch,
        signature={"z_ptr": f"*{kind}", "bias_ptr": "*fp32", "y_ptr": f"*{kind}", "T": "i32"},
        constexprs={"M": M, **_tile(M, _FORWARD_TILE), "TANH": approximate == "tanh"},
        num_warps=_WARPS,
        min_blocks=4,
    )


def _backward_case(arch: int, M: int, kind: str, approximate: str) -> CompileCase:
    matrices = dict.fromkeys(("grad_y_ptr", "z_ptr", "grad_z_ptr"), f"*{kind}")
    vectors = {"bias_ptr": "*fp32", "partial_ptr": "*fp32", "T": "i32", "P": "i32"}
    constants = {"M": M, **_tile(M, _BACKWARD_TILE), "STAGES": _STAGES}
    return CompileCase(
        op="bias_gelu",
        config=f"M{M} {kind} {approximate}",
        kernel=_backward_kernel,
        arch=arch,
        signature=matrices | vectors,
        constexprs=constants | {"TANH": approximate == "tanh"},
        num_warps=_WARPS,
        # All programs run at once, so that none is left for a second round.
        min_blocks=4,
    )


def bias_gelu(z: Tensor, bias: Tensor, approximate: Approximation = "tanh") -> Tensor:
    """Return `gelu(z + bias)`.

    Computed in fp32 and rounded once. Only z and the bias are kept for the backward pass, which
    computes the activation's slope anew. Autocast changes nothing here: a product under autocast
    hands in z in autocast's dtype, and that is the dtype of the result.

    Args:
        z: product of the first MLP layer before its bias, [T, M] (or more leading axes), fp32,
            bf16, fp16 or fp64, contiguous. Differentiable.
        bias: [M]. Differentiable.
        approximate: `tanh`, as the authors' models, or `erf`, exact.

    Returns:
        The activation, [T, M], dtype of `z`.

    Raises:
        ValueError: the shapes, dtypes or memory layouts do not fit or `approximate` is neither
            name.
    """
    if z.ndim < 2 or bias.ndim != 1 or bias.shape != z.shape[-1:] or z.shape[-1] == 0:
        raise wanted("bias_gelu", "z [T, M] and bias of z's last axis", z=z, bias=bias)
    if not (z.is_floating_point() and z.is_contiguous()):
        raise wanted("bias_gelu", "z of a float dtype, contiguous", z=z)
    if approximate not in _TORCH_NAME:
        raise ValueError(f"bias_gelu wants approximate 'tanh' or 'erf', got {approximate!r}")
    if eager_float32_on_cpu(z, bias):
        return bias_gelu_reference(z, bias, approximate)
    return _bias_gelu(z, bias, approximate)
