"""The attention kernels on a GPU: against float64 and beside torch's own attention."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import LENGTHS, QUERY_LENGTHS, offsets, query_problem, self_problem
from torch import Tensor

from avmae_kernels.attention import packed_attention, packed_query_attention
from avmae_kernels.attention_backends import BACKENDS, HOPPER, KERNELS, OWN, why_unavailable
from avmae_kernels.attention_check import self_check
from avmae_kernels.attention_hopper import HEAD_DIMS as HOPPER_HEAD_DIMS
from avmae_kernels.attention_hopper import why_unsupported
from avmae_kernels.attention_meaning import packed_attention_reference

GPU = torch.device("cuda", 0)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEAD_DIMS = [32, 64, 80, 128]
# Ours may be this much worse than torch's scaled_dot_product_attention in the same dtype.
BESIDE_TORCH = 1.2
EDGES = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 157, 306)
FIXED = [(1, 9), (2, 9), (31, 8), (64, 8), (129, 4), (157, 4), (306, 3), (1568, 2), (2064, 2)]


# Every test of numbers is one of each of our back ends.
EACH = pytest.mark.parametrize("impl", KERNELS)


def _skip_unless_it_runs(impl: str, dtype: torch.dtype, head_dim: int) -> None:
    reason = why_unavailable(impl, GPU)
    if reason is None and impl == HOPPER:
        reason = why_unsupported(dtype, head_dim)
    if reason is not None:
        pytest.skip(f"{impl}: {reason}")


def _rms(x: Tensor) -> Tensor:
    return x.double().square().mean().sqrt()


def _assert_as_good_as_torch(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], leaves: list[Tensor]
) -> None:
    """Output and gradients of `ours` and of `plain` (torch's own), against `plain` in float64."""
    low = [x.to(GPU).requires_grad_() for x in leaves]
    exact = [x.to(GPU).double().requires_grad_() for x in leaves]
    results = []
    for function, inputs in ((ours, low), (plain, low), (plain, exact)):
        out = function(*inputs)
        grad = (torch.arange(out.numel(), device=GPU) % 13 - 6).view_as(out).to(out.dtype) / 8
        results.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
    for number, (got, beside, want) in enumerate(zip(*results, strict=True)):
        assert got.isfinite().all()
        rounding = torch.finfo(got.dtype).eps * _rms(want) / 4
        error, allowed = _rms(got - want), BESIDE_TORCH * _rms(beside - want) + rounding
        assert error <= allowed, f"result {number}: rms error {error:.3g} > {allowed:.3g}"
        worst = 2 * (beside - want).abs().max() + 4 * rounding
        assert (got - want).abs().max() <= worst, f"result {number}"


def _self(cu: Tensor, fixed_length: int | None, impl: str) -> Callable[[Tensor], Tensor]:
    return lambda qkv: packed_attention(qkv, cu, fixed_length, impl=impl)


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, *HEAD_DIMS])
def test_edges(head_dim: int, dtype: torch.dtype, impl: str) -> None:
    _skip_unless_it_runs(impl, dtype, head_dim)
    cu = offsets(EDGES).to(GPU)
    qkv = self_problem(EDGES, 3, head_dim, dtype)["qkv"]
    _assert_as_good_as_torch(_self(cu, None, impl), _self(cu, None, "sdpa"), [qkv])


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_varying_lengths(lengths: tuple[int, ...], dtype: torch.dtype, impl: str) -> None:
    _skip_unless_it_runs(impl, dtype, 64)
    cu = offsets(lengths).to(GPU)
    qkv = self_problem(lengths, 2, 64, dtype)["qkv"]
    _assert_as_good_as_torch(_self(cu, None, impl), _self(cu, None, "sdpa"), [qkv])


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("length", "count"), FIXED)
def test_fixed_length(
    length: int, count: int, head_dim: int, dtype: torch.dtype, impl: str
) -> None:
    _skip_unless_it_runs(impl, dtype, head_dim)
    cu = offsets([length] * count).to(GPU)
    qkv = self_problem([length] * count, 3, head_dim, dtype)["qkv"]
    _assert_as_good_as_torch(_self(cu, length, impl), _self(cu, length, "sdpa"), [qkv])


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", QUERY_LENGTHS.values(), ids=QUERY_LENGTHS.keys())
def test_some_queries(lengths: tuple[tuple[int, ...], ...], dtype: torch.dtype, impl: str) -> None:
    _skip_unless_it_runs(impl, dtype, 32)
    problem = query_problem(*lengths, 2, 32, dtype)
    cu = problem["cu_q"].to(GPU), problem["cu_kv"].to(GPU)

    def run(name: str) -> Callable[..., Tensor]:
        return lambda q, kv: packed_query_attention(q, kv, *cu, impl=name)

    _assert_as_good_as_torch(run(impl), run("sdpa"), [problem["q"], problem["kv"]])


