"""The loss on a GPU: bf16, fp16 and fp32 predictions against float64."""

import math
from typing import Any

import pytest
import torch
from loss_cases import (
    VALID,
    assert_extreme_bytes_are_exact,
    assert_loss_matches_meaning,
    problem,
)
from patch_cases import CASES
from torch import Tensor

from avmae_kernels.reconstruction_loss import (
    NORMS,
    TargetNorm,
    reconstruction_loss,
    reconstruction_loss_reference,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def on_gpu(given: dict[str, Any]) -> dict[str, Any]:
    return {n: x.detach().cuda() if isinstance(x, Tensor) else x for n, x in given.items()}


def released(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """AudioSet's video: 1411 of 1568 tokens are scored."""
    source = torch.randint(0, 256, (batch, 16, 224, 224, 3), dtype=torch.uint8, device="cuda")
    index = torch.stack([torch.randperm(1568)[157:].sort()[0] for _ in range(batch)]).cuda()
    pred = torch.randn(batch, 1411, 1536, device="cuda").to(dtype).requires_grad_()
    return {"pred": pred, "source": source, "scored": index, "patch": (2, 16, 16)}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", CASES)
def test_every_source_and_normalisation(name: str, norm: TargetNorm) -> None:
    given = on_gpu(problem(CASES[name](), norm, torch.float32))
    case = CASES[name]().to("cuda")
    given |= {"source": case.source, **case.view}
    for dtype in DTYPES:
        given["pred"] = given["pred"].to(dtype)
        assert_loss_matches_meaning(given)
        assert_loss_matches_meaning({**given, "valid": VALID.cuda(), "mean_over_patch": False})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_released_shape(norm: TargetNorm, dtype: torch.dtype) -> None:
    assert_loss_matches_meaning({**released(2, dtype), "norm": norm})


@pytest.mark.parametrize("norm", NORMS[1:])
def test_flat_patches_have_target_zero(norm: TargetNorm) -> None:
    source = torch.full((2, 2, 16, 16, 3), 77, dtype=torch.uint8, device="cuda")
    index = torch.arange(4, device="cuda").expand(2, -1)
    pred = torch.zeros(2, 4, 384, device="cuda")
    assert reconstruction_loss(pred, source, index, (2, 8, 8), norm).item() == 0.0


@pytest.mark.parametrize("norm", NORMS[1:])
def test_statistics_of_extreme_bytes_are_exact(norm: TargetNorm) -> None:
    assert_extreme_bytes_are_exact(norm, "cuda")


@pytest.mark.parametrize(("batch", "scored"), [(3, 0), (0, 5), (0, 0)])
def test_nothing_scored_is_zero(batch: int, scored: int) -> None:
    source = torch.zeros(batch, 4, 16, 24, 3, dtype=torch.uint8, device="cuda")
    index = torch.zeros(batch, scored, dtype=torch.int64, device="cuda")
    pred = torch.randn(batch, scored, 96, device="cuda").requires_grad_()
    loss = reconstruction_loss(pred, source, index, (2, 4, 4))
    loss.backward()
    assert loss.item() == 0.0 and pred.grad.shape == pred.shape


def test_clips_left_out_may_hold_anything() -> None:
    given = released(3, torch.bfloat16)
    clean = reconstruction_loss(**given, valid=VALID.cuda())
    with torch.no_grad():
        given["pred"][1] = math.nan
    loss = reconstruction_loss(**given, valid=VALID.cuda())
    (grad,) = torch.autograd.grad(loss, given["pred"])
    assert torch.equal(loss, clean) and grad.isfinite().all() and grad[1].abs().max() == 0


def test_equal_inputs_give_equal_bits() -> None:
    given = {**released(8, torch.bfloat16), "norm": "patch"}
    losses, grads = [], []
    for _ in range(20):
        loss = reconstruction_loss(**given)
        losses.append(loss.item())
        grads.append(torch.autograd.grad(loss, given["pred"])[0].float().sum().item())
    assert len(set(losses)) == len(set(grads)) == 1


def test_targets_take_no_memory() -> None:
    """Forward and backward allocate two tensors of the predictions' size and hardly more."""
    given = released(8, torch.bfloat16)
    size = given["pred"].numel() * 2
    reconstruction_loss(**given).backward()
    given["pred"].grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    reconstruction_loss(**given).backward()
    assert torch.cuda.max_memory_allocated() - before <= 2.1 * size


def test_no_synchronisation_and_a_cuda_graph() -> None:
    """Captured once, replayed with other predictions, tokens and weights."""
    given = {**released(2, torch.bfloat16), "valid": torch.ones(2, device="cuda")}

    def run() -> list[Tensor]:
        loss = reconstruction_loss(**given)
        return [loss, *torch.autograd.grad(0.5 * loss, given["pred"])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        given["pred"].normal_()
    given["scored"].copy_(given["scored"].flip(0))
    given["valid"][0] = 0
    graph.replay()
    replayed = [x.clone() for x in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, run(), strict=True))


def test_predictions_past_two_to_the_31() -> None:
    """1000 clips of 1411 predictions are 2.17e9 values; the last clip alone counts."""
    source = torch.zeros(1, 16, 224, 224, 3, dtype=torch.uint8, device="cuda").expand(
        1000, -1, -1, -1, -1
    )
    index = torch.arange(1411, device="cuda").expand(1000, -1)
    pred = torch.zeros(1000, 1411, 1536, dtype=torch.float16, device="cuda").requires_grad_()
    valid = torch.zeros(1000, device="cuda")
    valid[-1] = 1
    with torch.no_grad():
        pred[-1].normal_()
    loss = reconstruction_loss(pred, source, index, (2, 16, 16), valid=valid)
    (grad,) = torch.autograd.grad(1000 * loss, pred)
    last = pred.detach()[-1:].double().requires_grad_()
    exact = reconstruction_loss_reference(
        last, source[-1:], index[-1:], (2, 16, 16), "none", None, True
    )
    (exact_grad,) = torch.autograd.grad(1000 * exact, last)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[-1:].double(), exact_grad, rtol=2e-3, atol=1e-7)
    assert grad[:-1].abs().max() == 0
