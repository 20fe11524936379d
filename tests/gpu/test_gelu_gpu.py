"""The kernels of `bias_gelu` on a GPU."""

import pytest
import torch
from budgets import assert_matches_meaning
from torch import Tensor

from avmae_kernels.gelu import Approximation, bias_gelu, bias_gelu_reference

SHAPES = [(0, 32), (1, 1), (5, 64), (4, 100), (70, 257), (306, 3072), (2064, 1536), (999, 5120)]
FORMS: list[Approximation] = ["tanh", "erf"]


def _inputs(T: int, M: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (4 * torch.randn(T, M, device="cuda")).to(dtype), torch.randn(M, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_meaning(shape: tuple[int, int], form: Approximation, dtype: torch.dtype) -> None:
    z, bias = _inputs(*shape, dtype)
    inputs = {"z": z, "bias": bias, "approximate": form}
    assert_matches_meaning(bias_gelu, bias_gelu_reference, inputs, ["z", "bias"])


@pytest.mark.parametrize("form", FORMS)
def test_every_value_of_bfloat16(form: Approximation) -> None:
    """All 65280 numbers: nothing overflows on the way, within one unit of the last place."""
    z = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(-1, 256)
    z = torch.where(z.isfinite(), z, 0).cuda()
    bias = torch.zeros(256, device="cuda")
    y = bias_gelu(z, bias, form)
    exact = bias_gelu_reference(z.double(), bias.double(), form)
    # Below the smallest normal number the GPU may flush to zero.
    unit = (exact.abs() * 2.0**-8).clamp(min=2.0**-126)
    # Far below zero both forms cancel in fp32; its rounding error counts there too.
    budget = 1.01 * unit + z.double().abs() * 2.0**-24
    assert ((y.double() - exact).abs() <= budget).all()


def _everything(z: Tensor, bias: Tensor) -> list[Tensor]:
    z, bias = z.detach().requires_grad_(), bias.detach().requires_grad_()
    y = bias_gelu(z, bias)
    return [y, *torch.autograd.grad(y, (z, bias), torch.cos(y))]


def test_same_bits_every_time() -> None:
    z, bias = _inputs(4096, 3072, torch.bfloat16)
    first = _everything(z, bias)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(_everything(z, bias), first, strict=True))


def test_rows_do_not_depend_on_their_neighbours() -> None:
    z, bias = _inputs(65, 1536, torch.bfloat16)
    among, alone = _everything(z, bias), _everything(z[7:8], bias)
    assert torch.equal(alone[0], among[0][7:8]) and torch.equal(alone[1], among[1][7:8])
    z[6] = float("nan")
    beside = _everything(z, bias)
    assert torch.equal(beside[0][7:], among[0][7:]) and torch.equal(beside[1][7:], among[1][7:])


def test_past_two_to_the_31_elements() -> None:
    M = 4096
    T = 2**31 // M + 3
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("wants a GPU with 40 GB of memory")
    z = torch.zeros(T, M, dtype=torch.bfloat16, device="cuda")
    z[-1] = torch.randn(M, device="cuda").bfloat16()
    bias = torch.zeros(M, device="cuda")
    got, expected = _everything(z, bias), _everything(z[-1:], bias)
    assert torch.equal(got[0][-1:], expected[0]) and torch.equal(got[1][-1:], expected[1])


def test_cuda_graph() -> None:
    z, bias = _inputs(2064, 1536, torch.bfloat16)
    _everything(z, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _everything(z, bias)
    z.normal_()
    bias.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, _everything(z, bias), strict=True))
