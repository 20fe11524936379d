"""`add_layer_norm` on a CPU: its meaning, its gradients, autocast, what it keeps and refuses."""

from typing import Any

import pytest
import torch
from budgets import assert_matches_meaning
from norm_cases import SMALL_SHAPES, VARIANTS, norm_inputs, plain_add_layer_norm
from torch import Tensor

from avmae_kernels.norm import add_layer_norm, add_layer_norm_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def through_the_operation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 too, which goes past it on a CPU."""
    if "straight" not in request.node.name:
        monkeypatch.setattr("avmae_kernels.norm.eager_float32_on_cpu", lambda *tensors: False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [*SMALL_SHAPES[::2], (33, 768)], ids=str)
def test_matches_meaning(shape: tuple[int, int], variant: str, dtype: torch.dtype) -> None:
    inputs, differentiable = norm_inputs(*shape, variant, dtype)
    assert_matches_meaning(
        add_layer_norm,
        add_layer_norm_reference,
        inputs,
        differentiable,
        plain=plain_add_layer_norm,
    )


@pytest.mark.parametrize("variant", ["update", "no update", "bias and scale"])
def test_gradcheck(variant: str) -> None:
    inputs, names = norm_inputs(3, 5, variant, torch.float64)
    fixed = {name: value for name, value in inputs.items() if name not in names}

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        return add_layer_norm(**fixed, **dict(zip(names, leaves, strict=True)))

    assert torch.autograd.gradcheck(run, [inputs[n].double().requires_grad_() for n in names])


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output(used: int) -> None:
    """Only the sum is used, or only its LayerNorm, as after a last block."""
    inputs, names = norm_inputs(4, 6, "update", torch.float64)
    leaves = [inputs[name].double().requires_grad_() for name in names]
    grads = []
    for function in (add_layer_norm, add_layer_norm_reference):
        out = function(*leaves, inputs["eps"])[used]
        grads.append(
            torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(1), allow_unused=True)
        )
    for got, expected in zip(*grads, strict=True):
        expected = torch.zeros_like(got) if expected is None else expected
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_expanded_gradient() -> None:
    """The gradient of a sum is one number in every place, with strides of zero."""
    inputs, names = norm_inputs(4, 6, "update", torch.float32)
    leaves = [inputs[name].requires_grad_() for name in names]
    by_sum = torch.autograd.grad(sum(t.sum() for t in add_layer_norm(*leaves, 1e-6)), leaves)
    outs = add_layer_norm(*leaves, 1e-6)
    by_ones = torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])
    torch.testing.assert_close(by_sum, by_ones, rtol=0, atol=0)


def test_float32_goes_straight_to_the_meaning() -> None:
    """The dispatch of an operation would take as long as a small LayerNorm."""
    inputs, names = norm_inputs(5, 8, "bias and scale", torch.float32)
    x = inputs["x"].requires_grad_()
    total, y = add_layer_norm(**inputs)
    assert "LayerNorm" in y.grad_fn.name()
    expected = add_layer_norm_reference(**inputs)
    torch.testing.assert_close((total, y), expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert [out.dtype for out in add_layer_norm(**inputs)] == [torch.float32, torch.bfloat16]
    inputs["x"] = x.detach().double().requires_grad_()
    assert "avmae" in add_layer_norm(**inputs)[1].grad_fn.name()


def test_without_update_the_stream_is_handed_on() -> None:
    x, weight, bias = torch.randn(3, 4), torch.ones(4), torch.zeros(4)
    assert add_layer_norm(x, None, weight, bias, 1e-6)[0] is x


def test_leading_axes() -> None:
    x, update, weight, bias = torch.randn(2, 3, 8), torch.randn(2, 3, 8), *torch.randn(2, 8)
    got = add_layer_norm(x, update, weight, bias, 1e-6, row_scale=torch.rand(2, 3))
    assert [out.shape for out in got] == [x.shape, x.shape]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(x_dtype: torch.dtype) -> None:
    """The sum keeps the stream's dtype; the LayerNorm comes out ready for the next product."""
    inputs, names = norm_inputs(6, 16, "update", torch.bfloat16)
    inputs["x"] = inputs["x"].to(x_dtype)
    leaves = {name: inputs[name].requires_grad_() for name in names}
    plain_total, plain_y = add_layer_norm(**inputs, **{})
    with torch.autocast("cpu", torch.bfloat16):
        total, y = add_layer_norm(**{**inputs, **leaves})
        assert total.dtype == x_dtype and y.dtype == torch.bfloat16
        loss = (total.float().square().sum() + y.float().square().sum()) / 2
    torch.testing.assert_close(total, plain_total, rtol=0, atol=0)
    torch.testing.assert_close(y, plain_y.bfloat16(), rtol=0, atol=0)
    for leaf, grad in zip(
        leaves.values(), torch.autograd.grad(loss, list(leaves.values())), strict=True
    ):
        assert grad.dtype == leaf.dtype and grad.isfinite().all()