@EACH
def test_mixes(impl: str) -> None:
    """Lengths drawn at random, with empty sequences and rows that belong to none."""
    _skip_unless_it_runs(impl, torch.bfloat16, 64)
    generator = random.Random(0)
    for _ in range(20):
        lengths = [generator.choice([0, *EDGES, 700]) for _ in range(generator.randint(1, 12))]
        cu = offsets(lengths).to(GPU)
        qkv = self_problem(lengths, 2, 64, torch.bfloat16, extra=generator.randint(0, 300))["qkv"]
        _assert_as_good_as_torch(_self(cu, None, impl), _self(cu, None, "sdpa"), [qkv])


@EACH
@pytest.mark.parametrize("fixed_length", [None, 306])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_same_bits_in_every_run(head_dim: int, fixed_length: int | None, impl: str) -> None:
    _skip_unless_it_runs(impl, torch.bfloat16, head_dim)
    lengths = [306] * 16
    cu = offsets(lengths).to(GPU)
    qkv = self_problem(lengths, 6, head_dim, torch.bfloat16)["qkv"].to(GPU).requires_grad_()
    first: list[Tensor] = []
    for _ in range(20):
        out = packed_attention(qkv, cu, fixed_length, impl=impl)
        results = [out.detach(), torch.autograd.grad(out, qkv, out.detach())[0]]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


@EACH
def test_place_in_the_batch_changes_nothing(impl: str) -> None:
    _skip_unless_it_runs(impl, torch.bfloat16, 64)
    lengths = [66, 2064, 9]
    cu = offsets(lengths).to(GPU)
    qkv = self_problem(lengths, 2, 64, torch.bfloat16)["qkv"].to(GPU)
    alone = packed_attention(qkv[66:2130].contiguous(), offsets([2064]).to(GPU), impl=impl)
    # Both as long sequences: the mean length decides the tiles.
    assert torch.equal(packed_attention(qkv, cu, impl=impl)[66:2130], alone)


@EACH
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("fixed", [False, True])
def test_neighbours_do_not_leak(fixed: bool, head_dim: int, impl: str) -> None:
    _skip_unless_it_runs(impl, torch.bfloat16, head_dim)
    lengths = [157] * 3 if fixed else [157, 300, 1]
    cu = offsets(lengths).to(GPU)
    qkv = self_problem(lengths, 2, head_dim, torch.bfloat16)["qkv"].to(GPU)
    first, last = cu[1:3].tolist()
    results = []
    for poison in (False, True):
        x = qkv.clone()
        grad = torch.ones(len(x), 2 * head_dim, dtype=x.dtype, device=GPU)
        if poison:
            x[first:last], grad[first:last] = float("nan"), float("nan")
        x.requires_grad_()
        out = packed_attention(x, cu, 157 if fixed else None, impl=impl)
        results.append((out.detach(), torch.autograd.grad(out, x, grad)[0]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[:first], b[:first]) and torch.equal(a[last:], b[last:])


@EACH
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_magnitudes(scale: float, impl: str) -> None:
    """All ones, and scores so large that one key takes all the weight."""
    _skip_unless_it_runs(impl, torch.bfloat16, 64)
    cu = offsets([330, 65]).to(GPU)
    qkv = self_problem([330, 65], 2, 64, torch.bfloat16)["qkv"]
    qkv = torch.ones_like(qkv) if scale == 0 else qkv * torch.tensor([scale, 1, 1])[:, None, None]
    leaves = [qkv.bfloat16()]
    _assert_as_good_as_torch(_self(cu, None, impl), _self(cu, None, "sdpa"), leaves)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in KERNELS])
