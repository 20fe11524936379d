"""The loss on a CPU: targets, weights, gradients, and what happens where nothing is scored."""

import math

import numpy as np
import pytest
import torch
from loss_cases import VALID, assert_extreme_bytes_are_exact, problem
from patch_cases import CASES, PatchCase, dense_patches, token_index
from torch import Tensor

from avmae_kernels.patches import view_clips
from avmae_kernels.reconstruction_loss import (
    NORMS,
    TargetNorm,
    reconstruction_loss,
    reconstruction_loss_reference,
    target_patches,
)


def exact_target(raw: np.ndarray, norm: TargetNorm, is_bytes: bool) -> np.ndarray:
    """One patch vector [P] standardised by the formulas of the papers' codes, in float64.

    norm is `none` for a spectrogram where its codes mean channels.
    """
    x = raw.astype(np.float64)
    if is_bytes:
        x = x / 127.5 - 1
    if norm == "none":
        return x
    if norm in ("patch", "patch_unbiased"):
        ddof = 1 if norm == "patch_unbiased" and x.size > 1 else 0
        return (x - x.mean()) / np.sqrt(x.var(ddof=ddof) + 1e-6)
    out = np.empty_like(x)
    for channel in range(3):
        y = x[channel::3]
        if norm == "patch_channel":
            out[channel::3] = (y - y.mean()) / np.sqrt(y.var() + 1e-6)
        else:
            y = (y + 1) / 2
            out[channel::3] = (y - y.mean()) / (y.std(ddof=1 if y.size > 1 else 0) + 1e-6)
    return out


