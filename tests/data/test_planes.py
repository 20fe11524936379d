"""Planes from the reader: what they hold for any file, and how they are cropped."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from media import picture, rotate, shown_index, write_clip

from avmae_fast.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    TrainConfig,
    VideoConfig,
)
from avmae_fast.data.clip import Size, stacked
from avmae_fast.data.loader import ClipLoader
from avmae_fast.data.pictures import PlanesPicture
from avmae_fast.data.planes import planes_of
from avmae_fast.data.readers import open_clip, resolve_reader
from avmae_kernels.yuv import i420_to_rgb

TIMES_S = np.array([0.5, 0.0, 1.2, 0.5])


def _both(path, size: Size = None) -> tuple[np.ndarray, np.ndarray]:
    """Pictures through planes and as read in RGB."""
    with open_clip(path, "pyav", "yuv420") as clip:
        planes = clip.read_video(TIMES_S, size)
    with open_clip(path, "pyav") as clip:
        rgb = clip.read_video(TIMES_S, size)
    return i420_to_rgb(torch.from_numpy(planes)[None])[0].numpy(), rgb


def _assert_same_pictures(ours: np.ndarray, rgb: np.ndarray, p99: int = 2, worst: int = 4) -> None:
    difference = np.abs(ours.astype(int) - rgb)
    assert np.percentile(difference, 99) <= p99 and difference.max() <= worst


def test_planes_are_the_pictures_that_rgb_is_made_of(tmp_path) -> None:
    ours, rgb = _both(write_clip(tmp_path / "a.mp4"))
    assert [shown_index(p) for p in ours] == [12, 0, 30, 12]
    _assert_same_pictures(ours, rgb)


def test_rotated_files_stand_upright(tmp_path) -> None:
    ours, rgb = _both(rotate(write_clip(tmp_path / "a.mp4")))
    assert rgb.shape[1:3] == (112, 80)
    _assert_same_pictures(ours, rgb)


@pytest.mark.parametrize(("size", "shape"), [(64, (64, 88)), ((48, 40),) * 2, ((160, 224),) * 2])
def test_resized_planes(tmp_path, size: Size, shape: tuple[int, int]) -> None:
    """Luma by the filter that RGB is resized with; chroma from half as many pixels."""
    path = write_clip(tmp_path / "a.mp4")
    ours, _ = _both(path, size)
    _, rgb = _both(path, shape)
    assert ours.shape == rgb.shape == (4, *shape, 3)
    luma, expected = (x @ np.array([0.299, 0.587, 0.114]) for x in (ours, rgb))
    difference = np.abs(luma - expected)
    # Three roundings to bytes on the way of each.
    assert np.percentile(difference, 99) <= 3 and difference.mean() < 1
    assert np.abs(ours.astype(int) - rgb).mean() < 2.5


def test_odd_sides_lose_a_line(tmp_path) -> None:
    options = {"pix_fmt": "yuv444p", "size": (81, 113)}
    ours, rgb = _both(write_clip(tmp_path / "a.mp4", **options))
    assert ours.shape[1:3] == (80, 112)
    # Chroma of every pixel against that of a 2x2 block.
    assert np.abs(ours.astype(int) - rgb[:, :80, :112]).mean() < 1.5


@pytest.mark.parametrize("space", [Colorspace.ITU601, Colorspace.ITU709])
@pytest.mark.parametrize("span", [ColorRange.MPEG, ColorRange.JPEG])
def test_every_colour_space_becomes_limited_bt601(space: Colorspace, span: ColorRange) -> None:
    rgb = av.VideoFrame.from_ndarray(picture(77, 96, 128), format="rgb24")
    frame = rgb.reformat(format="yuv420p", dst_colorspace=space, dst_color_range=span)
    reformatter = VideoReformatter()
    expected = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    planes = torch.from_numpy(
        stacked([([0], PlanesPicture(planes_of(frame, reformatter, None)))], 1)
    )
    # A second rounding of three values, where planes are converted.
    _assert_same_pictures(i420_to_rgb(planes[None])[0, 0].numpy(), expected, 4, 6)


def test_planes_of_another_reader_are_refused() -> None:
    with pytest.raises(ConfigError, match="data.pixels = 'yuv420' needs reader = 'pyav'"):
        resolve_reader("torchcodec", "yuv420")


def test_no_pictures_of_planes(tmp_path) -> None:
    with open_clip(write_clip(tmp_path / "a.mp4", frames=3), "pyav", "yuv420") as clip:
        assert not len(clip.read_video(np.zeros(0), None))


def _config(folder: Path, **data: Any) -> Config:
    video = VideoConfig(frames=4, height=64, width=48, tubelet=(2, 16, 16))
    return Config(
        model=ModelConfig.of_size("Ti", video=video, audio=None, fusion="early"),
        data=DataConfig(manifest=folder / "clips.csv", **({"short_side": 70, "workers": 0} | data)),
        train=TrainConfig(out=folder, batch=3, steps=1),
    )


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    names = [write_clip(folder / f"{i}.mp4", size=(96, 128), frames=30 + i).name for i in range(6)]
    (folder / "clips.csv").write_text("\n".join(["path", *names]) + "\n")
    return folder


def _take(config: Config, split: str, count: int) -> list[torch.Tensor]:
    with ClipLoader(config, split) as loader:
        return [batch.video for batch in islice(loader, count)]


def test_batches_of_planes_show_the_windows_of_rgb(clips: Path) -> None:
    # Not resized, and with a middle at even lines and columns.
    config = _config(clips, val_manifest=clips / "clips.csv", short_side=96)
    planes = replace(config, data=replace(config.data, pixels="yuv420"))
    for ours, rgb in zip(_take(planes, "val", 2), _take(config, "val", 2), strict=True):
        assert ours.shape == (3, 4, 96, 48) and ours.dtype == torch.uint8
        _assert_same_pictures(i420_to_rgb(ours).numpy(), rgb.numpy())


def test_batches_of_planes_do_not_depend_on_the_cache(clips: Path) -> None:
    config = _config(clips, pixels="yuv420")
    cached = replace(config, data=replace(config.data, cache="ram"))
    straight = _take(config, "train", 3)
    assert all(map(torch.equal, straight, _take(cached, "train", 3)))
    assert len({video[0, 0].numpy().tobytes() for video in straight}) == 3


def test_odd_sides_of_the_crop_are_refused(clips: Path) -> None:
    config = _config(clips)
    video = VideoConfig(frames=4, height=64, width=45, tubelet=(2, 16, 5))
    model = replace(config.model, video=video)
    with pytest.raises(ConfigError, match="video.width = 45 is not valid: it must be even with"):
        replace(config, model=model, data=replace(config.data, pixels="yuv420"))
