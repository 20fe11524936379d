"""Which values make a patch, in which order, and how they are normalised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_cases import CASES, PatchCase, dense_patches, token_index
from torch.nn import functional as F

from avmae_kernels.patch_gather import gather_patches_normalised
from avmae_kernels.patches import gather_patches, normalise_pixels, patchify, unpatchify, view_clips


@pytest.mark.parametrize("name", CASES)
def test_gathered_patches_are_those_of_the_whole_clip(name: str) -> None:
    case = CASES[name]()
    dense = dense_patches(case)
    index = token_index(case, min(7, dense.shape[1]))
    got = gather_patches(case.source, index, case.patch, **case.view)
    expected = dense.gather(1, index[..., None].expand(-1, -1, dense.shape[2]))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@st.composite
def _cases(draw: st.DrawFn) -> PatchCase:
    """Video of any small geometry, layout, window and mirroring."""
    batch = draw(st.integers(1, 3))
    patch = tuple(draw(st.integers(1, 4)) for _ in range(3))
    size = [p * draw(st.integers(1, 3)) + draw(st.integers(0, p - 1)) for p in patch]
    margin = [draw(st.integers(0, 3)) for _ in range(2)]
    shape = (batch, size[0], size[1] + margin[0], size[2] + margin[1], 3)
    video = torch.arange(batch * shape[1] * shape[2] * shape[3] * 3).view(shape) % 251
    view: dict = {}
    if draw(st.booleans()):
        corners = [[draw(st.integers(0, m)) for m in margin] for _ in range(batch)]
        view = {"crop": torch.tensor(corners, dtype=torch.int32), "size": (size[1], size[2])}
    if draw(st.booleans()):
        view["flip"] = torch.tensor([draw(st.booleans()) for _ in range(batch)])
    if draw(st.booleans()):
        video, view["layout"] = video.movedim(-1, 1), "CTHW"
        video = video.contiguous() if draw(st.booleans()) else video
    return PatchCase(video.to(torch.uint8), patch, view)


@given(_cases())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_gathered_patches_of_any_geometry(case: PatchCase) -> None:
    dense = dense_patches(case)
    index = token_index(case, dense.shape[1])
    got = gather_patches(case.source, index, case.patch, **case.view)
    assert torch.equal(got, dense.gather(1, index[..., None].expand_as(dense)))


@pytest.mark.parametrize(
    ("shape", "patch"), [((2, 4, 6, 8, 3), (2, 3, 4)), ((2, 12, 8), (4, 2))], ids=["video", "audio"]
)
def test_unpatchify_undoes_patchify(shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
    source = torch.randn(shape)
    grid = tuple(n // p for n, p in zip(shape[1:], patch, strict=False))
    assert torch.equal(unpatchify(patchify(source, patch), grid, patch), source)


def test_patch_vector_is_that_of_a_convolution_weight() -> None:
    """(t, h, w, c) against Conv3d's (c, t, h, w): the permutation imported weights need."""
    video, weight = torch.randn(2, 4, 6, 8, 3).double(), torch.randn(5, 3, 2, 3, 4).double()
    convolved = F.conv3d(video.movedim(-1, 1), weight, stride=(2, 3, 4)).flatten(2).mT
    product = patchify(video, (2, 3, 4)) @ weight.movedim(1, -1).flatten(1).T
    torch.testing.assert_close(product, convolved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_byte_is_normalised_to_the_nearest_value(dtype: torch.dtype) -> None:
    """x * 2/255 - 1 of all 256 values, within a rounding (two in fp32, where 2/255 is rounded)."""
    pixels = torch.arange(256, dtype=torch.uint8)
    exact = pixels.double() * (2 / 255) - 1
    got = normalise_pixels(pixels, dtype)
    assert got.dtype == dtype and got[0] == -1 and got[255] == 1
    error = (got.double() - exact).abs() / exact.abs()
    bound = torch.finfo(dtype).eps * (1 if dtype == torch.float32 else 0.501)
    assert error.max() <= bound


def test_floating_values_stay_and_fp64_is_exact() -> None:
    values = torch.randn(5)
    assert normalise_pixels(values, torch.float32) is values
    pixels = torch.arange(256, dtype=torch.uint8)
    exact = pixels.double() * (2 / 255) - 1
    torch.testing.assert_close(normalise_pixels(pixels, torch.float64), exact, rtol=0, atol=2e-16)


@pytest.mark.parametrize("name", ["THWC", "crop-flip-CTHW", "I420-crop-flip", "spectrogram"])
def test_normalised_gather(name: str) -> None:
    case = CASES[name]()
    index = token_index(case, 4)
    raw = gather_patches(case.source, index, case.patch, **case.view)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        got = gather_patches_normalised(case.source, index, case.patch, dtype, **case.view)
        assert torch.equal(got, normalise_pixels(raw, dtype))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=["no-clip", "no-token"])
