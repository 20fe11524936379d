"""The assembly of decoder sequences on a GPU: bf16, fp16 and fp32 against float64."""

from typing import Any

import pytest
import torch
from assemble_cases import LEAVES, problem
from budgets import assert_matches_meaning
from torch import Tensor

from avmae_kernels.assemble import assemble_decoder, assemble_decoder_reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("order", ["grouped", "grid"])
@pytest.mark.parametrize(
    ("B", "V", "M", "D"),
    [(3, 5, 11, 24), (1, 17, 1, 384), (3, 0, 7, 40), (3, 7, 0, 33), (8, 157, 1411, 512)],
)
def test_sequences_and_gradients(
    B: int, V: int, M: int, D: int, order: str, dtype: torch.dtype
) -> None:
    inputs = {**problem(B, V, M, D, dtype, "cuda"), "order": order}
    assert_matches_meaning(assemble_decoder, assemble_decoder_reference, inputs, LEAVES)


def _run(inputs: dict[str, Tensor], order: Any) -> list[Tensor]:
    out = assemble_decoder(**inputs, order=order)
    # As from a slice of a joint sequence: rows of a larger matrix.
    grad = torch.ones(out.shape[0], out.shape[1] + 9, out.shape[2], device=out.device)[:, 9:]
    return [out, *torch.autograd.grad(out, [inputs[n] for n in LEAVES], grad.to(out.dtype))]


@pytest.mark.parametrize("order", ["grouped", "grid"])
def test_narrow_tokens_in_a_wide_sequence(order: Any) -> None:
    """As under autocast: bf16 tokens and fp32 positions, each sum rounded once."""
    inputs = problem(4, 149, 347, 384, torch.float32, "cuda")
    inputs["tokens"] = inputs["tokens"].detach().bfloat16().requires_grad_()
    out = assemble_decoder(**inputs, order=order)
    expected = assemble_decoder_reference(**inputs, order=order)
    assert out.dtype == torch.float32 and torch.equal(out, expected)


@pytest.mark.parametrize("order", ["grouped", "grid"])
def test_equal_inputs_give_equal_bits(order: Any) -> None:
    inputs = problem(16, 157, 1411, 384, torch.bfloat16, "cuda")
    first = _run(inputs, order)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, _run(inputs, order), strict=True))


@pytest.mark.parametrize("order", ["grouped", "grid"])
def test_no_synchronisation_and_a_cuda_graph(order: Any) -> None:
    """Captured once, replayed with other tokens at other positions."""
    inputs = problem(4, 49, 147, 384, torch.float32, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _run(inputs, order)
        torch.cuda.set_sync_debug_mode("error")
        try:
            _run(inputs, order)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _run(inputs, order)
    place = torch.cat([inputs["token_index"], inputs["mask_index"]], dim=1).flip(1)
    inputs["token_index"].copy_(place[:, :49])
    inputs["mask_index"].copy_(place[:, 49:])
    with torch.no_grad():
        inputs["tokens"].normal_()
    graph.replay()
    replayed = [x.clone() for x in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, _run(inputs, order), strict=True))
