"""Pictures as they are written: what a decoder leaves against swscale, parts against the whole."""

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from media import picture, write_clip

from avmae_fast.data.clip import Picture, Pixels, stacked
from avmae_fast.data.pictures import PlanesPicture, RgbPicture, YuvPicture, picture_of
from avmae_fast.data.planes import views
from avmae_fast.data.readers import open_clip

_reformatter = VideoReformatter()


def _frame(height: int, width: int, form: str = "yuv420p", **colour) -> VideoFrame:
    rgb = av.VideoFrame.from_ndarray(picture(77, height, width), format="rgb24")
    return rgb.reformat(format=form, **colour)


def _whole(shown: Picture) -> np.ndarray:
    return stacked([([0], shown)], 1)[0]


def _swscale(frame: VideoFrame) -> np.ndarray:
    return _reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()


@pytest.mark.parametrize("space", [Colorspace.ITU601, Colorspace.ITU709])
@pytest.mark.parametrize("span", [ColorRange.MPEG, ColorRange.JPEG])
def test_every_colour_space_is_what_swscale_makes_of_it(space, span) -> None:
    frame = _frame(96, 128, dst_colorspace=space, dst_color_range=span)
    ours = picture_of(frame, _reformatter, None, "rgb")
    assert isinstance(ours, YuvPicture) and ours.shape == (96, 128, 3)
    difference = np.abs(_whole(ours).astype(int) - _swscale(frame))
    # swscale's coefficients are coarser, and it rounds on the way.
    assert np.percentile(difference, 99) <= 2 and difference.max() <= 4


def test_odd_sides_keep_their_last_line() -> None:
    frame = _frame(81, 113)
    ours = picture_of(frame, _reformatter, None, "rgb")
    assert isinstance(ours, YuvPicture) and ours.shape == (81, 113, 3)
    # swscale interpolates chroma where a side is odd; here a pixel has that of its block.
    assert np.abs(_whole(ours).astype(int) - _swscale(frame)).mean() < 1.5


@pytest.mark.parametrize("form", ["yuv444p", "yuv422p", "nv12", "gray", "rgb24", "yuv420p10le"])
def test_other_formats_are_left_to_swscale(form: str) -> None:
    frame = _frame(96, 128, form)
    ours = picture_of(frame, _reformatter, None, "rgb")
    assert isinstance(ours, RgbPicture)
    np.testing.assert_array_equal(_whole(ours), _swscale(frame))


def test_what_is_resized_is_left_to_swscale() -> None:
    ours = picture_of(_frame(96, 128), _reformatter, 48, "rgb")
    assert isinstance(ours, RgbPicture) and ours.shape == (48, 64, 3)


def _pictures() -> dict[str, Picture]:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (36, 50, 3), dtype=np.uint8)
    planes = views(draw.integers(0, 256, (54, 50), dtype=np.uint8))
    return {
        "rgb": RgbPicture(pixels),
        "yuv": YuvPicture(planes, "bt709"),
        "planes": PlanesPicture(planes),
    }


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("corner", [(0, 0), (16, 20), (7, 13)])
@pytest.mark.parametrize("kind", ["rgb", "yuv"])
def test_a_part_is_that_of_the_whole(kind: str, corner: tuple[int, int], mirrored: bool) -> None:
    shown = _pictures()[kind]
    out = np.empty((20, 30, 3), np.uint8)
    shown.write(out, *corner, mirrored)
    top, left = corner
    part = _whole(shown)[top : top + 20, left : left + 30]
    np.testing.assert_array_equal(out, part[:, ::-1] if mirrored else part)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("corner", [(0, 0), (16, 20), (6, 12)])
def test_a_part_of_planes(corner: tuple[int, int], mirrored: bool) -> None:
    shown = _pictures()["planes"]
    out = np.empty((30, 30), np.uint8)
    shown.write(out, *corner, mirrored)
    whole = views(_whole(shown))
    for got, plane, unit in zip(views(out), whole, (1, 2, 2), strict=True):
        top, left = corner[0] // unit, corner[1] // unit
        part = plane[top : top + len(got), left : left + got.shape[1]]
        np.testing.assert_array_equal(got, part[:, ::-1] if mirrored else part)


@pytest.mark.parametrize("pixels", ["rgb", "yuv420"])
def test_pictures_outlive_what_made_them(tmp_path, pixels: Pixels) -> None:
    """Nothing of FFmpeg's is freed or written over while a picture refers to it."""
    path = write_clip(tmp_path / "a.mp4")
    times_s = np.arange(20) / 25
    with open_clip(path, "pyav", pixels) as clip:
        kept = list(clip.read_pictures(times_s, None))
    with open_clip(path, "pyav", pixels) as clip:
        expected = clip.read_video(times_s, None)
    np.testing.assert_array_equal(stacked(kept, len(times_s)), expected)
