"""Sums over all tokens in an order that is always the same: gradients of biases, scales, tokens.

A first kernel keeps P partial sums, each over rows that only T and the shipped configuration
decide; the kernel here adds the P partials up. No atomics, nothing that depends on what else the
GPU is doing, so equal inputs give equal bits.

Shape letters: T tokens, D channels, P partial sums, K sums taken together.
"""

import functools

import torch
from torch import Tensor

from avmae_kernels._resources import CompileCase
from avmae_kernels._triton import tl, triton

# Programs of a first kernel: four for each SM of an A100 (108) and of an H100 (132), a constant
# rather than a question to the device.
PROGRAMS = {80: 432, 90: 528}
_BLOCK_P, _BLOCK_D = 32, 32
MAX_SUMS = 3


@functools.cache
def architecture(device: torch.device) -> int:
    """Which shipped configurations a device gets: 90 for Hopper and later, else 80."""
    if device.type != "cuda":
        return 80
    return 90 if torch.cuda.get_device_capability(device) >= (9, 0) else 80


def partial_count(device: torch.device, row_blocks: int, column_blocks: int = 1) -> int:
    """P for a first kernel of P * column_blocks programs, none without a block of rows."""
    return max(1, min(row_blocks, -(-PROGRAMS[architecture(device)] // column_blocks)))


@triton.jit(do_not_specialize=["P"])
def _column_sums_kernel(
    partial_ptr,  # [K, P, D] fp32
    out0_ptr,  # [D], one a sum; unused ones repeat the first
    out1_ptr,
    out2_ptr,
    P,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(1)
    p = tl.arange(0, BLOCK_P)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    total_PD = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, P, BLOCK_P):
        row = start + p
        here = (row < P)[:, None] & in_row[None, :]
        offset = (k.to(tl.int64) * P + row)[:, None] * D + d[None, :]
        total_PD += tl.load(partial_ptr + offset, mask=here, other=0.0)
    total_D = tl.sum(total_PD, 0)
    if k == 0:
        tl.store(out0_ptr + d, total_D, mask=in_row)
    elif k == 1:
        tl.store(out1_ptr + d, total_D, mask=in_row)
    else:
        tl.store(out2_ptr + d, total_D, mask=in_row)


def add_partials(partials: Tensor, outs: list[Tensor]) -> None:
    """Write `partials[k].sum(0)` to `outs[k]`, [D] of any float dtype; partials [K, P, D] fp32."""
    K, P, D = partials.shape
    assert 1 <= K == len(outs) <= MAX_SUMS
    unused = [outs[0]] * (MAX_SUMS - K)
    grid = (triton.cdiv(D, _BLOCK_D), K)
    _column_sums_kernel[grid](
        partials, *outs, *unused, P, D=D, BLOCK_P=_BLOCK_P, BLOCK_D=_BLOCK_D, num_warps=4
    )


def compile_cases() -> list[CompileCase]:
    """The shipped configurations of the second kernel."""
    kinds = {"partial_ptr": "*fp32", "P": "i32"}
    kinds |= {f"out{k}_ptr": "*fp32" for k in range(MAX_SUMS)}
    constants = {"BLOCK_P": _BLOCK_P, "BLOCK_D": _BLOCK_D}
    return [
        CompileCase(
            op="column_sums",
            config=f"D{D}",
            kernel=_column_sums_kernel,
            arch=arch,
            signature=kinds,
            constexprs=constants | {"D": D},
            num_warps=4,
            wide_stores=False,
            min_blocks=8,
        )
        for arch in PROGRAMS
        for D in (384, 768, 3072)
    ]
