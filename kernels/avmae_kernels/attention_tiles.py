"""The shipped configurations of the attention kernels, and what their binaries must show.

Every one compiles for sm_80 and sm_90 with no register spilled, under Triton 3.6 and its ptxas
12.8. None is chosen by timing: none has been timed yet. Short sequences, of at most SHORT keys,
get tiles of 64 queries, of which 306 tokens fill 0.96 (of 128 only 0.80); long ones 128, which
read keys and values half as often. What is too large for the registers of an architecture has
smaller tiles there. The kernels of attention_hopper have tiles for sm_90 alone.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from avmae_kernels._resources import CompileCase
from avmae_kernels.attention_backward import backward_kv_kernel, backward_q_kernel
from avmae_kernels.attention_forward import forward_kernel, short_blocks, short_forward_kernel
from avmae_kernels.attention_hopper import hopper_backward_kv_kernel, hopper_forward_kernel
from avmae_kernels.attention_layout import (
    MAX_HEAD_DIM,
    SHORT,
    Sequences,
    Tile,
    kernel_constants,
    slot_owners_kernel,
)

# By architecture, then by the largest head_dim that an entry serves.
FORWARD = {
    80: {
        32: Tile(128, 64, 8),
        64: Tile(64, 64, 4),
        80: Tile(64, 64, 4),
        96: Tile(64, 64, 4),
        128: Tile(64, 64, 4),
    },
    90: {
        32: Tile(128, 64, 8),
        64: Tile(128, 64, 8),
        80: Tile(128, 64, 8),
        96: Tile(128, 64, 8),
        128: Tile(128, 64, 8),
    },
}
FORWARD_SHORT = {
    80: FORWARD[80] | {32: Tile(64, 64, 4)},
    90: {
        32: Tile(64, 64, 4, resident=True),
        64: Tile(64, 64, 4, resident=True),
        80: Tile(64, 64, 4, num_stages=1, resident=True),
        96: Tile(64, 64, 4),
        128: Tile(64, 64, 4),
    },
}
BACKWARD_Q = {
    80: {
        32: Tile(64, 64, 4),
        64: Tile(64, 64, 4),
        80: Tile(64, 32, 4),
        96: Tile(64, 32, 4),
        128: Tile(128, 32, 8),
    },
    90: {
        32: Tile(128, 64, 8),
        64: Tile(128, 64, 8),
        80: Tile(64, 64, 4),
        96: Tile(64, 64, 4),
        128: Tile(64, 64, 4),
    },
}
BACKWARD_Q_SHORT = {
    80: BACKWARD_Q[80],
    90: BACKWARD_Q[90] | {32: Tile(64, 64, 4), 64: Tile(64, 64, 4)},
}
BACKWARD_KV = {
    80: {
        32: Tile(64, 64, 4),
        64: Tile(64, 64, 4),
        80: Tile(32, 64, 4),
        96: Tile(32, 64, 8),
        128: Tile(32, 64, 8),
    },
    90: {
        32: Tile(64, 64, 4),
        64: Tile(64, 64, 4),
        80: Tile(64, 64, 4),
        96: Tile(64, 64, 4),
        128: Tile(32, 64, 4),
    },
}
# float32 multiplies without tensor cores (with them if torch allows tf32), out of registers.
FLOAT32 = {32: Tile(32, 32, 4, 1), 80: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1)}

# attention_hopper. For head_dim 128 one block fills a processor, so a third stage costs nothing.
HOPPER_FORWARD = {32: Tile(128, 64, 8), 64: Tile(128, 64, 8), 128: Tile(128, 64, 8, 3)}
HOPPER_FORWARD_SHORT = dict.fromkeys((32, 64, 128), Tile(64, 64, 4))
HOPPER_BACKWARD_KV = dict.fromkeys((32, 64, 128), Tile(64, 64, 4))


@functools.cache
def architecture(device: torch.device) -> int:
    """Whose configurations a device gets: 90 on Hopper; 80, which ask for less, on all others."""
    on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return 90 if on_hopper else 80


def forward_tile(q: Tensor, k: Tensor, seqs: Sequences) -> Tile:
    """The configuration of the forward pass."""
    return _forward(architecture(q.device), q.shape[-1], q.dtype, _length(k, seqs), seqs.fixed)


def backward_tiles(q: Tensor, k: Tensor, seqs: Sequences) -> tuple[Tile, Tile]:
    """The configurations of the dQ kernel and of the dK, dV kernel."""
    return _backward(architecture(q.device), q.shape[-1], q.dtype, _length(k, seqs))


def hopper_forward_tile(q: Tensor, k: Tensor, seqs: Sequences) -> Tile:
    """The configuration of `hopper_forward_kernel`."""
    return _hopper_forward(q.shape[-1], _length(k, seqs), seqs.fixed)


def hopper_backward_tiles(q: Tensor, k: Tensor, seqs: Sequences) -> tuple[Tile, Tile]:
    """The configurations of the dQ kernel for all GPUs and of the dK, dV kernel for Hopper; of
    that for all GPUs where lengths vary."""
    return _hopper_backward(q.shape[-1], _length(k, seqs), seqs.fixed)


def _hopper_forward(head_dim: int, length: int, fixed: tuple[int, int] | None) -> Tile:
    if length > SHORT:
        return _by_head_dim(HOPPER_FORWARD, head_dim)
    tile = _by_head_dim(HOPPER_FORWARD_SHORT, head_dim)
    # In a short loop the masks weigh little, and buffers for two blocks less let one program more
    # fit on a processor. Where lengths vary the last block is loaded in another way.
    return dataclasses.replace(tile, peeled=fixed is None)


def _hopper_backward(
    head_dim: int, length: int, fixed: tuple[int, int] | None
) -> tuple[Tile, Tile]:
    q_tile, kv_tile = _backward(90, head_dim, torch.bfloat16, length)
    return q_tile, kv_tile if fixed is None else _by_head_dim(HOPPER_BACKWARD_KV, head_dim)


def _forward(
    arch: int, head_dim: int, dtype: torch.dtype, length: int, fixed: tuple[int, int] | None
) -> Tile:
    if dtype == torch.float32:
        return _by_head_dim(FLOAT32, head_dim)
    if length > SHORT:
        return _by_head_dim(FORWARD[arch], head_dim)
    tile = _by_head_dim(FORWARD_SHORT[arch], head_dim)
    # Only a fixed length tells how much has to stay on chip.
    return tile if fixed else dataclasses.replace(tile, num_stages=2, resident=False)


def _backward(arch: int, head_dim: int, dtype: torch.dtype, length: int) -> tuple[Tile, Tile]:
    if dtype == torch.float32:
        tile = _by_head_dim(FLOAT32, head_dim)
        return tile, tile
    of_q = BACKWARD_Q_SHORT if length <= SHORT else BACKWARD_Q
    return _by_head_dim(of_q[arch], head_dim), _by_head_dim(BACKWARD_KV[arch], head_dim)


def _length(k: Tensor, seqs: Sequences) -> int:
    """Keys of a sequence, on average where lengths vary: known without asking the device."""
    return seqs.fixed[1] if seqs.fixed else len(k) // max(len(seqs.cu_kv) - 1, 1)


def _by_head_dim(table: dict[int, Tile], head_dim: int) -> Tile:
    for largest, tile in table.items():
        if head_dim <= largest:
            return tile
    raise ValueError(f"attention kernels want head_dim up to {MAX_HEAD_DIM}, got {head_dim}")


# Lengths of the AudioSet recipe: visible video, both modalities together, all tokens (decoder).
_LENGTHS = (157, 306, 2064)
_SHIPPED: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    # dtype: head dims, and lengths, 0 for varying ones.
    "bf16": ((32, 64, 80, 128), (0, *_LENGTHS)),
    "fp16": ((64,), (0, 306)),
    "fp32": ((32, 64, 80, 128), (0,)),
}
_SHIPPED_HOPPER = (
    ("bf16", 32, (0, *_LENGTHS[1:])),
    ("bf16", 64, (0, *_LENGTHS)),
    ("bf16", 128, (0, *_LENGTHS[1:])),
    ("fp16", 64, (306,)),
)
_ODD_HEAD_DIMS = (16, 24, 48, 96)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_cases() -> list[CompileCase]:
    """The shipped configurations, and heads of other sizes that run by them."""
    cases = [
        CompileCase(
            op="slot_owners",
            config="any",
            kernel=slot_owners_kernel,
            arch=arch,
            signature={"cu_ptr": "*i32", "owners_ptr": "*i32", "S": "i32", "slots": "i32"},
            constexprs={"BLOCK": 64},
            num_warps=1,
            wide_loads=False,
            wide_stores=False,
        )
        for arch in FORWARD
    ]
    for arch in FORWARD:
        for dtype, (head_dims, lengths) in _SHIPPED.items():
            for head_dim in head_dims:
                for length in lengths:
                    cases += _cases(arch, dtype, head_dim, length)
        for head_dim in _ODD_HEAD_DIMS:
            cases += _cases(arch, "bf16", head_dim, 0)
    for dtype, head_dim, lengths in _SHIPPED_HOPPER:
        for length in lengths:
            cases += _hopper_cases(dtype, head_dim, length)
    return cases


def _cases(arch: int, dtype: str, head_dim: int, length: int) -> Iterator[CompileCase]:
    """The kernels of one head_dim and length; varying lengths (0) as short ones and as long."""
    fixed = (length, length) if length else None
    kind = _DTYPES[dtype]
    seen = set()
    for mean in (length,) if length else (SHORT, SHORT + 1):
        tile = _forward(arch, head_dim, kind, mean, fixed)
        q_tile, kv_tile = _backward(arch, head_dim, kind, mean)
        forward = short_forward_kernel if tile.resident else forward_kernel
        kernels = (forward, tile), (backward_q_kernel, q_tile), (backward_kv_kernel, kv_tile)
        for kernel, shape in kernels:
            if (kernel.__name__, shape) not in seen:
                seen.add((kernel.__name__, shape))
                yield _case(kernel, arch, dtype, head_dim, fixed, shape)


def _hopper_cases(dtype: str, head_dim: int, length: int) -> Iterator[CompileCase]:
    fixed = (length, length) if length else None
    for mean in (length,) if length else (SHORT, SHORT + 1):
        tile = _hopper_forward(head_dim, mean, fixed)
        yield _case(hopper_forward_kernel, 90, dtype, head_dim, fixed, tile)
    if fixed is not None:
        _, tile = _hopper_backward(head_dim, length, fixed)
        yield _case(hopper_backward_kv_kernel, 90, dtype, head_dim, fixed, tile)


def _case(
    kernel: Any,
    arch: int,
    dtype: str,
    head_dim: int,
    fixed: tuple[int, int] | None,
    tile: Tile,
) -> CompileCase:
    constants: dict[str, Any] = kernel_constants(head_dim, _DTYPES[dtype], fixed)
    constants["BLOCK_M"] = tile.block_m
    if tile.resident:
        assert fixed is not None
        constants["BLOCKS_N"] = short_blocks(fixed[1], tile.block_n)
    else:
        constants["BLOCK_N"] = tile.block_n
    if kernel is hopper_forward_kernel:
        constants["PEELED"] = tile.peeled
    length = f"length {fixed[0]}" if fixed else "varying"
    signature = {
        argument: _argument_type(argument, dtype, head_dim, tile)
        for argument in kernel.arg_names
        if argument not in constants
    }
    return CompileCase(
        op="packed_attention",
        config=f"{dtype} d{head_dim} {length} {tile.block_m}x{tile.block_n}",
        kernel=kernel,
        arch=arch,
        signature=signature,
        constexprs=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=tuple(a for a in signature if a.endswith(("_ptr", "_stride"))),
        tensor_cores=dtype != "fp32",
        descriptors=any(kind.startswith("tensordesc") for kind in signature.values()),
        # Eight warps on a processor: two to hide the latency of each of its four schedulers.
        min_blocks=8 // tile.num_warps,
    )


def _argument_type(argument: str, dtype: str, head_dim: int, tile: Tile) -> str:
    if argument.endswith("_desc"):
        rows = tile.block_n if argument in ("k_desc", "v_desc") else tile.block_m
        if argument in ("lse_desc", "delta_desc"):
            return f"tensordesc<fp32[1, {rows}]>"
        return f"tensordesc<{dtype}[1, {rows}, {head_dim}]>"
    if not argument.endswith("_ptr"):
        return "i32"
    if argument in ("cu_q_ptr", "cu_kv_ptr", "owners_ptr"):
        return "*i32"
    return "*fp32" if argument in ("lse_ptr", "delta_ptr") else f"*{dtype}"
