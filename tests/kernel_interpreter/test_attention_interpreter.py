"""The attention kernels, interpreted, fp32 and fp16 (the interpreter computes bf16 wrongly)."""

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
from hypothesis import given, settings
from hypothesis import strategies as st

from avmae_kernels import attention_check
from avmae_kernels.attention import packed_attention, packed_query_attention
from avmae_kernels.attention_backends import OWN
from avmae_kernels.attention_backward import launch_backward
from avmae_kernels.attention_forward import launch_forward, short_blocks
from avmae_kernels.attention_layout import (
    SLOT,
    Sequences,
    Tile,
    owners_by_kernel,
    slot_count,
    slot_owners_reference,
    slot_starts,
)

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@BOTH
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_varying_lengths(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = self_problem(lengths, 1 if max(lengths) > 100 else 2, 32, dtype)
    assert_matches_meaning(packed_attention, self_reference, inputs, ["qkv"], plain=self_plain)


@pytest.mark.parametrize("lengths", [(), (0, 0)])
@pytest.mark.parametrize("extra", [0, 5])
def test_no_sequences(lengths: tuple[int, ...], extra: int) -> None:
    inputs = self_problem(lengths, 2, 16, torch.float32, extra)
    qkv = inputs["qkv"].requires_grad_()
    out = packed_attention(**inputs)
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert out.shape == (extra, 32) and not out.any() and not grad.any()


def test_one_key() -> None:
    """The output is its value; queries and keys get nothing but what rounding leaves over."""
    d, eps = 32, torch.finfo(torch.float32).eps
    inputs = self_problem([1, 1, 1], 2, d, torch.float32)
    qkv = inputs["qkv"].requires_grad_()
    out = packed_attention(**inputs)
    grad_out = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    assert torch.equal(out, qkv[:, 2].flatten(1))
    assert torch.equal(grad[:, 2].flatten(1), grad_out)
    # Two sums of d products each, which would cancel if they were exact, times a query or a key.
    sums = d * eps * (grad_out.abs() * out.abs()).unflatten(1, (2, d)).sum(-1, keepdim=True)
    bound = 2 * sums[:, None] * qkv[:, :2].flip(1).abs() * d**-0.5
    assert (grad[:, :2].abs() <= bound).all()


@BOTH
@pytest.mark.parametrize("lengths", QUERY_LENGTHS.values(), ids=QUERY_LENGTHS.keys())
def test_some_queries(lengths: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    inputs = query_problem(*lengths, 2, 16, dtype)
    assert_matches_meaning(
        packed_query_attention, query_reference, inputs, ["q", "kv"], plain=query_plain
    )


@BOTH
@pytest.mark.parametrize(("length", "count"), [(1, 3), (33, 2), (64, 1), (130, 1)])
def test_fixed_length(length: int, count: int, dtype: torch.dtype) -> None:
    inputs = self_problem([length] * count, 2, 16, dtype) | {"fixed_length": length}
    assert_matches_meaning(packed_attention, self_reference, inputs, ["qkv"], plain=self_plain)


@pytest.mark.parametrize("lengths", [(5, 40), (70, 3)])
def test_fixed_lengths_of_some_queries(lengths: tuple[int, int]) -> None:
    inputs = query_problem(*([n] * 2 for n in lengths), 1, 16, torch.float32)
    inputs["fixed_lengths"] = lengths
    assert_matches_meaning(
        packed_query_attention, query_reference, inputs, ["q", "kv"], plain=query_plain
    )


@BOTH
@pytest.mark.parametrize("head_dim", [1, 10, 24, 48, 64, 80, 96, 128])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    """Native ones, two tiles (48 = 32 + 16, 80 = 64 + 16), and tiles with idle columns."""
    inputs = self_problem([3, 18], 3, head_dim, dtype)
    assert_matches_meaning(packed_attention, self_reference, inputs, ["qkv"], plain=self_plain)


TILES = [Tile(128, 64, 8), Tile(64, 128, 4), Tile(64, 32, 4)]


@pytest.mark.parametrize("fixed", [None, (67, 130)], ids=["varying", "fixed"])
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.block_m}x{t.block_n}")
def test_blocks(tile: Tile, fixed: tuple[int, int] | None) -> None:
    """Blocks of other sizes, and unlike between the kernels, give the result of equal ones."""
    problem = query_problem([67], [130], 1, 40, torch.float32)
    kv_tile = Tile(tile.block_m // 2, tile.block_n, 4)
    results = _launch(problem, fixed, tile, (tile, kv_tile))
    small = Tile(64, 64, 4)
    plain = _launch(problem, None, small, (small, small))
    exact = _exact(problem)
    names = ("output", "gradient of q", "gradient of kv")
    for got, low, want, name in zip(results, plain, exact, names, strict=True):
        assert_within_budget(got, low, want, name)


@pytest.mark.parametrize(("q_length", "kv_length"), [(157, 157), (30, 70), (9, 64)])
@pytest.mark.parametrize("head_dim", [32, 80])
def test_keys_that_stay_on_chip(q_length: int, kv_length: int, head_dim: int) -> None:
    count = 1 if kv_length > 100 else 2
    problem = query_problem([q_length] * count, [kv_length] * count, 1, head_dim, torch.float16)
    seqs = Sequences(problem["cu_q"], problem["cu_kv"], fixed=(q_length, kv_length))
    k, v = problem["kv"].unbind(1)
    resident = Tile(64, 64, 4, resident=True)
    out, lse = launch_forward(problem["q"], k, v, seqs, resident)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in problem.items()}
    assert_within_budget(out.flatten(1), query_plain(**problem), query_reference(**wide), "output")
    _, by_tiles = launch_forward(problem["q"], k, v, seqs, Tile(64, 64, 4))
    torch.testing.assert_close(lse, by_tiles, rtol=0, atol=1e-5, equal_nan=True)


def test_blocks_of_short_sequences() -> None:
    for length in range(1, 321):
        blocks = short_blocks(length, 64)
        assert set(blocks[:-1]) <= {64} and blocks[-1] in (16, 32, 64)
        assert sum(blocks) - 32 < length <= sum(blocks) or length < 16


def _widen(problem: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if x.is_floating_point() else x for name, x in problem.items()}


def _launch(
    problem: dict[str, Any],
    fixed: tuple[int, int] | None,
    tile: Tile,
    tiles: tuple[Tile, Tile],
) -> tuple[torch.Tensor, ...]:
    q, cu_q, cu_kv = problem["q"], problem["cu_q"], problem["cu_kv"]
    k, v = problem["kv"].unbind(1)
    owners = (None, None)
    if fixed is None:
        owners = owners_by_kernel(cu_q, len(q)), owners_by_kernel(cu_kv, len(k))
    seqs = Sequences(cu_q, cu_kv, *owners, fixed)
    out, lse = launch_forward(q, k, v, seqs, tile)
    grad_q, grad_kv = torch.empty_like(q), torch.empty_like(problem["kv"])
    grads = (grad_q, *grad_kv.unbind(1))
    launch_backward(_ramp(q), q, k, v, out, lse, seqs, grads, tiles)
    return out, grad_q, grad_kv


def _exact(problem: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    wide = _widen(problem)
    leaves = [wide[name].requires_grad_() for name in ("q", "kv")]
    out = query_reference(**wide).view_as(wide["q"])
    return out.detach(), *torch.autograd.grad(out, leaves, _ramp(problem["q"]).double())


def _ramp(x: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, x.numel()).view_as(x)


@pytest.mark.parametrize("extra", [1, 300])
def test_rows_past_the_last_sequence(extra: int) -> None:
    inputs = self_problem([5, 0, 66], 2, 16, torch.float32, extra)
    inputs["qkv"][71:] = float("nan")
    qkv = inputs["qkv"].requires_grad_()
    out = packed_attention(qkv, inputs["cu_seqlens"])
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out).cumsum(0))
    assert out[71:].abs().max() == 0 and grad[71:].abs().max() == 0
    assert out.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("fixed", [False, True])
