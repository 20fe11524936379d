"""`bias_gelu` on a CPU: its meaning, its gradients, what it keeps and what it refuses."""

from typing import Any

import pytest
import torch
from budgets import assert_matches_meaning
from torch import Tensor
from torch.nn import functional as F

from avmae_kernels.gelu import Approximation, bias_gelu, bias_gelu_reference

SHAPES = [(0, 32), (1, 1), (5, 64), (4, 100), (33, 768)]
FORMS: list[Approximation] = ["tanh", "erf"]


@pytest.fixture(autouse=True)
def through_the_operation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 too, which goes past it on a CPU."""
    if "straight" not in request.node.name:
        monkeypatch.setattr("avmae_kernels.gelu.eager_float32_on_cpu", lambda *tensors: False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_meaning(shape: tuple[int, int], form: Approximation, dtype: torch.dtype) -> None:
    z, bias = 4 * torch.randn(shape), torch.randn(shape[1])
    inputs = {"z": z.to(dtype), "bias": bias, "approximate": form}
    assert_matches_meaning(bias_gelu, bias_gelu_reference, inputs, ["z", "bias"])


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Approximation) -> None:
    z = (3 * torch.randn(4, 6, dtype=torch.float64)).requires_grad_()
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *leaves: bias_gelu(*leaves, form), (z, bias))


def test_inputs_stay_as_they_are() -> None:
    """The sum is made and activated in one tensor, which must not be that of z."""
    z, bias = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    before = z.detach().clone()
    bias_gelu(z, bias).sum().backward()
    assert torch.equal(z.detach(), before)


def test_expanded_gradient() -> None:
    z, bias = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    by_sum = torch.autograd.grad(bias_gelu(z, bias).sum(), (z, bias))
    by_ones = torch.autograd.grad(bias_gelu(z, bias), (z, bias), torch.ones(4, 6))
    torch.testing.assert_close(by_sum, by_ones, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_float32_goes_straight_to_the_meaning(form: Approximation) -> None:
    z, bias = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    y = bias_gelu(z, bias, form)
    assert "Gelu" in y.grad_fn.name()
    assert torch.equal(y, bias_gelu_reference(z, bias, form))
    assert "avmae" in bias_gelu(z.double(), bias, form).grad_fn.name()


def test_leading_axes() -> None:
    z, bias = torch.randn(2, 3, 8), torch.randn(8)
    assert torch.equal(bias_gelu(z, bias), bias_gelu_reference(z, bias, "tanh"))


def test_autocast() -> None:
    """A product under autocast is bfloat16, and so is its activation; the bias stays float32."""
    x, weight = torch.randn(5, 8), torch.randn(16, 8, requires_grad=True)
    bias = torch.randn(16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = bias_gelu(F.linear(x, weight), bias)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), (weight, bias))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]


def test_keeps_the_product_and_the_bias_for_the_backward_pass() -> None:
    z, bias = torch.randn(8, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        bias_gelu(z, bias)
    assert [t.data_ptr() for t in kept] == [z.data_ptr(), bias.data_ptr()]


@pytest.mark.parametrize("form", FORMS)
def test_operation_contract(form: Approximation) -> None:
    """Schema, fake tensors, autograd and tracing, as torch.compile will rely on them."""
    z, bias = torch.randn(5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(torch.ops.avmae.bias_gelu.default, (z, bias, form))
    arguments = (torch.randn(5, 8), z.detach(), bias.detach(), form)
    torch.library.opcheck(torch.ops.avmae.bias_gelu_backward.default, arguments)


def test_double_backward_refuses() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(bias_gelu(z, torch.zeros(4)).sum(), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="bias_gelu has no second derivative"):
        grad.sum().backward()


GOOD = {"z": torch.zeros(3, 4), "bias": torch.zeros(4), "approximate": "tanh"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(3)}, r"bias of z's last axis; got z float32 \[3, 4\] .*\[3\]"),
        ({"z": torch.zeros(4)}, r"z \[T, M\]"),
        ({"z": torch.zeros(3, 0), "bias": torch.zeros(0)}, r"z \[T, M\]"),
        ({"z": torch.zeros(3, 4, dtype=torch.int32)}, "z of a float dtype"),
        ({"z": torch.zeros(4, 3).t()}, "contiguous"),
        ({"approximate": "relu"}, "approximate 'tanh' or 'erf', got 'relu'"),
    ],
)
def test_rejects_bad_inputs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"bias_gelu wants .*{message}"):
        bias_gelu(**{**GOOD, **change})
