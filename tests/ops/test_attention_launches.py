"""What a launch of the attention kernels compiles, and how often; nothing runs."""

import math
import re
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (Linux: pip install triton)")

from attention_cases import query_problem  # noqa: E402
from launches import compile_only  # noqa: E402

from avmae_kernels import attention_tiles as shipped  # noqa: E402
from avmae_kernels._resources import compile_kernel  # noqa: E402
from avmae_kernels.attention_backward import launch_backward  # noqa: E402
from avmae_kernels.attention_forward import launch_forward  # noqa: E402
from avmae_kernels.attention_hopper import (  # noqa: E402
    launch_hopper_backward,
    launch_hopper_forward,
)
from avmae_kernels.attention_layout import MAX_HEAD_DIM, Sequences, owners_by_kernel  # noqa: E402

KERNELS = {"slot_owners_kernel", "forward_kernel", "backward_q_kernel", "backward_kv_kernel"}

HOPPER_KERNELS = {"hopper_forward_kernel", "backward_q_kernel", "backward_kv_kernel"}


def _launch_all(
    arch: int,
    q_lengths: list[int],
    kv_lengths: list[int],
    fixed: bool,
    heads: int = 2,
    dtype: torch.dtype = torch.float16,
    hopper: bool = False,
) -> None:
    problem = query_problem(q_lengths, kv_lengths, heads, 64, dtype)
    q, kv, cu_q, cu_kv = problem.values()
    k, v = kv.unbind(1)
    pair, owners = (q_lengths[0], kv_lengths[0]) if fixed else None, (None, None)
    if not fixed:
        owners = owners_by_kernel(cu_q, len(q)), owners_by_kernel(cu_kv, len(kv))
    seqs = Sequences(cu_q, cu_kv, *owners, pair)
    grads = torch.empty_like(q), *torch.empty_like(kv).unbind(1)
    if hopper:
        out, lse = launch_hopper_forward(q, k, v, seqs, shipped.hopper_forward_tile(q, k, seqs))
        tiles = shipped.hopper_backward_tiles(q, k, seqs)
        launch_hopper_backward(out, q, k, v, out, lse, seqs, grads, tiles)
    else:
        tile = shipped._forward(arch, 64, q.dtype, kv_lengths[0], pair)
        out, lse = launch_forward(q, k, v, seqs, tile)
        tiles = shipped._backward(arch, 64, q.dtype, kv_lengths[0])
        launch_backward(out, q, k, v, out, lse, seqs, grads, tiles)


@pytest.mark.parametrize("arch", [80, 90])
def test_no_compilation_for_a_new_number_of_tokens(arch: int) -> None:
    """50 totals, 50 numbers of sequences: one compilation of each kernel."""
    with compile_only(arch) as compiled:
        for step in range(50):
            lengths = [3 + step] * (1 + step % 17) + [7]
            _launch_all(arch, lengths, [n + 1 for n in lengths], fixed=False, heads=1 + step % 5)
    assert len(compiled) == 4 and {name.split()[0] for name in compiled} == KERNELS


@pytest.mark.parametrize("arch", [80, 90])
def test_one_compilation_for_a_fixed_length(arch: int) -> None:
    with compile_only(arch) as compiled:
        for step in range(50):
            _launch_all(arch, [33] * (1 + step), [40] * (1 + step), fixed=True)
    assert len(compiled) == 3


def test_no_compilation_for_a_new_number_of_tokens_on_hopper() -> None:
    with compile_only(90) as compiled:
        for step in range(50):
            lengths = [3 + step] * (1 + step % 17) + [7]
            others = [n + 1 for n in lengths]
            _launch_all(90, lengths, others, fixed=False, heads=1 + step % 5, hopper=True)
    assert {name.split()[0] for name in compiled} == HOPPER_KERNELS | {"slot_owners_kernel"}
    assert len(compiled) == 4
    with compile_only(90) as compiled:
        for step in range(50):
            _launch_all(90, [33] * (1 + step), [40] * (1 + step), fixed=True, hopper=True)
    assert len(compiled) == 3 and any("hopper_backward_kv_kernel" in name for name in compiled)


def test_copies_bring_as_much_as_they_have_room_for() -> None:
    """The box of each copy, the memory that it fills, and the bytes that are waited for.

    Triton 3.6, asked to specialise warps, halves the memory and not the box, and says nothing.
    """
    cases = [c for c in shipped.compile_cases() if c.descriptors and "bf16 d128" in c.config]
    assert len(cases) >= 6
    for case in cases:
        ir = compile_kernel(case).asm["ttgir"]
        copies = re.findall(
            r"async_tma_copy_global_to_local .*?tensordesc<tensor<([\dx]+)x\w+, .*?"
            r"-> !ttg.memdesc<([\dx]+)x(bf16|f32),",
            ir,
        )
        assert len(copies) == ir.count("async_tma_copy_global_to_local") > 0
        sizes = {"bf16": 2, "f32": 4}
        for box, room, _ in copies:
            assert _product(box) == _product(room), case.name
        copied = sum(_product(box) * sizes[kind] for box, _, kind in copies)
        waited = sum(int(n) for n in re.findall(r"barrier_expect %\w+, (\d+)", ir))
        assert copied == waited, case.name


def _product(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def test_launches_pass_what_was_compile_checked() -> None:
    """Types and alignments of a launch's arguments are those of the shipped configurations."""
    with compile_only(90) as compiled:
        for hopper in (False, True):
            _launch_all(90, [33], [40], fixed=True, dtype=torch.bfloat16, hopper=hopper)
            _launch_all(90, [33], [40], fixed=False, dtype=torch.bfloat16, hopper=hopper)
    cases = {
        c.kernel.__name__: c
        for c in shipped.compile_cases()
        if "bf16 d64" in c.config and "64x64" in c.config and c.arch == 90
    }
    launched = {line.split()[0]: line for line in compiled}
    assert {*launched} - {"slot_owners_kernel"} == {*cases}
    for name, case in cases.items():
        expected = [(case.signature[a], a in case.aligned) for a in case.signature]
        found = re.findall(r"\('([^']+)', ('D'|None)\)", launched[name])
        assert [(kind, mark == "'D'") for kind, mark in found] == expected


def test_head_dims_of_tables_rise() -> None:
    tables = [shipped.FLOAT32, shipped.HOPPER_FORWARD, shipped.HOPPER_FORWARD_SHORT]
    tables.append(shipped.HOPPER_BACKWARD_KV)
    for by_arch in (
        shipped.FORWARD,
        shipped.FORWARD_SHORT,
        shipped.BACKWARD_Q,
        shipped.BACKWARD_Q_SHORT,
        shipped.BACKWARD_KV,
    ):
        tables += by_arch.values()
    for table in tables:
        assert all(a < b for a, b in pairwise(table)) and max(table) == MAX_HEAD_DIM


def test_too_large_a_head() -> None:
    with pytest.raises(ValueError, match="head_dim up to 128, got 160"):
        shipped._forward(90, 160, torch.bfloat16, 100, None)
