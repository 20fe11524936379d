"""The kernels of the patch embedding and the sums of its gradients, interpreted, fp32 and fp16.

Not bf16: Triton's interpreter computes it wrongly. The interpreter does not see reads past the
end of a tensor, so sources lie in memory whose every other value is NaN or would change a result.
"""

import math

import numpy as np
import pytest
import torch
from budgets import assert_matches_meaning, assert_within_budget
from patch_cases import CASES, PatchCase, dense_patches, token_index

from avmae_kernels.patch_embed import patch_embed_visible, patch_embed_visible_reference
from avmae_kernels.patch_gather import gather_patches_normalised
from avmae_kernels.patches import gather_patches, normalise_pixels
from avmae_kernels.row_sums import sum_by_position, sum_rows

DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gather_equals_its_meaning_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]()
    index = token_index(case, min(7, dense_patches(case).shape[1]))
    got = gather_patches_normalised(case.source, index, case.patch, dtype, **case.view)
    raw = gather_patches(case.source, index, case.patch, **case.view)
    assert torch.equal(got, normalise_pixels(raw, dtype))


def test_gather_of_every_byte_and_of_the_released_patch() -> None:
    source = torch.arange(2 * 2 * 32 * 16 * 3).remainder(256).to(torch.uint8).view(2, 2, 32, 16, 3)
    index = torch.tensor([[1, 0], [0, 1]])
    for dtype in (*DTYPES, torch.float64):
        got = gather_patches_normalised(source, index, (2, 16, 16), dtype)
        expected = normalise_pixels(gather_patches(source, index, (2, 16, 16)), dtype)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=["no-clip", "no-token"])
def test_nothing_to_gather(shape: tuple[int, int]) -> None:
    source = torch.zeros(shape[0], 4, 16, 24, 3, dtype=torch.uint8)
    index = torch.zeros(shape, dtype=torch.int64)
    assert gather_patches_normalised(source, index, (2, 4, 4), torch.float32).shape == (*shape, 96)


@pytest.mark.parametrize(
    ("axis", "patch"),
    [
        ("clip", (1, 1, 1)),
        ("frame", (1, 1, 1)),
        ("frame", (4, 1, 1)),
        ("line", (1, 1, 1)),
        ("line", (1, 4, 1)),
        ("column", (1, 1, 1)),
        ("column", (1, 1, 4)),
        ("channel", (1, 1, 1)),
    ],
)
def test_pixels_past_two_to_the_31(axis: str, patch: tuple[int, int, int]) -> None:
    """Neighbours along one axis lie 2^30 bytes apart, in memory that is hardly ever touched.

    Their distance fits 32 bits, its multiples do not.
    """
    axes = ["clip", "frame", "line", "column", "channel"]
    shape, stride = [1, 1, 1, 1, 3], [3, 3, 3, 3, 1]
    far = axes.index(axis)
    shape[far] = 3 if axis == "channel" else 4
    stride[far] = 2**30 + 64
    memory = torch.from_numpy(np.zeros(3 * (2**30 + 64) + 3, np.uint8))
    source = memory.as_strided(shape, stride)
    values = torch.arange(source.numel(), dtype=torch.uint8).view(shape) + 7
    source.copy_(values)
    tokens = math.prod(shape[1:4]) // math.prod(patch)
    index = torch.arange(tokens).flip(0).expand(shape[0], -1)
    got = gather_patches_normalised(source, index, patch, torch.float32)
    expected = gather_patches(values, index, patch)
    assert torch.equal(got, normalise_pixels(expected, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "width", "count"),
    [
        ("THWC", 32, 5),
        ("THWC", 40, 1),
        ("crop-flip-CTHW", 20, 3),
        ("one-token", 192, 1),
        ("I420-crop-flip", 20, 3),
        ("spectrogram", 96, 4),
        ("spectrogram-remainders", 33, 9),
        ("floating-video", 64, 2),
    ],
)
def test_embedding_and_gradients(name: str, width: int, count: int, dtype: torch.dtype) -> None:
    case = CASES[name]()
    N, P = dense_patches(case).shape[1:]
    inputs = {
        "source": case.source,
        "visible": token_index(case, count),
        # Products of a size that fp16 holds with room to spare.
        "weight": (torch.randn(width, P) / P**0.5).to(dtype),
        "bias": torch.randn(width).to(dtype),
        "pos": torch.randn(N, width).to(dtype),
        "patch": case.patch,
        **case.view,
    }
    learned = ["weight", "bias", "pos"]
    assert_matches_meaning(patch_embed_visible, patch_embed_visible_reference, inputs, learned)
    assert_matches_meaning(patch_embed_visible, patch_embed_visible_reference, inputs, learned[:2])


