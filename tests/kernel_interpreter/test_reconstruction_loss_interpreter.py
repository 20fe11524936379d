"""The kernels of the loss, interpreted, fp32 and fp16 (the interpreter computes bf16 wrongly)."""

import math

import numpy as np
import pytest
import torch
from loss_cases import (
    VALID,
    assert_extreme_bytes_are_exact,
    assert_loss_matches_meaning,
    problem,
)
from patch_cases import CASES, PatchCase

from avmae_kernels.reconstruction_loss import (
    NORMS,
    TargetNorm,
    reconstruction_loss,
)


@pytest.mark.parametrize("norm", ["none", "videomae"])
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_source(name: str, norm: TargetNorm) -> None:
    given = problem(CASES[name](), norm, torch.float32)
    assert_loss_matches_meaning(given)
    assert_loss_matches_meaning({**given, "valid": VALID, "mean_over_patch": False})


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["THWC", "remainders-crop-flip", "I420", "spectrogram"])
def test_every_normalisation(name: str, norm: TargetNorm) -> None:
    for dtype in (torch.float32, torch.float16):
        assert_loss_matches_meaning(problem(CASES[name](), norm, dtype))


@pytest.mark.parametrize("norm", NORMS)
def test_released_patch(norm: TargetNorm) -> None:
    """2 x 16 x 16 x 3: three blocks a patch, and more rows than one program takes."""
    source = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    assert_loss_matches_meaning(
        problem(PatchCase(source, (2, 16, 16)), norm, torch.float32, count=7)
    )
    planes = torch.randint(0, 256, (2, 4, 48, 32), dtype=torch.uint8)
    case = PatchCase(planes, (2, 16, 16), {"layout": "I420"})
    assert_loss_matches_meaning(problem(case, norm, torch.float32, count=7))


@pytest.mark.parametrize("norm", NORMS[1:])
@pytest.mark.parametrize("value", [0, 77, 255])
def test_flat_patches_have_target_zero(value: int, norm: TargetNorm) -> None:
    source = torch.full((2, 2, 16, 16, 3), value, dtype=torch.uint8)
    index = torch.arange(4).expand(2, -1)
    assert reconstruction_loss(torch.zeros(2, 4, 384), source, index, (2, 8, 8), norm) == 0


@pytest.mark.parametrize("norm", NORMS[1:])
def test_statistics_of_extreme_bytes_are_exact(norm: TargetNorm) -> None:
    assert_extreme_bytes_are_exact(norm)


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


@pytest.mark.parametrize("norm", NORMS)
def test_clips_left_out_may_hold_anything(norm: TargetNorm) -> None:
    case = CASES["floating-video"]()
    inputs = problem(case, norm, torch.float32)
    clean = reconstruction_loss(**{**inputs, "valid": VALID})
    pred, source = inputs["pred"].detach().clone(), case.source.clone()
    pred[1], source[1] = math.nan, math.inf
    spoilt = {**inputs, "pred": pred.requires_grad_(), "source": source}
    loss = reconstruction_loss(**{**spoilt, "valid": VALID})
    assert torch.equal(loss, clean)
    loss.backward()
    assert pred.grad[1].abs().max() == 0 and pred.grad.isfinite().all()
    assert reconstruction_loss(**{**spoilt, "valid": torch.zeros(3)}) == 0


def test_unscored_patches_do_not_leak() -> None:
    """NaN around the clips and in the memory between the rows of the predictions."""
    memory = torch.full((5, 4, 22, 38, 3), math.nan)
    source = memory[1:4, 1:3, 3:19, 1:33]
    source[:] = torch.randn(3, 2, 16, 32, 3)
    inputs = problem(PatchCase(source, (1, 8, 16)), "patch", torch.float32)
    holed = torch.full((3, 9, 2 * 384), math.nan)[:, 2:7, ::2]
    inputs["pred"] = holed.copy_(inputs["pred"].detach())
    assert_loss_matches_meaning(inputs)


def test_equal_inputs_give_equal_bits() -> None:
    inputs = problem(CASES["THWC"](), "patch", torch.float32)
    assert len({reconstruction_loss(**inputs).item() for _ in range(3)}) == 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_predictions_past_two_to_the_31(axis: int) -> None:
    """Neighbours along one axis lie 2^30 values apart, in memory that is hardly ever touched."""
    shape, stride = [1, 1, 3], [3, 3, 1]
    shape[axis], stride[axis] = 3, 2**30 + 64
    memory = torch.from_numpy(np.zeros(2 * (2**30 + 64) + 3, np.float16))
    pred = memory.as_strided(shape, stride)
    pred.copy_(torch.randn(shape))
    source = torch.randint(0, 256, (shape[0], 1, 1, 3, 3), dtype=torch.uint8)
    index = torch.arange(shape[1]).expand(shape[0], -1)
    given = {"source": source, "scored": index, "patch": (1, 1, 1), "norm": "none"}
    loss = reconstruction_loss(pred, **given)
    assert torch.equal(loss, reconstruction_loss(pred.clone(), **given))


def test_patches_too_large_for_integer_sums_are_refused() -> None:
    source = torch.zeros(1, 1, 105, 105, 3, dtype=torch.uint8)
    arguments = (torch.zeros(1, 1, 33075), source, torch.zeros(1, 1).long(), (1, 105, 105))
    assert reconstruction_loss(*arguments).item() == 1.0
    with pytest.raises(ValueError, match="at most 33025 values in a patch for norm 'patch'"):
        reconstruction_loss(*arguments, "patch")
