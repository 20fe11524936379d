"""The kernels of `add_layer_norm` on a GPU."""

import pytest
import torch
from budgets import assert_matches_meaning
from norm_cases import SMALL_SHAPES, VARIANTS, WIDE_SHAPES, norm_inputs, plain_add_layer_norm

from avmae_kernels.norm import add_layer_norm, add_layer_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Besides the shapes of the other tests: token counts of the paper's clips, more rows than programs.
LARGE = [(157, 768), (306, 1024), (2064, 384), (2064, 512), (5000, 1280)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SMALL_SHAPES + WIDE_SHAPES + LARGE, ids=str)
def test_matches_meaning(shape: tuple[int, int], variant: str, dtype: torch.dtype) -> None:
    inputs, differentiable = norm_inputs(*shape, variant, dtype, "cuda")
    assert_matches_meaning(
        add_layer_norm,
        add_layer_norm_reference,
        inputs,
        differentiable,
        plain=plain_add_layer_norm,
    )


def _everything(inputs: dict, names: list[str]) -> list[torch.Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    outs = add_layer_norm(**{**inputs, **leaves})
    grads = torch.autograd.grad(outs, list(leaves.values()), [torch.cos(out) for out in outs])
    return [*outs, *grads]


@pytest.mark.parametrize("D", [384, 1280])
def test_same_bits_every_time(D: int) -> None:
    inputs, names = norm_inputs(4096, D, "bias and scale", torch.bfloat16, "cuda")
    first = _everything(inputs, names)
    for _ in range(20):
        for got, expected in zip(_everything(inputs, names), first, strict=True):
            assert torch.equal(got, expected)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """A row's results are the same alone, among others, and beside NaN."""
    inputs, names = norm_inputs(65, 768, "update", torch.bfloat16, "cuda")
    among = _everything(inputs, names)
    alone = {name: v[7:8] if name in ("x", "update") else v for name, v in inputs.items()}
    for got, expected in zip(_everything(alone, names)[:4], among, strict=False):
        assert torch.equal(got, expected[7:8])
    inputs["x"][6] = float("nan")
    for got, expected in zip(_everything(inputs, names)[:4], among, strict=False):
        assert torch.equal(got[7:], expected[7:])


def test_past_two_to_the_31_elements() -> None:
    """The last row of a tensor whose offsets do not fit in 32 bits."""
    D = 2048
    T = 2**31 // D + 3
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("wants a GPU with 40 GB of memory")
    x = torch.ones(T, D, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(D, device="cuda").bfloat16()
    x.requires_grad_()
    weight, bias = torch.ones(D, device="cuda"), torch.zeros(D, device="cuda")
    _, y = add_layer_norm(x, None, weight, bias, 1e-6)
    _, expected = add_layer_norm(x[-1:], None, weight, bias, 1e-6)
    assert torch.equal(y[-1:], expected)
    grad_y = torch.zeros_like(y)
    grad_y[-1] = x.detach()[-1].flip(0)
    (grad,) = torch.autograd.grad(y, x, grad_y)
    (expected_grad,) = torch.autograd.grad(expected, x, grad_y[-1:])
    assert torch.equal(grad[-1], expected_grad[-1])


def test_autocast() -> None:
    inputs, names = norm_inputs(64, 384, "wide stream", torch.bfloat16, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        total, y = add_layer_norm(**inputs)
    assert total.dtype == torch.float32 and y.dtype == torch.bfloat16
    plain_total, plain_y = add_layer_norm(**inputs)
    assert torch.equal(total, plain_total)
    # Both are one rounding of the same fp32 value.
    assert torch.equal(y, plain_y.bfloat16())


def test_other_stream_and_cuda_graph() -> None:
    """Captured once, replayed on new contents: no host work is baked in."""
    inputs, names = norm_inputs(2064, 384, "bias and scale", torch.bfloat16, "cuda")
    leaves = {name: inputs[name].requires_grad_() for name in names}

    def step() -> list[torch.Tensor]:
        outs = add_layer_norm(**{**inputs, **leaves})
        return [*outs, *torch.autograd.grad(outs, list(leaves.values()), outs)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for name in names:
            inputs[name].copy_(torch.randn_like(inputs[name]))
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


def test_nothing_waits_for_the_gpu() -> None:
    inputs, names = norm_inputs(300, 768, "bias and scale", torch.bfloat16, "cuda")
    _everything(inputs, names)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _everything(inputs, names)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two GPUs")
def test_another_device_than_the_current_one() -> None:
    inputs, names = norm_inputs(64, 384, "update", torch.bfloat16, "cuda:1")
    moved, _ = norm_inputs(64, 384, "update", torch.bfloat16, "cuda:0")
    for got, expected in zip(_everything(inputs, names), _everything(moved, names), strict=True):
        assert got.device.index == 1 and torch.equal(got.cpu(), expected.cpu())
