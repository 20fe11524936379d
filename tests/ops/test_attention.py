"""Packed attention on a CPU: meaning, gradient, what it composes with and what it refuses."""

import re
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
from budgets import assert_matches_meaning
from torch import Tensor

from avmae_kernels import attention, attention_backends
from avmae_kernels.attention import packed_attention, packed_query_attention
from avmae_kernels.attention_layout import split_head
from avmae_kernels.attention_meaning import explicit_backward, explicit_forward

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FIXED = [(1, 3), (33, 2), (64, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_varying_lengths(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = self_problem(lengths, 2, 32, dtype)
    assert_matches_meaning(packed_attention, self_reference, inputs, ["qkv"], plain=self_plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "count"), FIXED)
def test_fixed_length(length: int, count: int, dtype: torch.dtype) -> None:
    inputs = self_problem([length] * count, 2, 20, dtype) | {"fixed_length": length}
    assert_matches_meaning(packed_attention, self_reference, inputs, ["qkv"], plain=self_plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", QUERY_LENGTHS.values(), ids=QUERY_LENGTHS.keys())
def test_some_queries(lengths: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    inputs = query_problem(*lengths, 2, 16, dtype)
    arguments = packed_query_attention, query_reference, inputs, ["q", "kv"]
    assert_matches_meaning(*arguments, plain=query_plain)


def test_fixed_lengths_of_some_queries() -> None:
    inputs = query_problem([5, 5], [40, 40], 2, 16, torch.float32)
    varying = packed_query_attention(**inputs)
    assert torch.equal(packed_query_attention(**inputs, fixed_lengths=(5, 40)), varying)


@pytest.mark.parametrize("lengths", [(), (0, 0), (4, 0)])
@pytest.mark.parametrize("extra", [0, 5])
def test_rows_of_no_sequence(lengths: tuple[int, ...], extra: int) -> None:
    """They give zeros and get zero gradients, whatever is in them."""
    inputs = self_problem(lengths, 2, 16, torch.float32, extra)
    used = sum(lengths)
    inputs["qkv"][used:] = float("nan")
    qkv = inputs["qkv"].requires_grad_()
    out = packed_attention(**inputs)
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert out.shape == (used + extra, 32)
    assert out.isfinite().all() and grad.isfinite().all()
    assert not out[used:].any() and not grad[used:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_explicit_meaning(dtype: torch.dtype) -> None:
    """What tensors run that no fused CPU kernel and no kernel of ours takes."""
    q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype) for n in (5, 7, 7))
    grad = torch.randn_like(q)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = explicit_forward(q, k, v)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected, expected_lse = fused(*leaves)
    tolerance = {"rtol": 0, "atol": 100 * torch.finfo(dtype).eps}
    torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(lse, expected_lse, **tolerance)
    grads = explicit_backward(grad, *(x.detach() for x in (q, k, v)), out.detach(), lse.detach())
    for got, want in zip(grads, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(got, want, **tolerance)


def test_gradcheck() -> None:
    inputs = self_problem([3, 0, 2, 2], 2, 3, torch.float64, extra=1)
    cu = inputs["cu_seqlens"]
    leaf = inputs["qkv"].requires_grad_()
    assert torch.autograd.gradcheck(lambda qkv: packed_attention(qkv, cu), [leaf])
    fixed = self_problem([3, 3], 2, 3, torch.float64)["qkv"].requires_grad_()
    assert torch.autograd.gradcheck(lambda qkv: packed_attention(qkv, offsets([3, 3]), 3), [fixed])


def test_gradcheck_of_some_queries() -> None:
    inputs = query_problem([2, 0, 1], [3, 2, 0], 2, 3, torch.float64)
    q, kv = (inputs[name].requires_grad_() for name in ("q", "kv"))
    cu = inputs["cu_q"], inputs["cu_kv"]
    assert torch.autograd.gradcheck(lambda q, kv: packed_query_attention(q, kv, *cu), [q, kv])


def test_expanded_gradient() -> None:
    """The gradient of a sum is one number in every place, with strides of zero."""
    inputs = self_problem([4, 7], 2, 16, torch.float32)
    qkv = inputs["qkv"].requires_grad_()
    (by_sum,) = torch.autograd.grad(packed_attention(**inputs).sum(), qkv)
    out = packed_attention(**inputs)
    (by_ones,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert torch.equal(by_sum, by_ones)


def test_rows_apart() -> None:
    wide = torch.randn(11, 3 * 2 * 16 + 5)
    inputs = {"qkv": wide[:, :96].unflatten(1, (3, 2, 16)), "cu_seqlens": offsets([4, 7])}
    assert not inputs["qkv"].is_contiguous()
    assert_matches_meaning(packed_attention, self_reference, inputs, ["qkv"], plain=self_plain)


def test_no_second_derivative() -> None:
    inputs = self_problem([4], 1, 8, torch.float32)
    qkv = inputs["qkv"].requires_grad_()
    out = packed_attention(**inputs)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="packed_attention has no second derivative"):
        grad.sum().backward()


def test_what_is_kept_for_the_gradient() -> None:
    """The inputs, the output, and one number a head and row, padded to slots: no scores."""
    inputs = self_problem([200, 50], 2, 32, torch.float32)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    qkv = inputs["qkv"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = packed_attention(**inputs)
    sizes = sorted(x.numel() for x in kept)
    slots = 250 // 128 + 2 + 1
    assert sizes == sorted([qkv.numel(), out.numel(), 2 * slots * 128, 3])
    assert {qkv.data_ptr(), out.data_ptr()} <= {x.data_ptr() for x in kept}, "a copy is kept"


SELF_OPERATORS = [
    (attention._packed_attention, attention._packed_attention_backward),
    (attention._packed_attention_hopper, attention._packed_attention_hopper_backward),
]
QUERY_OPERATORS = [
    (attention._packed_query_attention, attention._packed_query_attention_backward),
    (attention._packed_query_attention_hopper, attention._packed_query_attention_hopper_backward),
]


@pytest.mark.parametrize(("op", "backward"), SELF_OPERATORS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operators(op: Any, backward: Any, dtype: torch.dtype) -> None:
    """Schemas, fake tensors and autograd registration, as torch.compile will rely on them."""
    inputs = self_problem([4, 0, 3], 2, 8, dtype, extra=2)
    qkv, cu = inputs["qkv"].requires_grad_(), inputs["cu_seqlens"]
    torch.library.opcheck(attention.slot_owners, (cu, 9))
    torch.library.opcheck(op, (qkv, cu, None, None))
    out, lse = op(qkv.detach(), cu, None, None)
    arguments = (torch.randn_like(out), qkv.detach(), out, lse, cu, None, None)
    torch.library.opcheck(backward, arguments)
    fixed = self_problem([4, 4], 2, 8, dtype)
    qkv = fixed["qkv"].requires_grad_()
    torch.library.opcheck(op, (qkv, fixed["cu_seqlens"], None, 4))


@pytest.mark.parametrize(("op", "backward"), QUERY_OPERATORS, ids=str)
def test_query_operators(op: Any, backward: Any) -> None:
    inputs = query_problem([2, 1], [3, 4], 2, 8, torch.float32)
    q, kv, *cu = inputs.values()
    leaves = q.requires_grad_(), kv.requires_grad_()
    rest = (*cu, None, None, None, None)
    torch.library.opcheck(op, (*leaves, *rest))
    out, lse = op(q.detach(), kv.detach(), *rest)
    arguments = (torch.randn_like(out), q.detach(), kv.detach(), out, lse, *rest)
    torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize("impl", ["auto", "triton-hopper"])
@pytest.mark.parametrize("fixed_length", [None, 5])
def test_compiles_whole(
    fixed_length: int | None, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those for Hopper too, whose operations have a meaning on a CPU as all do."""
    monkeypatch.setattr(attention_backends, "why_unavailable", lambda name, device: None)
    inputs = self_problem([5, 5], 2, 32, torch.float16)
    cu = inputs["cu_seqlens"]

    def block(x: Tensor) -> Tensor:
        qkv = x.unflatten(1, (3, 2, 32))
        y = packed_attention(qkv, cu, fixed_length, impl=impl).sin()
        z = packed_query_attention(qkv[:, 0], qkv[:, 1:], cu, cu, impl=impl)
        return y + z

    x = inputs["qkv"].flatten(1).requires_grad_()
    whole = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for function in (block, whole):
        out = function(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_autocast_leaves_the_dtype_alone() -> None:
    inputs = self_problem([3, 6], 2, 8, torch.float32)
    linear = torch.nn.Linear(8, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_attention(**inputs).dtype == torch.float32
        qkv = linear(torch.randn(9, 8)).unflatten(1, (3, 2, 8))
        out = packed_attention(qkv, inputs["cu_seqlens"])
    assert qkv.dtype == out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad.dtype == torch.float32


def test_heads_are_split_in_powers_of_two() -> None:
    assert [split_head(d) for d in (32, 64, 80, 128)] == [(32, 0), (64, 0), (64, 16), (128, 0)]
    for head_dim in range(1, 129):
        low, high = split_head(head_dim)
        assert low >= 16 and low.bit_count() == 1 and high.bit_count() <= 1
        assert high == 0 or (high >= 16 and low < head_dim)
        assert head_dim <= low + high < max(17, 2 * head_dim)


QKV, CU = torch.zeros(6, 3, 2, 4), offsets([2, 4])
BAD_SELF: dict[str, tuple[dict[str, Any], str]] = {
    "axes": ({"qkv": QKV[:, 0]}, r"wants qkv \[T, 3, H, d\]; got qkv float32 \[6, 2, 4\] on cpu"),
    "parts": ({"qkv": QKV[:, :2]}, r"wants qkv \[T, 3, H, d\]"),
    "integers": ({"qkv": QKV.int()}, "floating-point heads"),
    "no channels": ({"qkv": QKV[..., :0]}, "at least one channel"),
    "layout": ({"qkv": QKV.transpose(2, 3)}, r"\[H, d\] contiguous"),
    "far apart": (
        {"qkv": torch.empty_strided((6, 3, 2, 4), (2**24, 8, 4, 1), device="meta")},
        "tokens less than 16777216 elements apart",
    ),
    "offset type": ({"cu_seqlens": CU.long()}, r"offsets int32 \[S \+ 1\]; got offsets int64"),
    "offset axes": ({"cu_seqlens": CU[None]}, "offsets int32"),
    "no offsets": ({"cu_seqlens": CU[:0]}, "offsets int32"),
    "offset device": ({"cu_seqlens": CU.to("meta")}, "offsets on the device of the tokens"),
    "length": ({"fixed_length": 4}, "2 sequences of fixed_length 4; got qkv"),
    "length zero": ({"fixed_length": 0}, "2 sequences of fixed_length 0"),
    "back end": (
        {"impl": "fast"},
        "impl = 'fast' is not valid: it must be auto, triton, triton-hopper, sdpa,",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_SELF.values(), ids=BAD_SELF.keys())
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_attention(**({"qkv": QKV, "cu_seqlens": CU} | change))


BAD_QUERY: dict[str, tuple[dict[str, Any], str]] = {
    "axes": ({"q": QKV}, r"wants q \[Q, H, d\], kv \[T, 2, H, d\]; got q .* kv"),
    "heads": ({"q": QKV[:, 0, :1]}, r"wants q \[Q, H, d\]"),
    "dtypes": ({"q": QKV[:, 0].double()}, "q and kv of one dtype; got q float64"),
    "layout of q": ({"q": torch.zeros(6, 4, 2).mT}, r"\[H, d\] contiguous.* got q"),
    "layout of kv": ({"kv": torch.zeros(6, 2, 4, 2).mT}, r"\[H, d\] contiguous.* got kv"),
    "offset type": ({"cu_kv": CU.long()}, "offsets int32"),
    "sequences": ({"cu_q": offsets([6])}, "as many sequences in q; got cu_q"),
    "lengths": ({"fixed_lengths": (3, 2)}, r"2 sequences of fixed_lengths \(3, 2\)"),
    "no lengths": ({"fixed_lengths": (0, 3)}, r"2 sequences of fixed_lengths \(0, 3\)"),
}


@pytest.mark.parametrize(("change", "message"), BAD_QUERY.values(), ids=BAD_QUERY.keys())
def test_refuses_queries(change: dict[str, Any], message: str) -> None:
    good = {"q": QKV[:, 0], "kv": QKV[:, 1:], "cu_q": CU, "cu_kv": CU}
    with pytest.raises(ValueError, match=re.compile(message)):
        packed_query_attention(**(good | change))
