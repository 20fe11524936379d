"""Problems for the reconstruction loss, and what counts as solving them."""

from typing import Any

import torch
from budgets import assert_within_budget
from patch_cases import PatchCase, dense_patches, token_index
from torch import Tensor

from avmae_kernels.reconstruction_loss import (
    TargetNorm,
    reconstruction_loss,
    reconstruction_loss_reference,
)

# A weight for each of three clips: one counts, one is left out, one counts half.
VALID = torch.tensor([1.0, 0.0, 0.5])
# The loss is a sum of positive terms, so it is as exact as they are: some four roundings in a
# squared difference, and about as many in a sum as its tree is deep, which is less than 12.
LOSS_RTOL = 16 * 2.0**-24


def problem(
    case: PatchCase, norm: TargetNorm = "none", dtype: torch.dtype = torch.float64, count: int = 5
) -> dict[str, Any]:
    """Arguments of the loss for random predictions of `count` tokens."""
    index = token_index(case, min(count, dense_patches(case).shape[1]))
    generator = torch.Generator().manual_seed(3)
    pred = torch.randn(*index.shape, dense_patches(case).shape[2], generator=generator)
    return {
        "pred": pred.to(index.device, dtype).requires_grad_(),
        "source": case.source,
        "scored": index,
        "patch": case.patch,
        "norm": norm,
        **case.view,
    }


def assert_loss_matches_meaning(given: dict[str, Any]) -> None:
    """Loss and gradient against the meaning in float64."""
    given = {"valid": None, "mean_over_patch": True, **given}
    exact_given = {name: _to_float64(value) for name, value in given.items()}
    loss, grad = _run(reconstruction_loss, given)
    _, plain_grad = _run(reconstruction_loss_reference, given)
    exact, exact_grad = _run(reconstruction_loss_reference, exact_given)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), exact, rtol=LOSS_RTOL, atol=0)
    assert_within_budget(grad, plain_grad, exact_grad, "gradient")


def assert_extreme_bytes_are_exact(norm: TargetNorm, device: str = "cpu") -> None:
    """fp32 results for one 254 among 255s, the least variance, and halves of 0 and 255, the most.

    n sum(x^2) - sum(x)^2 of the first is 1535 out of 1.5e11: in fp32 nothing of it would be left.
    """
    source = torch.full((2, 2, 16, 16, 3), 255, dtype=torch.uint8, device=device)
    source[0, 0, 0, 0, 0] = 254
    source[1, :, :8] = 0
    index = torch.zeros(2, 1, dtype=torch.int64, device=device)
    pred = torch.zeros(2, 1, 1536, device=device)
    for valid in torch.eye(2, device=device):
        arguments = {"source": source, "scored": index, "patch": (2, 16, 16), "norm": norm}
        arguments |= {"valid": valid, "mean_over_patch": True}
        loss, grad = _run(reconstruction_loss, {"pred": pred, **arguments})
        exact, exact_grad = _run(
            reconstruction_loss_reference, {"pred": pred.double(), **arguments}
        )
        torch.testing.assert_close(loss.double(), exact, rtol=LOSS_RTOL, atol=0)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=LOSS_RTOL, atol=1e-12)


def _run(function: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    pred = given["pred"].detach().requires_grad_()
    loss = function(**{**given, "pred": pred})
    # As a loss weight does, and not a power of two.
    (grad,) = torch.autograd.grad(0.7 * loss, pred)
    return loss.detach(), grad


def _to_float64(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double() if is_float else value
