"""The kernels of `add_layer_norm` against its meaning in float64."""

import pytest
import torch
from budgets import assert_matches_meaning
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from norm_cases import SMALL_SHAPES, VARIANTS, WIDE_SHAPES, norm_inputs, plain_add_layer_norm

from avmae_kernels.norm import add_layer_norm, add_layer_norm_reference


def _check(T: int, D: int, variant: str, dtype: torch.dtype) -> None:
    inputs, differentiable = norm_inputs(T, D, variant, dtype)
    assert_matches_meaning(
        add_layer_norm,
        add_layer_norm_reference,
        inputs,
        differentiable,
        plain=plain_add_layer_norm,
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_matches_meaning(shape: tuple[int, int], variant: str) -> None:
    _check(*shape, variant, torch.float32)


@pytest.mark.parametrize("shape", WIDE_SHAPES, ids=str)
def test_matches_meaning_at_every_block_size(shape: tuple[int, int]) -> None:
    _check(*shape, "bias and scale", torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_meaning_in_float16(variant: str) -> None:
    _check(7, 384, variant, torch.float16)


@settings(max_examples=15, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(st.integers(0, 40), st.integers(2, 300), st.sampled_from(list(VARIANTS)))
def test_any_shape(T: int, D: int, variant: str) -> None:
    _check(T, D, variant, torch.float32)


@pytest.mark.parametrize("rows", [3, 1000])
def test_every_partial_sum_is_written_and_added(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks of rows than programs, and fewer: each row counts once."""
    monkeypatch.setattr("avmae_kernels._column_sums.PROGRAMS", {80: 7, 90: 7})
    inputs, _ = norm_inputs(rows, 64, "bias", torch.float32)
    leaves = {name: inputs[name].requires_grad_() for name in ("weight", "bias", "update_bias")}
    _, y = add_layer_norm(**{**inputs, **leaves})
    grads = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    torch.testing.assert_close(grads[1], torch.full((64,), float(rows)), rtol=0, atol=0)
    assert all(grad.isfinite().all() for grad in grads)


def test_normalises_the_rounded_sum() -> None:
    """The backward pass has only the rounded sum to go by, so the forward pass uses it too."""
    inputs, _ = norm_inputs(7, 384, "update", torch.float16)
    total, y = add_layer_norm(**inputs)
    again = add_layer_norm(total, None, inputs["weight"], inputs["bias"], inputs["eps"])[1]
    assert torch.equal(y, again)


def test_expanded_gradient() -> None:
    """The gradient of a sum is one number in every place, with strides of zero."""
    inputs, names = norm_inputs(5, 48, "update", torch.float32)
    leaves = [inputs[name].requires_grad_() for name in names]
    by_sum = torch.autograd.grad(sum(t.sum() for t in add_layer_norm(*leaves, 1e-6)), leaves)
    outs = add_layer_norm(*leaves, 1e-6)
    by_ones = torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])
    torch.testing.assert_close(by_sum, by_ones, rtol=0, atol=0)


def test_rows_do_not_see_each_other() -> None:
    """A row of NaN stays alone, in the tile it shares with others and in the gradients of x."""
    inputs, _ = norm_inputs(9, 48, "update", torch.float32)
    inputs["x"][4] = float("nan")
    x, update = inputs["x"].requires_grad_(), inputs["update"].requires_grad_()
    outs = add_layer_norm(**{**inputs, "x": x, "update": update})
    grads = torch.autograd.grad(outs, (x, update), [torch.ones_like(out) for out in outs])
    healthy = torch.arange(9) != 4
    for tensor in (*outs, *grads):
        assert tensor[healthy].isfinite().all()
        assert tensor[4].isnan().all()


def test_large_mean() -> None:
    """Mean 1000 times the deviation: one pass over x and x^2 in fp32 would lose half the digits."""
    x = torch.randn(4, 384) + 1000
    weight, bias = torch.ones(384), torch.zeros(384)
    y = add_layer_norm(x, None, weight, bias, 1e-6)[1]
    exact = add_layer_norm_reference(x.double(), None, weight.double(), bias.double(), 1e-6)[1]
    # x itself is exact to half a unit of 2**-14 here, the mean to a few such units.
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=4 * 2.0**-14)


def test_bfloat16_is_refused() -> None:
    x = torch.zeros(2, 4, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="interpreter computes bfloat16 wrongly"):
        add_layer_norm(x, None, torch.ones(4), torch.zeros(4), 1e-6)


def test_float64_runs_the_meaning() -> None:
    """Exactly: the kernels would round to fp32."""
    x, weight, bias = torch.randn(3, 8, dtype=torch.float64), torch.ones(8), torch.zeros(8)
    got = add_layer_norm(x, x, weight, bias, 1e-6)
    expected = add_layer_norm_reference(x, x, weight.double(), bias.double(), 1e-6)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