def test_empty_selections(shape: tuple[int, int]) -> None:
    source = torch.zeros(shape[0], 4, 16, 24, 3, dtype=torch.uint8)
    index = torch.zeros(shape, dtype=torch.int64)
    assert gather_patches(source, index, (2, 4, 4)).shape == (*shape, 96)
    assert gather_patches_normalised(source, index, (2, 4, 4), torch.float32).shape == (*shape, 96)


@pytest.mark.parametrize("name", ["THWC", "crop-flip", "I420", "spectrogram-transposed"])
def test_operator_contract(name: str) -> None:
    case = CASES[name]()
    index = token_index(case, 3)
    args = view_clips("test", case.source, case.patch, **case.view)
    op = torch.ops.avmae.gather_patches_normalised.default
    torch.library.opcheck(op, (*args, index, torch.float32))


VIDEO = torch.zeros(2, 4, 8, 8, 3, dtype=torch.uint8)
PLANES = torch.zeros(2, 4, 12, 8, dtype=torch.uint8)
INDEX = torch.zeros(2, 3, dtype=torch.int64)
CROP, FLIP = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"source": VIDEO[0]},
            r"wants video \[B, T, H, W, 3\] or spectrogram .*got source uint8 \[",
        ),
        ({"patch": (2, 4)}, r"for patch \(2, 4\)"),
        ({"source": VIDEO[..., :2]}, "3 colour channels in layout THWC"),
        ({"layout": "CTHW"}, "3 colour channels in layout CTHW"),
        ({"layout": "HWC"}, "wants layout 'THWC', 'CTHW' or 'I420', got 'HWC'"),
        ({"layout": "I420"}, r"video \[B, T, 3H/2, W\] or spectrogram"),
        ({"source": PLANES.float(), "layout": "I420"}, r"uint8 planes \[B, T, 3H/2, W\].*float32"),
        ({"source": PLANES[:, :, 1:], "layout": "I420"}, r"even H and W.*\[2, 4, 11, 8\]"),
        ({"source": PLANES[..., 1:7], "layout": "I420"}, "every frame contiguous"),
        ({"source": PLANES, "layout": "I420", "colour": "bt2020"}, "one of 'bt601', .* 'bt2020'"),
        (
            {"source": PLANES, "layout": "I420", "crop": CROP, "size": (9, 8)},
            r"size in \(1, 1\)..\(8, 8\), got \(9, 8\)",
        ),
        ({"patch": (2, 9, 4)}, r"at least one patch of \(2, 9, 4\)"),
        ({"index": INDEX.int()}, r"index int64 \[B, count\].*index int32 \[2, 3\]"),
        ({"index": INDEX[:1]}, r"index int64 \[B, count\].*\[1, 3\]"),
        ({"crop": CROP}, "crop and size together, got size None"),
        ({"size": (4, 4)}, r"crop and size together, got size \(4, 4\)"),
        ({"crop": CROP.long(), "size": (4, 4)}, r"crop int32 \[2, 2\], contiguous"),
        ({"crop": CROP[:1], "size": (4, 4)}, r"crop int32 \[2, 2\].*crop int32 \[1, 2\]"),
        ({"crop": CROP.mT, "size": (4, 4)}, r"crop int32 \[2, 2\], contiguous"),
        ({"crop": CROP, "size": (4, 9)}, r"size in \(1, 1\)..\(8, 8\), got \(4, 9\)"),
        ({"crop": CROP, "size": (0, 4)}, r"size in \(1, 1\)..\(8, 8\), got \(0, 4\)"),
        ({"flip": FLIP.int()}, r"flip bool \[2\].*flip int32 \[2\]"),
        (
            {"source": torch.zeros(2, 8, 8), "patch": (4, 4), "flip": FLIP},
            "crop, size and flip for video only",
        ),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"source": VIDEO, "index": INDEX, "patch": (2, 4, 4), **change}
    with pytest.raises(ValueError, match=message):
        gather_patches(**arguments)
    with pytest.raises(ValueError, match=message):
        gather_patches_normalised(dtype=torch.float32, **arguments)


def test_wanted_gradient_of_the_source_is_refused() -> None:
    source = VIDEO.float().requires_grad_()
    with pytest.raises(ValueError, match="a source without requires_grad: it gets no gradient"):
        gather_patches_normalised(source, INDEX, (2, 4, 4), torch.float32)
    with torch.no_grad():
        gather_patches_normalised(source, INDEX, (2, 4, 4), torch.float32)


def test_wrong_patches_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"unpatchify wants patches \[B, 4, 12\] for grid \(2, 1, 2"
    ):
        unpatchify(torch.zeros(1, 4, 11), (2, 1, 2), (1, 2, 2))
