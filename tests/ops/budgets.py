"""How far a result may be from the exact one: the one place where tolerances come from.

The exact result is the operation's meaning in float64, on the same inputs. The same meaning in the
inputs' own dtype, in plain PyTorch, has an error against it; ours may have about twice that, and
one rounding of the result. Nothing here is tuned to what a kernel happens to reach.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Twice the largest error of plain PyTorch, since both are single draws of a rounding error; less
# on the root mean square, which hardly varies from draw to draw where many errors enter it.
MAX_RATIO = 2.0
RMS_RATIO = 1.5
MANY = 256


def assert_within_budget(ours: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """Compare `ours` with `exact` (float64) by the error that `plain`, in our dtype, makes.

    Shape and dtype of `ours` and `plain` must agree, and `ours` be finite where `exact` is.
    """
    assert ours.shape == exact.shape, f"{what}: shape {ours.shape}, not {exact.shape}"
    assert ours.dtype == plain.dtype, f"{what}: {ours.dtype}, not {plain.dtype}"
    finite = exact.isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{what}: not finite where it should be"
    if not finite.any():
        return
    rounding = torch.finfo(ours.dtype).eps
    ours, plain, exact = (tensor.double()[finite] for tensor in (ours, plain, exact))
    error, plain_error = ours - exact, plain - exact
    budget = MAX_RATIO * plain_error.abs().max() + rounding * exact.abs().max()
    assert error.abs().max() <= budget, f"{what}: error {error.abs().max():.3g} > {budget:.3g}"
    if error.numel() < MANY:
        return
    budget = RMS_RATIO * _rms(plain_error) + rounding * _rms(exact)
    assert _rms(error) <= budget, f"{what}: rms error {_rms(error):.3g} > {budget:.3g}"


def assert_matches_meaning(
    op: Callable[..., Any],
    meaning: Callable[..., Any],
    inputs: Mapping[str, Any],
    differentiable: Sequence[str],
    *,
    plain: Callable[..., Any] | None = None,
) -> None:
    """Run `op` and its meaning forward and backward and hold every result against its budget.

    Args:
        op: the public function under test.
        meaning: what defines it; run on the inputs in float64 for the exact results.
        inputs: arguments of both by name; tensors of floating dtype are made float64 for the
            exact run, everything else is passed as it is.
        differentiable: names of the inputs whose gradients are compared.
        plain: what to run in low precision, where not the meaning.
    """
    ours = _run(op, inputs, differentiable)
    low = _run(plain or meaning, inputs, differentiable)
    exact = _run(
        meaning, {name: _to_float64(value) for name, value in inputs.items()}, differentiable
    )
    for what in exact:
        assert_within_budget(ours[what], low[what], exact[what], what)


def _run(
    function: Callable[..., Any], inputs: Mapping[str, Any], differentiable: Sequence[str]
) -> dict[str, Tensor]:
    """Outputs and gradients by name; the outputs' gradients are the same values in every run."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in differentiable}
    result = function(**{**inputs, **leaves})
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    generator = torch.Generator().manual_seed(0)
    grads = [
        # Rounded to the coarsest dtype, so that every run is given the same numbers.
        torch.randn(out.shape, generator=generator).bfloat16().to(out)
        for out in outputs
    ]
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    for (name, leaf), grad in zip(leaves.items(), found, strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape, f"gradient of {name}"
        named[f"gradient of {name}"] = grad
    return named


def _to_float64(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
