"""The patch embedding on a GPU: bf16, fp16 and fp32 against float64."""

from typing import Any

import pytest
import torch
from budgets import assert_matches_meaning, assert_within_budget
from patch_cases import CASES, dense_patches, token_index
from torch import Tensor

from avmae_kernels.patch_embed import patch_embed_visible, patch_embed_visible_reference
from avmae_kernels.patch_gather import gather_patches_normalised
from avmae_kernels.patches import gather_patches, normalise_pixels
from avmae_kernels.row_sums import sum_by_position, sum_rows

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LEAVES = ["weight", "bias", "pos"]


def released(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """AudioSet's video: 157 of 1568 tokens into ViT-B."""
    source = torch.randint(0, 256, (batch, 16, 224, 224, 3), dtype=torch.uint8)
    index = torch.stack([torch.randperm(1568)[:157].sort()[0] for _ in range(batch)])
    inputs = {
        "source": source,
        "visible": index,
        "weight": (torch.randn(768, 1536) / 40).to(dtype),
        "bias": torch.randn(768).to(dtype),
        "pos": torch.randn(1568, 768).to(dtype),
    }
    return {**{name: x.cuda() for name, x in inputs.items()}, "patch": (2, 16, 16)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gather_equals_the_cpu_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]()
    index = token_index(case, min(7, dense_patches(case).shape[1]))
    expected = gather_patches_normalised(case.source, index, case.patch, dtype, **case.view)
    on_gpu = case.to("cuda")
    got = gather_patches_normalised(on_gpu.source, index.cuda(), case.patch, dtype, **on_gpu.view)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "width", "count"),
    [("THWC", 40, 1), ("crop-flip-CTHW", 20, 3), ("one-token", 192, 1), ("I420", 20, 3)]
    + [("spectrogram", 96, 4)],
)
def test_embedding_and_gradients(name: str, width: int, count: int, dtype: torch.dtype) -> None:
    case = CASES[name]()
    N, P = dense_patches(case).shape[1:]
    inputs = {
        "visible": token_index(case, count).cuda(),
        "weight": (torch.randn(width, P) / P**0.5).to("cuda", dtype),
        "bias": torch.randn(width).to("cuda", dtype),
        "pos": torch.randn(N, width).to("cuda", dtype),
        "patch": case.patch,
    }
    on_gpu = case.to("cuda")
    inputs |= {"source": on_gpu.source, **on_gpu.view}
    assert_matches_meaning(patch_embed_visible, patch_embed_visible_reference, inputs, LEAVES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_released_shape(dtype: torch.dtype) -> None:
    inputs = released(4, dtype)
    assert_matches_meaning(patch_embed_visible, patch_embed_visible_reference, inputs, LEAVES)


def test_autocast() -> None:
    """A bf16 product, fp32 positions and an fp32 sum; gradients in the parameters' fp32."""
    inputs = released(2, torch.float32)
    leaves = [inputs[name].requires_grad_() for name in LEAVES]
    with torch.autocast("cuda", torch.bfloat16):
        got = patch_embed_visible(**inputs)
        plain = patch_embed_visible_reference(**inputs)
    exact_inputs = {n: x.detach().double() if n in LEAVES else x for n, x in inputs.items()}
    exact_leaves = [exact_inputs[name].requires_grad_() for name in LEAVES]
    exact = patch_embed_visible_reference(**exact_inputs)
    assert got.dtype == torch.float32
    assert_within_budget(got.detach(), plain.detach(), exact.detach(), "tokens")
    grad_out = torch.randn_like(got)
    results = [
        torch.autograd.grad(out, of, grad_out.to(out.dtype))
        for out, of in ((got, leaves), (plain, leaves), (exact, exact_leaves))
    ]
    for name, ours, low, high in zip(LEAVES, *results, strict=True):
        assert_within_budget(ours, low, high, name)


def test_equal_inputs_give_equal_bits() -> None:
    inputs = released(8, torch.bfloat16)
    leaves = [inputs[name].requires_grad_() for name in LEAVES]

    def run() -> list[Tensor]:
        out = patch_embed_visible(**inputs)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_a_clip_is_embedded_alike_in_every_batch() -> None:
    """Sums run over one token: what else is in the batch cannot matter to the gather."""
    inputs = released(5, torch.bfloat16)
    arguments = (inputs["patch"], torch.bfloat16)
    whole = gather_patches_normalised(inputs["source"], inputs["visible"], *arguments)
    alone = gather_patches_normalised(inputs["source"][3:4], inputs["visible"][3:4], *arguments)
    assert torch.equal(whole[3:4], alone)


def test_no_synchronisation_and_a_cuda_graph() -> None:
    """Captured once, replayed with other pixels and another choice of tokens."""
    inputs = released(2, torch.bfloat16)
    leaves = [inputs[name].requires_grad_() for name in LEAVES]

    def run() -> list[Tensor]:
        out = patch_embed_visible(**inputs)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

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
    other = released(2, torch.bfloat16)
    inputs["source"].copy_(other["source"])
    inputs["visible"].copy_(other["visible"])
    graph.replay()
    replayed = [x.clone() for x in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, run(), strict=True))


def test_pixels_and_patches_past_two_to_the_31() -> None:
    """1000 clips are 2.4e9 pixels, and 1400 of their tokens each 2.15e9 values."""
    source = torch.randint(0, 256, (1000, 16, 224, 224, 3), dtype=torch.uint8, device="cuda")
    index = torch.arange(1400, device="cuda").expand(1000, -1)
    got = gather_patches_normalised(source, index, (2, 16, 16), torch.float16)
    assert got.numel() > 2**31
    last = gather_patches(source[-1:], index[-1:], (2, 16, 16))
    assert torch.equal(got[-1:], normalise_pixels(last, torch.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 20), (64, 1411, 384), (0, 4, 32)])
def test_sums(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    B, L, D = shape
    x = torch.randn(B, L, D).to("cuda", dtype)
    rows = x.flatten(0, 1)
    assert_within_budget(sum_rows(x, L), rows.float().sum(0), rows.double().sum(0), "rows")
    index = torch.stack([torch.randperm(L + 3)[:L] for _ in range(max(B, 1))])[:B].cuda()
    got = sum_by_position(x, index, torch.arange(L, device="cuda")[None], L + 3)
    zeros = torch.zeros(L + 3, D, device="cuda")
    plain = zeros.index_add(0, index.flatten(), rows.float())
    exact = zeros.double().index_add(0, index.flatten(), rows.double())
    assert_within_budget(got, plain, exact, "positions")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_tensors_of_a_device_that_is_not_current() -> None:
    inputs = released(1, torch.float16)
    there = {n: x.to("cuda:1") if isinstance(x, Tensor) else x for n, x in inputs.items()}
    assert torch.equal(patch_embed_visible(**there).cpu(), patch_embed_visible(**inputs).cpu())
