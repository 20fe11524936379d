"""The attention kernels for Hopper, interpreted, fp32 and fp16 (the interpreter computes bf16
wrongly). The public function refuses fp32 to them, which the operations do not."""

import math
from typing import Any

import pytest
import torch
from attention_cases import (
    LENGTHS,
    QUERY_LENGTHS,
    offsets,
    query_plain,
    query_problem,
    query_reference,
    self_plain,
    self_problem,
    self_reference,
)
from budgets import assert_matches_meaning, assert_within_budget
from torch import Tensor

from avmae_kernels import attention, attention_check
from avmae_kernels.attention import packed_attention, packed_query_attention, slot_owners
from avmae_kernels.attention_backends import HOPPER, BackendUnavailable
from avmae_kernels.attention_forward import launch_forward
from avmae_kernels.attention_hopper import launch_hopper_forward
from avmae_kernels.attention_layout import Sequences, Tile, owners_by_kernel

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
HOSTILE = {
    "around 32": (31, 0, 32, 33),
    "around 128": (127, 128, 1, 129),
    "one modality": (157, 0, 1),
    "both modalities": (306,),
}


def _self(qkv: Tensor, cu_seqlens: Tensor, fixed_length: int | None = None) -> Tensor:
    owners = None if fixed_length else slot_owners(cu_seqlens, len(qkv))
    return attention._packed_attention_hopper(qkv, cu_seqlens, owners, fixed_length)[0]


def _query(
    q: Tensor, kv: Tensor, cu_q: Tensor, cu_kv: Tensor, fixed_lengths: tuple[int, int] | None = None
) -> Tensor:
    owners: tuple[Any, Any] = (None, None)
    if fixed_lengths is None:
        owners = slot_owners(cu_q, len(q)), slot_owners(cu_kv, len(kv))
    lengths = fixed_lengths or (None, None)
    return attention._packed_query_attention_hopper(q, kv, cu_q, cu_kv, *owners, *lengths)[0]


