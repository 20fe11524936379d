"""The assembly kernel, interpreted, fp32 and fp16 (the interpreter computes bf16 wrongly)."""

from typing import Any

import numpy as np
import pytest
import torch
from assemble_cases import LEAVES, problem
from budgets import assert_matches_meaning

from avmae_kernels.assemble import assemble_decoder, assemble_decoder_reference
from avmae_kernels.row_sums import sum_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("order", ["grouped", "grid"])
@pytest.mark.parametrize(
    ("B", "V", "M", "D"),
    [(3, 5, 11, 24), (2, 1, 33, 64), (1, 17, 1, 384), (3, 0, 7, 40), (3, 7, 0, 33)],
)
def test_sequences_and_gradients(
    B: int, V: int, M: int, D: int, order: str, dtype: torch.dtype
) -> None:
    inputs = {**problem(B, V, M, D, dtype), "order": order}
    assert_matches_meaning(assemble_decoder, assemble_decoder_reference, inputs, LEAVES)


@pytest.mark.parametrize("order", ["grouped", "grid"])
def test_no_clips(order: Any) -> None:
    inputs = problem(0, 3, 4, 32, torch.float32)
    leaves = [inputs[name] for name in LEAVES]
    out = assemble_decoder(**inputs, order=order)
    assert out.shape == (0, 7, 32)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(grad.numel() == 0 or grad.abs().max() == 0 for grad in grads)


@pytest.mark.parametrize("order", ["grouped", "grid"])
def test_narrow_tokens_in_a_wide_sequence(order: Any) -> None:
    """As under autocast: fp16 tokens and fp32 positions; each sum is rounded once."""
    inputs = problem(2, 5, 9, 48, torch.float32)
    inputs["tokens"] = inputs["tokens"].half().requires_grad_()
    out = assemble_decoder(**inputs, order=order)
    expected = assemble_decoder_reference(**inputs, order=order)
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    grad_out = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, inputs["tokens"], grad_out)
    (expected_grad,) = torch.autograd.grad(expected, inputs["tokens"], grad_out)
    assert torch.equal(grad, expected_grad)


def test_strided_tokens_and_expanded_indices() -> None:
    """Slices of a packed stream, and one index for all clips, as in inpainting."""
    inputs = problem(3, 5, 6, 32, torch.float32)
    memory = torch.full((3, 9, 70), float("nan"))
    memory[:, 2:7, 3:67:2] = inputs["tokens"]
    inputs["tokens"] = memory[:, 2:7, 3:67:2]
    inputs["token_index"] = torch.arange(5).expand(3, -1)
    inputs["mask_index"] = torch.arange(5, 11).flip(0).expand(3, -1)
    for order in ("grouped", "grid"):
        assert_matches_meaning(
            assemble_decoder, assemble_decoder_reference, {**inputs, "order": order}, LEAVES
        )


def test_gradient_of_a_sum() -> None:
    inputs = problem(2, 3, 5, 40, torch.float32)
    leaves = [inputs[name] for name in LEAVES]
    for order in ("grouped", "grid"):
        got = torch.autograd.grad(assemble_decoder(**inputs, order=order).sum(), leaves)
        expected = assemble_decoder_reference(**inputs, order=order).sum()
        torch.testing.assert_close(got, torch.autograd.grad(expected, leaves), rtol=0, atol=0)


def test_rows_out_of_sight_do_not_leak() -> None:
    """NaN in the positions that no clip uses."""
    inputs = problem(2, 3, 4, 32, torch.float32)
    for name in ("token_pos", "mask_pos"):
        table = torch.full((9, 32), float("nan"))
        table[1:8] = inputs[name]
        inputs[name] = table
    inputs["token_index"], inputs["mask_index"] = (
        inputs["token_index"] + 1,
        inputs["mask_index"] + 1,
    )
    assert assemble_decoder(**inputs).isfinite().all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_tokens_past_two_to_the_31(axis: int) -> None:
    """Neighbours along one axis lie 2^30 values apart, in memory that is hardly ever touched."""
    shape, stride = [1, 1, 1], [1, 1, 1]
    shape[axis], stride[axis] = 3, 2**30 + 64
    memory = torch.from_numpy(np.zeros(2 * (2**30 + 64) + 1, np.float16))
    tokens = memory.as_strided(shape, stride)
    tokens.copy_(torch.tensor([1.0, 2.0, 3.0]).view(shape))
    B, V, D = shape
    index, table = torch.arange(V).expand(B, -1), torch.zeros(V, D, dtype=torch.float16)
    out = assemble_decoder(tokens, index, table, table[0], index[:, :0], table)
    assert out.flatten().tolist() == [1.0, 2.0, 3.0]
    # The same memory as gradient rows.
    if axis < 2:
        assert sum_rows(tokens, V).item() == 6.0
