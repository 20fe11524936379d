"""Planes to RGB: against the standards in float64, and against swscale on real pictures."""

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace
from media import picture

from avmae_kernels.yuv import COLOURS, Colour, coefficients, i420_to_rgb, split_planes

STANDARDS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}


def _planes(frame: av.VideoFrame) -> torch.Tensor:
    return torch.from_numpy(frame.to_ndarray(format=None))[None, None]


def _by_the_standard(yuv: np.ndarray, colour: str) -> np.ndarray:
    """Y, U, V in the last axis to RGB, unrounded and unclipped: the inverse of the definition."""
    red, blue = STANDARDS[colour.removesuffix("-full")]
    luma = np.array([red, 1 - red - blue, blue])
    u = (np.array([0, 0, 1]) - luma) / (2 * (1 - blue))
    v = (np.array([1, 0, 0]) - luma) / (2 * (1 - red))
    full = colour.endswith("-full")
    scaled = np.stack([luma * 255, u * 255, v * 255])
    if not full:
        scaled *= np.array([219, 224, 224])[:, None] / 255
    offset = np.array([0 if full else 16, 128, 128])
    return 255 * (yuv - offset) @ np.linalg.inv(scaled).T


@pytest.mark.parametrize("colour", COLOURS)
def test_every_triple_of_bytes(colour: Colour) -> None:
    """Fixed-point coefficients move no result by 0.006 of a level: see `avmae_kernels.yuv`."""
    steps = np.unique(np.r_[np.arange(0, 256, 5), 15, 16, 17, 127, 128, 129, 235, 240, 254, 255])
    y, u, v = np.meshgrid(steps, steps, steps, indexing="ij")
    quads = [np.repeat(y.ravel(), 4), u.ravel(), v.ravel()]
    planes = np.concatenate([x.reshape(len(y.ravel()), -1) for x in quads], axis=1)
    # One 2x2 picture of each triple.
    got = i420_to_rgb(torch.from_numpy(planes.astype(np.uint8)).view(-1, 1, 3, 2), colour)
    assert got.shape == (len(planes), 1, 2, 2, 3)
    assert torch.equal(got, got[:, :, :1, :1].expand_as(got))
    exact = _by_the_standard(np.stack([y, u, v], -1).reshape(-1, 3).astype(float), colour)
    exact = exact.clip(0, 255)
    assert np.abs(got[:, 0, 0, 0].numpy() - exact).max() <= 0.506


def test_white_black_and_grey_are_exact() -> None:
    for colour in COLOURS:
        black, white = (0, 255) if colour.endswith("-full") else (16, 235)
        for luma, level in ((black, 0), (white, 255)):
            planes = torch.full((1, 1, 6, 4), 128, dtype=torch.uint8)
            planes[:, :, :4] = luma
            assert (i420_to_rgb(planes, colour) == level).all()


@pytest.mark.parametrize("colour", COLOURS)
def test_pictures_agree_with_swscale(colour: Colour) -> None:
    """Within 2 levels at 99 of 100 values, 4 at the worst: swscale's tables are of fewer bits."""
    standard = Colorspace.ITU709 if colour.startswith("bt709") else Colorspace.ITU601
    span = ColorRange.JPEG if colour.endswith("-full") else ColorRange.MPEG
    differences = []
    for index, (height, width) in enumerate([(96, 128), (90, 122), (224, 224)]):
        rgb = av.VideoFrame.from_ndarray(picture(index, height, width), format="rgb24")
        frame = rgb.reformat(format="yuv420p", dst_colorspace=standard, dst_color_range=span)
        options = {"src_colorspace": standard, "src_color_range": span}
        theirs = frame.reformat(format="rgb24", **options).to_ndarray()
        ours = i420_to_rgb(_planes(frame), colour)[0, 0].numpy()
        differences.append(np.abs(ours.astype(int) - theirs).ravel())
    difference = np.concatenate(differences)
    assert np.percentile(difference, 99) <= 2 and difference.max() <= 4
    # The other matrix, or the other range, would be seen.
    assert difference.mean() < 1.5


def test_planes_are_views_in_the_order_of_i420() -> None:
    planes = torch.arange(2 * 9 * 4, dtype=torch.uint8).view(1, 2, 9, 4)
    luma, u, v = split_planes(planes)
    assert torch.equal(luma[0, 0].flatten(), torch.arange(24, dtype=torch.uint8))
    assert u[0, 1].tolist() == [[60, 61], [62, 63], [64, 65]]
    assert v[0, 1].tolist() == [[66, 67], [68, 69], [70, 71]]
    assert v.untyped_storage().data_ptr() == planes.untyped_storage().data_ptr()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"i420_to_rgb wants uint8 planes .* \[1, 1, 4, 4\]"):
        i420_to_rgb(torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="colour must be one of 'bt601', .*, got 'rec601'"):
        coefficients("rec601")