def test_autocast_leaves_float64_alone() -> None:
    x, weight, bias = torch.randn(3, 4, dtype=torch.float64), torch.ones(4), torch.zeros(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert add_layer_norm(x, x, weight, bias, 1e-6)[1].dtype == torch.float64


def test_keeps_one_matrix_for_the_backward_pass() -> None:
    """The sum; neither of its terms, and not the result."""
    inputs, names = norm_inputs(8, 32, "bias and scale", torch.float32)
    for name in names:
        inputs[name].requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        total, _ = add_layer_norm(**inputs)
    matrices = [t for t in kept if t.ndim == 2]
    assert len(matrices) == 1 and matrices[0].data_ptr() == total.data_ptr()


@pytest.mark.parametrize("variant", VARIANTS)
def test_operation_contract(variant: str) -> None:
    """Schema, fake tensors, autograd and tracing, as torch.compile will rely on them."""
    inputs, names = norm_inputs(5, 8, variant, torch.float32)
    for name in names:
        inputs[name].requires_grad_()
    order = ("x", "update", "update_bias", "row_scale", "weight", "bias", "eps")
    op = torch.ops.avmae.add_layer_norm.default
    arguments = [inputs.get(name) for name in order]
    torch.library.opcheck(op, (*arguments, torch.bfloat16))
    with torch.no_grad():
        total, y, mean, rstd = op(*arguments, torch.float32)
    total = inputs["x"] if inputs["update"] is None else total
    backward = torch.ops.avmae.add_layer_norm_backward.default
    scale = inputs.get("row_scale")
    saved = (total.detach(), mean, rstd, inputs["weight"].detach(), scale)
    for update_dtype in (None, torch.float16):
        # A tensor of the stream's dtype as well as none for the gradient of the sum.
        for grad_total in (None, torch.randn_like(total)):
            tail = (torch.float32, update_dtype, "update_bias" in inputs)
            torch.library.opcheck(backward, (grad_total, torch.randn_like(y), *saved, *tail))


def test_double_backward_refuses() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = add_layer_norm(x, x.detach(), torch.ones(4), torch.zeros(4), 1e-6)[1]
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="add_layer_norm has no second derivative"):
        grad.sum().backward()


GOOD = {
    "x": torch.zeros(3, 4),
    "update": torch.zeros(3, 4),
    "weight": torch.ones(4),
    "bias": torch.zeros(4),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5)}, r"weight and bias of x's last axis; got .*\[5\]"),
        ({"bias": torch.ones(5)}, "weight and bias of x's last axis"),
        ({"x": torch.zeros(4)}, r"x \[T, D\]"),
        ({"weight": torch.ones(0), "bias": torch.ones(0)}, "D from 1 to 2048"),
        ({"weight": torch.ones(2049)}, "D from 1 to 2048"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, "x of a float dtype"),
        ({"x": torch.zeros(4, 3).t()}, "contiguous"),
        ({"update": torch.zeros(4, 3).t()}, "x and update of one shape, contiguous"),
        ({"update": torch.zeros(2, 4)}, "x and update of one shape"),
        ({"update_bias": torch.zeros(3)}, "update_bias of x's last axis"),
        ({"update": None, "update_bias": torch.zeros(4)}, "an update where there is a update_bias"),
        ({"row_scale": torch.zeros(4)}, "row_scale a float32 constant for each row"),
        ({"row_scale": torch.zeros(3, dtype=torch.bfloat16)}, "row_scale a float32 constant"),
        ({"row_scale": torch.zeros(3, requires_grad=True)}, "row_scale a float32 constant"),
    ],
)
def test_rejects_bad_inputs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"add_layer_norm wants .*{message}"):
        add_layer_norm(**{**GOOD, "eps": 1e-6, **change})