def test_product_and_position_of_two_dtypes() -> None:
    """As under autocast: an fp16 product and fp32 positions make an fp32 sum, rounded once."""
    case = CASES["THWC"]()
    index = token_index(case, 5)
    weight, bias = torch.randn(32, 96).half() / 10, torch.randn(32).half()
    pos = torch.randn(48, 32)
    got = patch_embed_visible(case.source, index, weight, bias, pos, case.patch)
    plain = patch_embed_visible_reference(case.source, index, weight, bias, pos, case.patch)
    exact = [x.double() for x in (weight, bias, pos)]
    exact_sum = patch_embed_visible_reference(case.source, index, *exact, case.patch)
    assert got.dtype == torch.float32
    assert_within_budget(got, plain, exact_sum, "sum")


def test_neighbours_do_not_leak() -> None:
    """NaN around every clip, in the columns right of the last patch and in the unseen patches."""
    memory = torch.full((5, 4, 22, 26, 3), float("nan"))
    source = memory[1:4, 1:3, 3:19, 1:25]
    index = torch.tensor([[0, 23], [5, 1], [23, 6]])
    case = PatchCase(source, (2, 4, 4))
    for b, row in enumerate(index.tolist()):
        for token in row:
            y, x = token // 6 * 4, token % 6 * 4
            source[b, :, y : y + 4, x : x + 4] = torch.randn(2, 4, 4, 3)
    got = gather_patches_normalised(case.source, index, case.patch, torch.float32)
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 20), (3, 50, 96), (2, 700, 64), (0, 4, 32)])
def test_sum_of_rows(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """With and without an index, at an offset, from strided rows; the other rows are NaN."""
    B, L, D = shape
    x = torch.full((B, L + 3, D + 8), float("nan"), dtype=dtype)[:, :, :D]
    x[:, 2 : L + 2] = torch.randn(B, L, D).to(dtype)
    exact = x[:, 2 : L + 2].double().sum((0, 1))
    plain = x[:, 2 : L + 2].float().sum((0, 1))
    place = (
        torch.stack([torch.randperm(L) + 2 for _ in range(B)]) if B else torch.zeros(0, L).long()
    )
    for got in (sum_rows(x, L, first=2), sum_rows(x, L, index=place)):
        assert_within_budget(got, plain, exact, "sum of rows")


def test_sum_of_no_rows() -> None:
    assert torch.equal(sum_rows(torch.randn(2, 3, 8), 0), torch.zeros(8))


def test_sums_of_expanded_gradients() -> None:
    grad = torch.ones(()).expand(3, 5, 40)
    index = torch.tensor([[0, 3, 1, 6, 2], [3, 4, 5, 1, 0], [6, 5, 4, 3, 2]])
    assert torch.equal(sum_rows(grad, 5), torch.full((40,), 15.0))
    counts = torch.zeros(8).index_add_(0, index.flatten(), torch.ones(15))
    got = sum_by_position(grad, index, torch.arange(5)[None], 8)
    assert torch.equal(got, counts[:, None].expand(-1, 40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 40])
def test_sum_by_position(batch: int, dtype: torch.dtype) -> None:
    """More clips than a tile holds, positions that no clip shows, NaN in rows that nobody reads."""
    K, N, D = 3, 11, 128
    x = torch.full((batch, K + 2, D), float("nan"), dtype=dtype)
    x[:, 1 : K + 1] = torch.randn(batch, K, D).to(dtype)
    index = torch.stack([torch.randperm(N - 2)[:K] for _ in range(max(batch, 1))])[:batch]
    got = sum_by_position(x, index, torch.arange(1, K + 1)[None], N)
    rows = x[:, 1 : K + 1].flatten(0, 1)
    exact = torch.zeros(N, D).double().index_add_(0, index.flatten(), rows.double())
    plain = torch.zeros(N, D).index_add_(0, index.flatten(), rows.float())
    assert_within_budget(got, plain, exact, "sum by position")
    assert got[N - 2 :].abs().max() == 0
