"""Parts of pictures cut and converted on the host, against the conversion of the whole picture."""

import logging
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avmae_kernels import _compiled, yuv_crop
from avmae_kernels.yuv import COLOURS, i420_to_rgb
from avmae_kernels.yuv_crop import crop_to_i420, crop_to_rgb

# Tiles of the compiled code are 256 pixels wide.
SIDES = st.integers(1, 40) | st.integers(250, 530)


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(yuv_crop, "compiled", lambda: None)
    elif _compiled.compiled() is None:
        pytest.skip("csrc/ is not built here")


def _picture(height: int, width: int, padding: int = 0, seed: int = 0):
    """Planes of noise whose lines are padded, and their RGB by the definition."""
    even, wide = height + height % 2, width + width % 2
    draw = np.random.default_rng(seed)
    whole = draw.integers(0, 256, (even * 3 // 2, wide), dtype=np.uint8)
    rgb = {c: i420_to_rgb(torch.from_numpy(whole)[None, None], c)[0, 0].numpy() for c in COLOURS}
    luma, chroma = whole[:even], whole[even:].reshape(2, even // 2, wide // 2)
    planes = tuple(
        np.pad(plane, ((0, 0), (0, padding)), constant_values=99)[:rows, :columns]
        for plane, rows, columns in (
            (luma, height, width),
            (chroma[0], even // 2, wide // 2),
            (chroma[1], even // 2, wide // 2),
        )
    )
    return planes, {c: pixels[:height, :width] for c, pixels in rgb.items()}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 21), SIDES, st.data(), st.booleans(), st.sampled_from(COLOURS))
def test_any_rectangle_is_that_of_the_whole(height, width, data, mirrored, colour) -> None:
    planes, rgb = _picture(height, width, data.draw(st.sampled_from([0, 1, 44])))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    h, w = data.draw(st.integers(0, height - top)), data.draw(st.integers(0, width - left))
    out = np.full((h, w, 3), 77, np.uint8)
    crop_to_rgb(out, planes, top, left, mirrored=mirrored, colour=colour)
    expected = rgb[colour][top : top + h, left : left + w]
    np.testing.assert_array_equal(out, expected[:, ::-1] if mirrored else expected)


@pytest.mark.parametrize("colour", COLOURS)
def test_every_colour_there_is(colour) -> None:
    """All luma beside all pairs of the chroma values at which colours saturate or round."""
    y = np.tile(np.arange(256, dtype=np.uint8), (2, 2))
    levels = np.array([0, 1, 15, 16, 17, 64, 127, 128, 129, 200, 239, 240, 254, 255], np.uint8)
    for u in levels:
        for v in levels:
            chroma = np.full((1, 256), u), np.full((1, 256), v)
            out = np.empty((2, 512, 3), np.uint8)
            crop_to_rgb(out, (y, *chroma), 0, 0, mirrored=False, colour=colour)
            flat = np.concatenate([y.ravel(), *(c.ravel() for c in chroma)]).reshape(3, 512)
            expected = i420_to_rgb(torch.from_numpy(flat)[None, None], colour)[0, 0]
            np.testing.assert_array_equal(out, expected.numpy())


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("corner", [(0, 0), (4, 6), (10, 270)])
def test_planes_stay_planes(corner, mirrored) -> None:
    planes, rgb = _picture(24, 300, 20)
    top, left = corner
    out = np.full((21, 30), 77, np.uint8)
    crop_to_i420(out, planes, top, left, mirrored=mirrored)
    got = i420_to_rgb(torch.from_numpy(out)[None, None])[0, 0].numpy()
    expected = rgb["bt601"][top : top + 14, left : left + 30]
    np.testing.assert_array_equal(got, expected[:, ::-1] if mirrored else expected)


@pytest.mark.parametrize("mirrored", [False, True])
def test_full_range_becomes_limited(mirrored) -> None:
    """Every level, luma by 219 / 255 from 16 on and chroma by 224 / 255 around 128."""
    levels = np.arange(256, dtype=np.uint8)
    y, u = np.tile(levels, (2, 1)), levels[None, ::2].copy()
    v = levels[None, 1::2].copy()
    out = np.empty((3, 256), np.uint8)
    crop_to_i420(out, (y, u, v), 0, 0, mirrored=mirrored, full=True)
    got = np.concatenate([out[:2], out[2].reshape(2, 128).repeat(2, 1)])
    got = got[:, ::-1] if mirrored else got
    exact = levels.astype(float)
    luma, chroma = 16 + exact * 219 / 255, 128 + (exact - 128) * 224 / 255
    # No exact level is within 2**-9 of a half, and the coefficients move none by 2**-10.
    np.testing.assert_array_equal(got[0], np.rint(luma))
    np.testing.assert_array_equal(got[1], np.rint(luma))
    np.testing.assert_array_equal(got[2, ::2], np.rint(chroma[::2]))
    np.testing.assert_array_equal(got[3, ::2], np.rint(chroma[1::2]))


def test_nothing_beside_the_rectangle_is_written() -> None:
    planes, _ = _picture(9, 301)
    memory = np.full(3 * 5 * 41 * 3, 77, np.uint8)
    out = memory[5 * 41 * 3 : 2 * 5 * 41 * 3].reshape(5, 41, 3)
    crop_to_rgb(out, planes, 3, 259, mirrored=True)
    assert (memory[: 5 * 41 * 3] == 77).all() and (memory[2 * 5 * 41 * 3 :] == 77).all()


def test_lines_may_run_upwards() -> None:
    """FFmpeg has pictures whose lines are stored from the last one on."""
    planes, rgb = _picture(8, 12)
    out = np.empty((8, 12, 3), np.uint8)
    crop_to_rgb(
        out, tuple(np.ascontiguousarray(p[::-1])[::-1] for p in planes), 0, 0, mirrored=False
    )
    np.testing.assert_array_equal(out, rgb["bt601"])


PLANES, _ = _picture(8, 12)
RGB, I420 = np.zeros((4, 4, 3), np.uint8), np.zeros((6, 4), np.uint8)


@pytest.mark.parametrize(
    ("out", "planes", "corner", "match"),
    [
        (RGB, PLANES, (5, 0), r"4 x 4 pixels from \(5, 0\) on are not inside a picture of 8 x 12"),
        (RGB, PLANES, (-1, 0), "not inside"),
        (RGB, PLANES, (0, 9), "not inside"),
        (
            RGB[:, ::2],
            PLANES,
            (0, 0),
            r"out as contiguous uint8 \[h, w, 3\]; got uint8 \[4, 2, 3\]",
        ),
        (RGB.astype(np.int8), PLANES, (0, 0), "got int8"),
        (RGB[0], PLANES, (0, 0), "got uint8"),
        (RGB, (PLANES[0], *(p[:, :5] for p in PLANES[1:])), (0, 0), "U and V of half the sides"),
        (RGB, (PLANES[0], PLANES[1], PLANES[2][:2]), (0, 0), "U and V of half the sides"),
        (RGB, (PLANES[0].astype(int), *PLANES[1:]), (0, 0), "uint8 planes .* got int64"),
        (RGB, (PLANES[0].repeat(2, 1)[:, ::2], *PLANES[1:]), (0, 0), "uint8 planes"),
    ],
)
def test_wrong_arguments_of_rgb_are_named(out, planes, corner, match) -> None:
    with pytest.raises(ValueError, match=match):
        crop_to_rgb(out, planes, *corner, mirrored=False)


@pytest.mark.parametrize(
    ("out", "corner", "match"),
    [
        (I420, (1, 0), "top and left even, got 1 and 0"),
        (I420, (0, 3), "top and left even, got 0 and 3"),
        (I420, (6, 0), "not inside"),
        (I420[:5], (0, 0), r"uint8 \[3h/2, w\], h and w even; got uint8 \[5, 4\]"),
        (np.zeros((6, 3), np.uint8), (0, 0), "h and w even"),
        (np.zeros((3, 4), np.uint8), (7, 0), "top and left even"),
    ],
)
def test_wrong_arguments_of_planes_are_named(out, corner, match) -> None:
    with pytest.raises(ValueError, match=match):
        crop_to_i420(out, PLANES, *corner, mirrored=False)


def test_unknown_colour_and_memory_that_may_not_be_written() -> None:
    with pytest.raises(ValueError, match="colour must be one of 'bt601'"):
        crop_to_rgb(RGB, PLANES, 0, 0, mirrored=False, colour="bt2020")
    out = np.zeros((4, 4, 3), np.uint8)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only|not writeable"):
        crop_to_rgb(out, PLANES, 0, 0, mirrored=False)


def test_a_module_built_from_older_sources_is_not_used(monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "avmae_kernels._C", type(sys)("avmae_kernels._C"))
    with caplog.at_level(logging.WARNING, logger="avmae_kernels._compiled"):
        assert _compiled.compiled.__wrapped__() is None
    assert "built from other sources" in caplog.text and "reinstall avmae_fast" in caplog.text