def test_neighbours_do_not_leak(fixed: bool) -> None:
    """NaN in one sequence, in its inputs or in its gradient, reaches no other, bit for bit."""
    lengths = [35, 35, 35] if fixed else [35, 66, 1]
    inputs = self_problem(lengths, 1, 80, torch.float16)
    arguments = [inputs["cu_seqlens"]] + [35] * fixed
    first, last = inputs["cu_seqlens"][1:3].tolist()
    clean = inputs["qkv"].requires_grad_()
    grad_out = torch.randn(len(clean), 80).half()
    dirty, dirty_grad_out = clean.detach().clone(), grad_out.clone()
    dirty[first:last] = float("nan")
    dirty_grad_out[first:last] = float("nan")
    dirty.requires_grad_()
    outs = [packed_attention(x, *arguments) for x in (clean, dirty)]
    grads = [
        torch.autograd.grad(out, x, g)[0]
        for out, x, g in zip(outs, (clean, dirty), (grad_out, dirty_grad_out), strict=True)
    ]
    for a, b in (outs, grads):
        assert torch.equal(a[:first], b[:first]) and torch.equal(a[last:], b[last:])
        assert b[first:last].isnan().all()


@pytest.mark.parametrize("part", [0, 1, 2])
def test_not_a_number_is_not_hidden(part: int) -> None:
    """As in the meaning: one in a query spoils its row, one in a key or a value the sequence."""
    inputs = self_problem([70], 1, 16, torch.float32)
    inputs["qkv"][3, part] = float("nan")
    results = []
    for function in (packed_attention, self_plain):
        x = inputs["qkv"].clone().requires_grad_()
        out = function(x, inputs["cu_seqlens"])
        results.append((out.isnan(), torch.autograd.grad(out, x, torch.ones_like(out))[0].isnan()))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_heads_do_not_leak() -> None:
    """80 columns of a head are read as 64 + 16, and 24 as 16 + 16: not a column more."""
    for head_dim in (24, 80):
        inputs = self_problem([20], 3, head_dim, torch.float32)
        inputs["qkv"][:, :, 1] = float("nan")
        qkv = inputs["qkv"].requires_grad_()
        out = packed_attention(**inputs)
        (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
        heads = out.view(-1, 3, head_dim)
        assert heads[:, ::2].isfinite().all() and heads[:, 1].isnan().all()
        assert grad[:, :, ::2].isfinite().all()


@pytest.mark.parametrize("lengths", [[65], [64], [3]])
def test_low_scores(lengths: list[int]) -> None:
    """All scores far below zero: 2^-lse overflows, which must not reach a block's idle rows."""
    inputs = self_problem(lengths, 1, 16, torch.float32)
    inputs["qkv"][:, 0], inputs["qkv"][:, 1] = -40.0, 40.0
    inputs["qkv"][:, 1] += torch.randn(inputs["qkv"][:, 1].shape) / 100
    assert_matches_meaning(packed_attention, self_reference, inputs, ["qkv"], plain=self_plain)


def test_high_scores() -> None:
    """Scores of hundreds, and one key that takes all the weight."""
    inputs = self_problem([70, 3], 2, 32, torch.float32)
    inputs["qkv"][:, 0] *= 50
    assert_matches_meaning(packed_attention, self_reference, inputs, ["qkv"], plain=self_plain)


def test_equal_scores() -> None:
    """All ones: the mean of the values, and no gradient for queries and keys."""
    qkv = torch.ones(130, 3, 1, 64, dtype=torch.float16, requires_grad=True)
    out = packed_attention(qkv, offsets([130]))
    assert torch.equal(out, torch.ones_like(out))
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert grad[:, :2].abs().max() == 0


def test_place_in_the_batch_changes_nothing() -> None:
    """A sequence gives the same bits alone and between others."""
    inputs = self_problem([66, 130, 9], 1, 32, torch.float16)
    out = packed_attention(**inputs)
    alone = packed_attention(inputs["qkv"][66:196], offsets([130]))
    assert torch.equal(out[66:196], alone)


@pytest.mark.parametrize("fixed", [None, (70, 70)], ids=["varying", "fixed"])
def test_log_sum_exp(fixed: tuple[int, int] | None) -> None:
    """Powers of two, each sequence at its slot."""
    lengths = [70, 70] if fixed else [70, 0, 130]
    inputs = self_problem(lengths, 2, 16, torch.float32)
    q, k, v = inputs["qkv"].unbind(1)
    cu = inputs["cu_seqlens"]
    owners = None if fixed else owners_by_kernel(cu, len(q))
    _, lse = launch_forward(q, k, v, Sequences(cu, cu, owners, owners, fixed), Tile(64, 64, 4))
    starts = [0, 1] if fixed else slot_starts(cu).tolist()
    for s, length in enumerate(lengths):
        rows = slice(int(cu[s]), int(cu[s]) + length)
        scores = torch.einsum("ihd,jhd->hij", q[rows].double(), k[rows].double()) / 4
        got = lse[:, SLOT * starts[s] :][:, :length].double() / math.log2(math.e)
        torch.testing.assert_close(got, scores.logsumexp(-1), rtol=0, atol=1e-5)


def test_expanded_gradient() -> None:
    """The gradient of a sum is one number in every place, with strides of zero."""
    inputs = self_problem([17, 4], 2, 16, torch.float32)
    qkv = inputs["qkv"].requires_grad_()
    (by_sum,) = torch.autograd.grad(packed_attention(**inputs).sum(), qkv)
    out = packed_attention(**inputs)
    (by_ones,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert torch.equal(by_sum, by_ones)


def test_rows_apart() -> None:
    """Tokens may be rows of a wider tensor."""
    wide = torch.randn(40, 3 * 2 * 16 + 5)
    qkv = wide[:, :96].unflatten(1, (3, 2, 16)).requires_grad_()
    inputs = {"qkv": qkv, "cu_seqlens": offsets([23, 17])}
    assert_matches_meaning(packed_attention, self_reference, inputs, ["qkv"], plain=self_plain)


@pytest.mark.parametrize("length", [65, 130])
def test_offsets_past_32_bits(length: int) -> None:
    """The last block starts 2^31 elements from the first, in 4 GB that are hardly touched."""
    T, d, stride = 130, 16, 2**24
    cu = offsets([length] * (T // length))
    storage = torch.UntypedStorage(((T - 1) * stride + 3 * d) * 2)
    far = torch.tensor([], dtype=torch.float16).set_(storage, 0, (T, 3, 1, d), (stride, d, d, 1))
    near = torch.randn(T, 3, 1, d).half()
    far.copy_(near)
    results = []
    for qkv in (far, near):
        out, lse = torch.ops.avmae.packed_attention(qkv, cu, None, length)
        backward = torch.ops.avmae.packed_attention_backward
        results.append((out, backward(out, qkv, out, lse, cu, None, length)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 300), max_size=6), st.integers(0, 300))
def test_slot_owners(lengths: list[int], extra: int) -> None:
    """The kernel's owners; every sequence has slots for its rows, the rest goes to no sequence."""
    cu, tokens = offsets(lengths), sum(lengths) + extra
    owners = owners_by_kernel(cu, tokens)
    assert torch.equal(owners, slot_owners_reference(cu, tokens))
    assert len(owners) == slot_count(tokens, len(lengths), None)
    slots = owners.bincount(minlength=len(lengths) + 1)
    for length, count in zip([*lengths, extra], slots.tolist(), strict=True):
        assert count * SLOT >= length


def test_self_check(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    rejected = []
    monkeypatch.setattr(attention_check, "reject", lambda *key: rejected.append(key))
    monkeypatch.setattr(attention_check, "_LENGTHS", ((1, 17), (17, 17)))
    cpu, half = torch.device("cpu"), torch.float16
    (share,) = attention_check.self_check(cpu, [16], [half]).values()
    assert share <= 1 and not rejected and not caplog.records

    def wrong(qkv: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return packed_attention(qkv, *arguments, **options) * 1.01

    monkeypatch.setattr(attention_check, "packed_attention", wrong)
    (share,) = attention_check.self_check(cpu, [16], [half]).values()
    assert share > 1 and rejected == [(OWN, cpu, half, 16)]
    assert "FAILED their self-check on cpu for torch.float16, head_dim 16" in caplog.text
