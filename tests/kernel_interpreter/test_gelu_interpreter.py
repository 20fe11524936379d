"""The kernels of `bias_gelu` against its meaning in float64."""

import pytest
import torch
from budgets import assert_matches_meaning
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avmae_kernels.gelu import Approximation, bias_gelu, bias_gelu_reference

# (T, M): no token, one value, no power of two, odd tails of tiles, several tiles in each direction.
SHAPES = [(0, 32), (1, 1), (2, 3), (5, 64), (4, 100), (33, 768), (70, 257), (3, 5120)]
FORMS: list[Approximation] = ["tanh", "erf"]


def _check(T: int, M: int, form: Approximation, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(T * M + 1)
    z = 4 * torch.randn(T, M, generator=generator)
    bias = torch.randn(M, generator=generator)
    inputs = {"z": z.to(dtype), "bias": bias, "approximate": form}
    assert_matches_meaning(bias_gelu, bias_gelu_reference, inputs, ["z", "bias"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_meaning(shape: tuple[int, int], form: Approximation, dtype: torch.dtype) -> None:
    _check(*shape, form, dtype)


@settings(max_examples=20, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(st.integers(0, 80), st.integers(1, 300), st.sampled_from(FORMS))
def test_any_shape(T: int, M: int, form: Approximation) -> None:
    _check(T, M, form, torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_far_from_zero(form: Approximation) -> None:
    """The identity on one side, nothing on the other, slopes one and zero, no NaN between."""
    z = torch.tensor([[-6e4, -1e3, -50.0, 0.0, 50.0, 1e3, 6e4]], requires_grad=True)
    y = bias_gelu(z, torch.zeros(7), form)
    (grad,) = torch.autograd.grad(y.sum(), z)
    torch.testing.assert_close(y, z.detach().clamp(min=0), rtol=0, atol=1e-30)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]]))


def test_every_partial_sum_is_written_and_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks of rows than programs, and fewer: each row counts once."""
    monkeypatch.setattr("avmae_kernels._column_sums.PROGRAMS", {80: 3, 90: 3})
    bias = torch.full((64,), 100.0, requires_grad=True)
    for rows in (1, 33, 200):
        # Far above zero the slope is one.
        (grad,) = torch.autograd.grad(bias_gelu(torch.zeros(rows, 64), bias).sum(), bias)
        assert torch.equal(grad, torch.full((64,), float(rows)))


def test_rows_do_not_see_each_other() -> None:
    z = torch.randn(70, 40)
    z[4] = float("nan")
    z.requires_grad_()
    y = bias_gelu(z, torch.zeros(40))
    (grad,) = torch.autograd.grad(y.sum(), z)
    healthy = torch.arange(70) != 4
    for tensor in (y, grad):
        assert tensor[healthy].isfinite().all() and tensor[4].isnan().all()