@pytest.mark.parametrize("fixed_length", [None, 306])
def test_libraries_agree(name: str, fixed_length: int | None) -> None:
    reason = why_unavailable(name, GPU)
    if name == "sdpa-cudnn" and fixed_length is None:
        reason = "cuDNN is asked for fixed lengths only"
    if reason is not None:
        pytest.skip(reason)
    lengths = [306] * 4 if fixed_length else [306, 64, 1, 900]
    cu = offsets(lengths).to(GPU)
    qkv = self_problem(lengths, 4, 64, torch.bfloat16)["qkv"]
    ours, theirs = _self(cu, fixed_length, OWN), _self(cu, fixed_length, name)
    q, k, v = qkv.to(GPU).double().unbind(1)
    exact = packed_attention_reference(q, k, v, cu, cu).flatten(1)
    out = ours(qkv.to(GPU)), theirs(qkv.to(GPU))
    errors = [_rms(x - exact) for x in out]
    assert errors[0] <= BESIDE_TORCH * errors[1] + torch.finfo(torch.bfloat16).eps / 8


def _step(qkv: Tensor, cu: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    out = packed_attention(qkv, cu, impl=impl)
    return out, torch.autograd.grad(out, qkv, out.detach())[0]


@EACH
def test_graph_is_replayed_with_new_contents(impl: str) -> None:
    """Nothing of the lengths is baked in: a graph captured with some runs rightly with others."""
    _skip_unless_it_runs(impl, torch.bfloat16, 64)
    lengths = [[157, 306, 0, 64], [1, 2, 300, 224]]
    problems = [self_problem(n, 4, 64, torch.bfloat16, 0) for n in lengths]
    qkv = problems[0]["qkv"].to(GPU).requires_grad_()
    cu = problems[0]["cu_seqlens"].to(GPU)
    _step(qkv, cu, impl)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(qkv, cu, impl)
    for problem in problems:
        with torch.no_grad():
            qkv.copy_(problem["qkv"])
        cu.copy_(problem["cu_seqlens"])
        graph.replay()
        for got, want in zip(captured, _step(qkv, cu, impl), strict=True):
            assert torch.equal(got, want)


@EACH
def test_nothing_waits_for_the_gpu(impl: str) -> None:
    _skip_unless_it_runs(impl, torch.bfloat16, 64)
    inputs = self_problem([306, 64, 2], 4, 64, torch.bfloat16)
    qkv, cu = inputs["qkv"].to(GPU).requires_grad_(), inputs["cu_seqlens"].to(GPU)
    _step(qkv, cu, impl)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(qkv, cu, impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EACH
def test_runs_on_the_current_stream(impl: str) -> None:
    _skip_unless_it_runs(impl, torch.bfloat16, 64)
    inputs = self_problem([306] * 64, 12, 64, torch.bfloat16)
    qkv, cu = inputs["qkv"].to(GPU).requires_grad_(), inputs["cu_seqlens"].to(GPU)
    expected = _step(qkv, cu, impl)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # The input is right only after a while, and only on this stream.
        late = torch.zeros_like(qkv)
        torch.cuda._sleep(50_000_000)
        late.copy_(qkv.detach())
        late.requires_grad_()
        got = _step(late, cu, impl)
    torch.cuda.current_stream().wait_stream(side)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@EACH
def test_runs_on_the_tensors_device(impl: str) -> None:
    _skip_unless_it_runs(impl, torch.bfloat16, 64)
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    inputs = self_problem([306, 64], 4, 64, torch.bfloat16)
    results = [
        _step(inputs["qkv"].to(device).requires_grad_(), inputs["cu_seqlens"].to(device), impl)
        for device in ("cuda:0", "cuda:1")
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@EACH
def test_more_than_2_31_elements(impl: str) -> None:
    _skip_unless_it_runs(impl, torch.bfloat16, 128)
    H, d, length = 16, 128, 512
    T = (2**31 // (3 * H * d) // length + 2) * length
    # qkv, output and both gradients.
    if torch.cuda.mem_get_info(GPU)[0] < 10 * T * H * d * 2:
        pytest.skip("not enough memory on this GPU")
    qkv = torch.randn(T, 3, H, d, dtype=torch.bfloat16, device=GPU).requires_grad_()
    cu = torch.arange(0, T + 1, length, dtype=torch.int32, device=GPU)
    out, grad = _step(qkv, cu, impl)
    last = qkv.detach()[-length:].clone().requires_grad_()
    expected = _step(last, offsets([length]).to(GPU), impl)
    assert torch.equal(out[-length:], expected[0]) and torch.equal(grad[-length:], expected[1])


@EACH
@pytest.mark.parametrize("fixed_length", [None, 33])
def test_compiled_whole(fixed_length: int | None, impl: str) -> None:
    _skip_unless_it_runs(impl, torch.bfloat16, 64)
    inputs = self_problem([33, 33], 2, 64, torch.bfloat16)
    qkv, cu = inputs["qkv"].to(GPU).requires_grad_(), inputs["cu_seqlens"].to(GPU)

    def step(x: Tensor) -> Tensor:
        return packed_attention(x * 2, cu, fixed_length, impl=impl).float().square().sum()

    (got,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(qkv), qkv)
    (want,) = torch.autograd.grad(step(qkv), qkv)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@EACH
def test_self_check_passes(impl: str) -> None:
    _skip_unless_it_runs(impl, torch.bfloat16, 64)
    shares: dict[Any, float] = self_check(GPU, HEAD_DIMS, DTYPES, impls=[impl])
    kinds = len(HEAD_DIMS) * len(DTYPES) if impl == OWN else 2 * len(HOPPER_HEAD_DIMS)
    assert len(shares) == kinds
    assert all(share <= 1 for share in shares.values()), shares


def _fixed_step(qkv: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
    out = packed_attention(qkv, cu, 157, impl=HOPPER)
    return out, torch.autograd.grad(out, qkv, out.detach())[0]


def test_graph_keeps_descriptors() -> None:
    """Replays read what lies then where the descriptors pointed at capture."""
    _skip_unless_it_runs(HOPPER, torch.bfloat16, 64)
    problems = [self_problem([157] * 4, 4, 64, torch.bfloat16) for _ in range(2)]
    qkv = problems[0]["qkv"].to(GPU).requires_grad_()
    cu = problems[0]["cu_seqlens"].to(GPU)
    _fixed_step(qkv, cu)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _fixed_step(qkv, cu)
    for problem in problems:
        with torch.no_grad():
            qkv.copy_(problem["qkv"])
        graph.replay()
        for got, want in zip(captured, _fixed_step(qkv, cu), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("head_dim", HOPPER_HEAD_DIMS)
@pytest.mark.parametrize("lengths", [(5, 40), (1568, 2064), (306, 157)], ids=str)
def test_fixed_lengths_of_some_queries(lengths: tuple[int, int], head_dim: int) -> None:
    _skip_unless_it_runs(HOPPER, torch.bfloat16, head_dim)
    problem = query_problem(*([n] * 3 for n in lengths), 2, head_dim, torch.bfloat16)
    cu = problem["cu_q"].to(GPU), problem["cu_kv"].to(GPU)

    def run(name: str) -> Callable[..., Tensor]:
        return lambda q, kv: packed_query_attention(q, kv, *cu, lengths, impl=name)

    _assert_as_good_as_torch(run(HOPPER), run("sdpa"), [problem["q"], problem["kv"]])
