"""What a launch of the attention kernels compiles, and how often; nothing runs."""

import re
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (Linux: pip install triton)")

from attention_cases import query_problem  # noqa: E402
from launches import compile_only  # noqa: E402

from avmae_kernels import attention_tiles as shipped  # noqa: E402
from avmae_kernels.attention_backward import launch_backward  # noqa: E402
from avmae_kernels.attention_forward import launch_forward  # noqa: E402
from avmae_kernels.attention_layout import MAX_HEAD_DIM, Sequences, owners_by_kernel  # noqa: E402

KERNELS = {"slot_owners_kernel", "forward_kernel", "backward_q_kernel", "backward_kv_kernel"}


def _launch_all(
    arch: int,
    q_lengths: list[int],
    kv_lengths: list[int],
    fixed: bool,
    heads: int = 2,
    dtype: torch.dtype = torch.float16,
) -> None:
    problem = query_problem(q_lengths, kv_lengths, heads, 64, dtype)
    q, kv, cu_q, cu_kv = problem.values()
    k, v = kv.unbind(1)
    pair, owners = (q_lengths[0], kv_lengths[0]) if fixed else None, (None, None)
    if not fixed:
        owners = owners_by_kernel(cu_q, len(q)), owners_by_kernel(cu_kv, len(kv))
    seqs = Sequences(cu_q, cu_kv, *owners, pair)
    tile = shipped._forward(arch, 64, q.dtype, kv_lengths[0], pair)
    out, lse = launch_forward(q, k, v, seqs, tile)
    grads = torch.empty_like(q), *torch.empty_like(kv).unbind(1)
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


def test_launches_pass_what_was_compile_checked() -> None:
    """Types and alignments of a launch's arguments are those of the shipped configurations."""
    with compile_only(90) as compiled:
        _launch_all(90, [33], [40], fixed=True, dtype=torch.bfloat16)
        _launch_all(90, [33], [40], fixed=False, dtype=torch.bfloat16)
    cases = {c.kernel.__name__: c for c in shipped.compile_cases() if "bf16" in c.config}
    launched = {line.split()[0]: line for line in compiled}
    assert {*launched} - {"slot_owners_kernel"} == {*cases}
    for name, case in cases.items():
        expected = [(case.signature[a], a in case.aligned) for a in case.signature]
        found = re.findall(r"\('([^']+)', ('D'|None)\)", launched[name])
        assert [(kind, mark == "'D'") for kind, mark in found] == expected


def test_head_dims_of_tables_rise() -> None:
    tables = [shipped.FLOAT32]
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