@BOTH
@pytest.mark.parametrize("lengths", (LENGTHS | HOSTILE).values(), ids=(LENGTHS | HOSTILE).keys())
def test_varying_lengths(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = self_problem(lengths, 1, 32, dtype)
    assert_matches_meaning(_self, self_reference, inputs, ["qkv"], plain=self_plain)


@BOTH
@pytest.mark.parametrize(
    ("length", "count"),
    [(1, 3), (31, 1), (32, 1), (33, 2), (127, 1), (128, 1), (129, 2), (157, 1), (306, 1), (330, 1)],
)
def test_fixed_length(length: int, count: int, dtype: torch.dtype) -> None:
    inputs = self_problem([length] * count, 1, 32, dtype)
    inputs["fixed_length"] = length
    assert_matches_meaning(_self, self_reference, inputs, ["qkv"], plain=self_plain)


@BOTH
@pytest.mark.parametrize("lengths", QUERY_LENGTHS.values(), ids=QUERY_LENGTHS.keys())
def test_some_queries(lengths: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    inputs = query_problem(*lengths, 2, 32, dtype)
    assert_matches_meaning(_query, query_reference, inputs, ["q", "kv"], plain=query_plain)


@BOTH
@pytest.mark.parametrize("lengths", [(5, 40), (70, 3), (1, 129)])
def test_fixed_lengths_of_some_queries(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = query_problem(*([n] * 2 for n in lengths), 1, 32, dtype)
    inputs["fixed_lengths"] = lengths
    assert_matches_meaning(_query, query_reference, inputs, ["q", "kv"], plain=query_plain)


@pytest.mark.parametrize("fixed_length", [None, 35])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_by_name(head_dim: int, fixed_length: int | None) -> None:
    inputs = self_problem([35, 35], 2, head_dim, torch.float16)
    inputs |= {"fixed_length": fixed_length, "impl": HOPPER}
    assert_matches_meaning(packed_attention, self_reference, inputs, ["qkv"], plain=self_plain)
    inputs = query_problem([3, 3], [35, 35], 2, head_dim, torch.float16)
    inputs |= {"fixed_lengths": fixed_length and (3, 35), "impl": HOPPER}
    assert_matches_meaning(
        packed_query_attention, query_reference, inputs, ["q", "kv"], plain=query_plain
    )


TILES = [Tile(128, 64, 8), Tile(64, 32, 4), Tile(64, 64, 4, peeled=False)]


@pytest.mark.parametrize("fixed", [None, (67, 130), (67, 128)], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.block_m}x{t.block_n}")
def test_blocks(tile: Tile, fixed: tuple[int, int] | None) -> None:
    """Output and log-sum-exp are those of the kernels for all GPUs, in blocks of any size."""
    if fixed is None and not tile.peeled:
        pytest.skip("varying lengths have no such kernel")
    q_length, kv_length = fixed or (67, 130)
    problem = query_problem([q_length] * 2, [kv_length] * 2, 1, 32, torch.float32)
    q, cu_q, cu_kv = problem["q"], problem["cu_q"], problem["cu_kv"]
    k, v = problem["kv"].unbind(1)
    seqs = Sequences(cu_q, cu_kv, owners_by_kernel(cu_q, len(q)), None, fixed)
    out, lse = launch_hopper_forward(q, k, v, seqs, tile)
    other, other_lse = launch_forward(q, k, v, seqs, Tile(64, 64, 4))
    wide = {name: x.double() if x.is_floating_point() else x for name, x in problem.items()}
    exact = query_reference(**wide).view_as(q)
    assert_within_budget(out, other, exact, "output")
    for s in range(2):
        start = (int(cu_q[s]) // 128 + s if fixed is None else s) * 128
        got, want = (x[:, start : start + q_length] for x in (lse, other_lse))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("extra", [1, 300])
def test_rows_past_the_last_sequence(extra: int) -> None:
    inputs = self_problem([5, 0, 66], 2, 32, torch.float16, extra)
    inputs["qkv"][71:] = float("nan")
    qkv = inputs["qkv"].requires_grad_()
    out = packed_attention(qkv, inputs["cu_seqlens"], impl=HOPPER)
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert out[71:].abs().max() == 0 and grad[71:].abs().max() == 0
    assert out.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("lengths", [(35, 66, 1), (35, 35, 35), (129, 129, 129)], ids=str)
def test_neighbours_do_not_leak(lengths: tuple[int, ...]) -> None:
    """NaN in one sequence, in its inputs or in its gradient, reaches no other, bit for bit."""
    inputs = self_problem(lengths, 1, 32, torch.float16)
    fixed = lengths[0] if len(set(lengths)) == 1 else None
    first, last = inputs["cu_seqlens"][1:3].tolist()
    grad_out = torch.randn(len(inputs["qkv"]), 32).half()
    results = []
    for poison in (False, True):
        x, g = inputs["qkv"].clone(), grad_out.clone()
        if poison:
            x[first:last], g[first:last] = float("nan"), float("nan")
        x.requires_grad_()
        out = packed_attention(x, inputs["cu_seqlens"], fixed, impl=HOPPER)
        results.append((out.detach(), torch.autograd.grad(out, x, g)[0]))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean[:first], dirty[:first]) and clean.isfinite().all()
        assert torch.equal(clean[last:], dirty[last:]) and dirty[first:last].isnan().all()


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("fixed_length", [None, 70])
def test_not_a_number_is_not_hidden(part: int, fixed_length: int | None) -> None:
    """As in the meaning: one in a query spoils its row, one in a key or a value the sequence."""
    inputs = self_problem([70], 1, 32, torch.float32)
    inputs["qkv"][3, part] = float("nan")
    results = []
    for function in (_self, self_plain):
        x = inputs["qkv"].clone().requires_grad_()
        out = function(x, inputs["cu_seqlens"], fixed_length)
        results.append((out.isnan(), torch.autograd.grad(out, x, torch.ones_like(out))[0].isnan()))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_heads_do_not_leak() -> None:
    inputs = self_problem([20, 20], 3, 32, torch.float16)
    inputs["qkv"][:, :, 1] = float("nan")
    for fixed_length in (None, 20):
        qkv = inputs["qkv"].requires_grad_()
        out = packed_attention(qkv, inputs["cu_seqlens"], fixed_length, impl=HOPPER)
        (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
        heads = out.view(-1, 3, 32)
        assert heads[:, ::2].isfinite().all() and heads[:, 1].isnan().all()
        assert grad[:, :, ::2].isfinite().all()


@pytest.mark.parametrize("length", [65, 64, 3])
@pytest.mark.parametrize("fixed", [False, True])
def test_low_and_high_scores(length: int, fixed: bool) -> None:
    """Far below zero, where 2^-lse overflows and must not reach a block's idle rows; and hundreds
    apart, so that one key takes all the weight."""
    for low in (True, False):
        inputs = self_problem([length], 1, 32, torch.float32)
        if low:
            inputs["qkv"][:, 0], inputs["qkv"][:, 1] = -40.0, 40.0
            inputs["qkv"][:, 1] += torch.randn(inputs["qkv"][:, 1].shape) / 100
        else:
            inputs["qkv"][:, 0] *= 50
        inputs["fixed_length"] = length if fixed else None
        assert_matches_meaning(_self, self_reference, inputs, ["qkv"], plain=self_plain)


@pytest.mark.parametrize("lengths", [(), (0, 0)])
@pytest.mark.parametrize("extra", [0, 5])
def test_no_sequences(lengths: tuple[int, ...], extra: int) -> None:
    inputs = self_problem(lengths, 2, 32, torch.float16, extra)
    qkv = inputs["qkv"].requires_grad_()
    out = packed_attention(**inputs, impl=HOPPER)
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert out.shape == (extra, 64) and not out.any() and not grad.any()


def test_no_keys_at_all() -> None:
    inputs = query_problem([3, 2], [0, 0], 2, 32, torch.float16)
    q, kv = (inputs[name].requires_grad_() for name in ("q", "kv"))
    out = packed_query_attention(**inputs, impl=HOPPER)
    grads = torch.autograd.grad(out, [q, kv], torch.ones_like(out))
    assert not out.any() and not grads[0].any() and grads[1].shape == kv.shape


@pytest.mark.parametrize("fixed_length", [None, 20])
def test_rows_apart(fixed_length: int | None) -> None:
    """Tokens may be rows of a wider tensor, 16 bytes or a multiple apart."""
    wide = torch.randn(40, 3 * 2 * 32 + 24).half()
    qkv = wide[:, 8:200].unflatten(1, (3, 2, 32))
    inputs = {"qkv": qkv, "cu_seqlens": offsets([20, 20]), "fixed_length": fixed_length}
    inputs["impl"] = HOPPER
    assert_matches_meaning(packed_attention, self_reference, inputs, ["qkv"], plain=self_plain)


def test_gradient_that_starts_anywhere() -> None:
    """The gradient of the output may lie where the copy engine cannot read."""
    inputs = self_problem([33, 33], 2, 32, torch.float16)
    qkv = inputs["qkv"].requires_grad_()
    out = packed_attention(qkv, inputs["cu_seqlens"], 33, impl=HOPPER)
    aligned = torch.randn_like(out)
    shifted = torch.cat([aligned.new_zeros(1), aligned.flatten()])[1:].view_as(aligned)
    assert shifted.data_ptr() % 16 and shifted.is_contiguous()
    grads = [torch.autograd.grad(out, qkv, g, retain_graph=True)[0] for g in (aligned, shifted)]
    assert torch.equal(*grads)


FLAT = torch.zeros(6 * 3 * 2 * 32 + 64, dtype=torch.float16)
MISFITS: dict[str, tuple[Tensor, str]] = {
    "dtype": (torch.zeros(6, 3, 2, 32), "it wants bfloat16 or float16, not float32"),
    "head_dim": (
        torch.zeros(6, 3, 2, 80, dtype=torch.float16),
        "it wants head_dim 32, 64, 128, not 80",
    ),
    "stride": (
        FLAT.as_strided((6, 3, 2, 32), (196, 64, 32, 1)),
        "it wants tokens a multiple of 16 bytes apart, those of q are 392",
    ),
    "start": (
        FLAT.as_strided((6, 3, 2, 32), (192, 64, 32, 1), 3),
        "it wants tensors that start on a multiple of 16 bytes, q starts 6 bytes into its storage",
    ),
}


@pytest.mark.parametrize(("qkv", "reason"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit(qkv: Tensor, reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"impl = 'triton-hopper' cannot run: {reason}"):
        packed_attention(qkv, offsets([2, 4]), impl=HOPPER)


def test_launch_looks_where_tensors_start() -> None:
    """torch.compile does not know it while it traces."""
    qkv = MISFITS["start"][0]
    with pytest.raises(ValueError, match="'triton-hopper' wants tensors that start on a multiple"):
        _self(qkv, offsets([2, 4]))


def test_operator() -> None:
    """Schema, fake tensors and autograd registration, through the kernels. Of 128 rows, since the
    log-sum-exp of rows that no sequence has is left as it was."""
    inputs = self_problem([128], 1, 32, torch.float32)
    qkv, cu = inputs["qkv"].requires_grad_(), inputs["cu_seqlens"]
    torch.library.opcheck(attention._packed_attention_hopper, (qkv, cu, None, 128))


def test_self_check(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    rejected = []
    monkeypatch.setattr(attention_check, "reject", lambda *key: rejected.append(key))
    monkeypatch.setattr(attention_check, "_LENGTHS", ((1, 17), (17, 17)))
    cpu, half = torch.device("cpu"), torch.float16
    # No float32 and no head_dim 48 for these kernels: nothing to check.
    got = attention_check.self_check(cpu, [32, 48], [half, torch.float32], impls=[HOPPER])
    assert got.keys() == {(half, 32)} and got[half, 32] <= 1 and not rejected

    def wrong(qkv: Tensor, *arguments: Any, **options: Any) -> Tensor:
        assert options["impl"] == HOPPER
        return packed_attention(qkv, *arguments, **options) * math.nan

    monkeypatch.setattr(attention_check, "packed_attention", wrong)
    attention_check.self_check(cpu, [32], [half], impls=[HOPPER])
    assert rejected == [(HOPPER, cpu, half, 32)]
    assert "(triton-hopper) FAILED their self-check on cpu" in caplog.text
    assert "triton is used instead" in caplog.text