def exact_targets(case: PatchCase, index: Tensor, norm: TargetNorm) -> Tensor:
    dense = dense_patches(case).numpy()
    used = norm if case.is_video or norm in ("patch", "patch_unbiased") else "none"
    is_bytes = case.source.dtype == torch.uint8
    rows = [
        [exact_target(dense[b, n], used, is_bytes) for n in row]
        for b, row in enumerate(index.tolist())
    ]
    return torch.from_numpy(np.array(rows))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_formula(name: str, norm: TargetNorm) -> None:
    """Against targets that are read a second way and standardised in NumPy."""
    case = CASES[name]().to(torch.float64)
    given = problem(case, norm)
    pred, target = given["pred"], exact_targets(case, given["scored"], norm)
    B, S, P = pred.shape
    for valid in (None, VALID):
        weight = torch.ones(B) if valid is None else valid
        expected = ((pred - target) ** 2 * weight[:, None, None]).sum() / (weight.sum() * S * P)
        for function in (reconstruction_loss, reconstruction_loss_reference):
            got = function(**given, valid=valid, mean_over_patch=True)
            # The authors' 1e-8 in the count is 1e-9 of it, at most.
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=0)
        got = reconstruction_loss(**given, valid=valid)
        (grad,), (exact,) = torch.autograd.grad(got, pred), torch.autograd.grad(expected, pred)
        torch.testing.assert_close(grad, exact, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("norm", NORMS)
def test_targets_by_name(norm: TargetNorm) -> None:
    case = CASES["THWC"]()
    index = token_index(case, 4)
    got = target_patches(case.source, index, case.patch, norm, torch.float64)
    torch.testing.assert_close(got, exact_targets(case, index, norm), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS[1:])
def test_flat_patches_have_target_zero(norm: TargetNorm) -> None:
    """Exactly: sums of bytes are integers, so nothing is left over to be blown up by 1 / 1e-3."""
    source = torch.full((2, 2, 16, 16, 3), 77, dtype=torch.uint8)
    index = torch.arange(4).expand(2, -1)
    for dtype in (torch.float32, torch.float64):
        pred = torch.zeros(2, 4, 384, dtype=dtype)
        assert reconstruction_loss(pred, source, index, (2, 8, 8), norm).item() == 0.0


@pytest.mark.parametrize("norm", NORMS[1:])
def test_statistics_of_extreme_bytes_are_exact(norm: TargetNorm) -> None:
    assert_extreme_bytes_are_exact(norm)


@pytest.mark.parametrize("norm", ["patch_unbiased", "videomae"])
def test_a_single_value_has_no_unbiased_variance(norm: TargetNorm) -> None:
    pred = torch.zeros(1, 1, 3).requires_grad_()
    source = torch.tensor([9, 9, 9], dtype=torch.uint8).view(1, 1, 1, 1, 3)
    loss = reconstruction_loss(pred, source, torch.zeros(1, 1).long(), (1, 1, 1), norm)
    assert loss.item() == 0.0


def test_sum_instead_of_mean_over_the_patch() -> None:
    given = problem(CASES["THWC"]())
    mean = reconstruction_loss(**given)
    total = reconstruction_loss(**given, mean_over_patch=False)
    torch.testing.assert_close(total, mean * given["pred"].shape[2], rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(total, given["pred"])
    (mean_grad,) = torch.autograd.grad(mean, given["pred"])
    torch.testing.assert_close(grad, mean_grad * given["pred"].shape[2], rtol=1e-12, atol=0)


def test_gradcheck() -> None:
    for norm in NORMS:
        given = problem(CASES["crop-flip"](), norm, count=2)
        pred = given.pop("pred")
        assert torch.autograd.gradcheck(
            lambda p, given=given: reconstruction_loss(p, valid=VALID, **given), (pred,)
        )


@pytest.mark.parametrize(("batch", "scored"), [(3, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_scored_is_zero(batch: int, scored: int, weighted: bool) -> None:
    source = torch.zeros(batch, 4, 16, 24, 3, dtype=torch.uint8)
    index = torch.zeros(batch, scored, dtype=torch.int64)
    pred = torch.randn(batch, scored, 96).requires_grad_()
    valid = torch.ones(batch) if weighted else None
    loss = reconstruction_loss(pred, source, index, (2, 4, 4), "patch", valid)
    loss.backward()
    assert loss.item() == 0.0 and pred.grad.shape == pred.shape


def test_clips_left_out_may_hold_anything() -> None:
    case = CASES["floating-video"]()
    given = problem(case, "patch", torch.float32)
    clean = reconstruction_loss(**given, valid=VALID)
    pred, source = given["pred"].detach().clone(), case.source.clone()
    pred[1], source[1] = math.nan, math.nan
    spoilt = {**given, "pred": pred.requires_grad_(), "source": source}
    loss = reconstruction_loss(**spoilt, valid=VALID)
    torch.testing.assert_close(loss, clean, rtol=0, atol=0)
    torch.testing.assert_close(
        reconstruction_loss_reference(**spoilt, valid=VALID, mean_over_patch=True), clean
    )
    loss.backward()
    assert pred.grad[1].abs().max() == 0 and pred.grad.isfinite().all()
    nothing = reconstruction_loss(**spoilt, valid=torch.zeros(3))
    assert nothing.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16], ids=str)
def test_weights_of_any_dtype(dtype: torch.dtype) -> None:
    given = problem(CASES["THWC"]())
    mask = torch.tensor([1, 0, 1])
    got = reconstruction_loss(**given, valid=mask.to(dtype))
    torch.testing.assert_close(got, reconstruction_loss(**given, valid=mask.double()))


def test_scaled_gradient_and_second_pass() -> None:
    """The gradient that arrives scales ours, and what is kept survives the first pass."""
    given = problem(CASES["THWC"](), "patch")
    loss = reconstruction_loss(**given)
    (once,) = torch.autograd.grad(loss, given["pred"], retain_graph=True)
    (scaled,) = torch.autograd.grad(0.5 * loss, given["pred"], retain_graph=True)
    (again,) = torch.autograd.grad(loss, given["pred"])
    assert torch.equal(once, again)
    torch.testing.assert_close(scaled, 0.5 * once, rtol=1e-15, atol=0)


def test_fp16_gradients_do_not_underflow() -> None:
    """A mean over 3 * 1411 * 1536 values at loss scale 2^16: the factor alone is below fp16."""
    source = torch.zeros(3, 16, 224, 224, 3, dtype=torch.uint8)
    index = torch.arange(1411).expand(3, -1)
    pred = torch.zeros(3, 1411, 1536, dtype=torch.float16).requires_grad_()
    loss = reconstruction_loss(pred, source, index, (2, 16, 16))
    (65536 * loss).backward()
    exact = 65536 * 2 / pred.numel()
    assert exact / 65536 < torch.finfo(torch.float16).smallest_normal
    assert (pred.grad.double() - exact).abs().max() <= exact * 2**-11


def test_half_precision_predictions_lose_nothing_but_their_own_rounding() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        given = problem(CASES["THWC"](), "patch", dtype)
        loss = reconstruction_loss(**given)
        (grad,) = torch.autograd.grad(loss, given["pred"])
        given["pred"] = given["pred"].detach().double().requires_grad_()
        exact = reconstruction_loss(**given)
        (exact_grad,) = torch.autograd.grad(exact, given["pred"])
        assert loss.dtype == torch.float32 and grad.dtype == dtype
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
        # The difference is rounded once when it is kept and once when it is scaled.
        rtol = 2 * torch.finfo(dtype).eps
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        torch.testing.assert_close(grad.double(), exact_grad, rtol=rtol, atol=smallest)


def test_predictions_of_any_strides() -> None:
    given = problem(CASES["THWC"]())
    expected = reconstruction_loss(**given)
    given["pred"] = given["pred"].detach().mT.contiguous().mT.requires_grad_()
    loss = reconstruction_loss(**given)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    loss.backward()


def test_one_tensor_is_kept_for_the_backward_pass() -> None:
    """The differences, of the size of the predictions; without autograd not even those."""
    given = problem(CASES["THWC"](), "patch", torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        reconstruction_loss(**given)
    assert sorted(tensor.numel() for tensor in kept) == [3, given["pred"].numel()]
    view = view_clips("test", given["source"], (2, 4, 4))
    with torch.no_grad():
        _, difference, _ = torch.ops.avmae.reconstruction_loss(
            given["pred"], *view, given["scored"], "patch", None, True, False
        )
    assert difference.numel() == 0


def test_compiled_whole() -> None:
    given = problem(CASES["crop-flip"](), "videomae", torch.float32)
    pred = given.pop("pred")

    def step(pred: Tensor) -> Tensor:
        return 0.5 * reconstruction_loss(pred, valid=VALID, **given)

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = run(pred)
        results.append([loss, *torch.autograd.grad(loss, pred)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("valid", [None, VALID], ids=["all", "valid"])
def test_operator_contract(valid: Tensor | None) -> None:
    given = problem(CASES["THWC"](), dtype=torch.float32)
    ops = torch.ops.avmae
    view = view_clips("test", given["source"], (2, 4, 4))
    for with_gradient in (True, False):
        pred = given["pred"] if with_gradient else given["pred"].detach()
        arguments = (pred, *view, given["scored"], "patch_channel", valid, True, with_gradient)
        torch.library.opcheck(ops.reconstruction_loss.default, arguments)
    arguments = (given["pred"].detach(), torch.rand(3), torch.tensor(0.5))
    torch.library.opcheck(ops.reconstruction_loss_backward.default, arguments)


def test_double_backward_is_refused() -> None:
    given = problem(CASES["THWC"]())
    loss = reconstruction_loss(**given)
    (grad,) = torch.autograd.grad(loss.square(), given["pred"], create_graph=True)
    with pytest.raises(NotImplementedError, match="reconstruction_loss has no second derivative"):
        grad.sum().backward()


VIDEO = torch.zeros(3, 4, 16, 24, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": torch.zeros(3, 4, 96)}, r"pred \[B, S, P\], scored \[B, S\]"),
        ({"pred": torch.zeros(15, 96)}, r"pred \[B, S, P\], scored \[B, S\]"),
        ({"pred": torch.zeros(3, 5, 95)}, r"P = 96 for patch \(2, 4, 4\)"),
        ({"norm": "batch"}, "norm in 'none', 'patch', 'patch_channel', .* got 'batch'"),
        ({"valid": torch.ones(2)}, r"valid \[B\].*valid float32 \[2\]"),
        ({"scored": torch.zeros(3, 5)}, r"scored int64 \[B, count\].*scored float32"),
        ({"source": VIDEO.int()}, "uint8 or floating video or a floating spectrogram"),
        ({"source": VIDEO.float().requires_grad_()}, "a source without requires_grad"),
        ({"layout": "CTHW"}, "3 colour channels in layout CTHW"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    given = problem(PatchCase(VIDEO, (2, 4, 4)))
    with pytest.raises(ValueError, match=f"reconstruction_loss wants.*{message}"):
        reconstruction_loss(**{**given, **change})
