"""The decoder of packed JPEGs against libjpeg-turbo, and what it leaves to others."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from avmae_kernels._compiled import compiled
from avmae_kernels.jpeg import JpegDecoder
from avmae_kernels.yuv import i420_to_rgb
from avmae_kernels.yuv_crop import crop_to_rgb

simplejpeg = pytest.importorskip("simplejpeg")
needs_compiled = pytest.mark.skipif(compiled() is None, reason="csrc/ is not built here")


def _scene(height: int, width: int, noise: float = 12.0, seed: int = 0) -> np.ndarray:
    """Slopes of colour, an edge and noise: coefficients of every frequency."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 200 / width, y * 220 / height, (x + y) * 90 / (height + width)], axis=-1)
    rgb[height // 3 :, width // 4 : width // 2] = [250, 10, 120]
    return (rgb + draw.normal(0, noise, rgb.shape)).clip(0, 255).astype(np.uint8)


def _jpeg(rgb: np.ndarray, quality: int = 75, sampling: str = "420") -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality, colorsubsampling=sampling)


def _assert_closer_than_the_fast_transform(ours: np.ndarray, data: bytes, **how: object) -> None:
    """libjpeg has an exact transform and a fast one; the distance of these is the yardstick."""
    exact, fast = (
        simplejpeg.decode_jpeg(data, fastdct=fast, **how).reshape(ours.shape).astype(int)
        for fast in (False, True)
    )
    mine, theirs = np.abs(ours - exact), np.abs(fast - exact)
    assert mine.mean() <= max(theirs.mean(), 0.1) and mine.max() <= max(theirs.max(), 2)


@needs_compiled
@pytest.mark.parametrize("quality", [1, 30, 75, 95, 100])
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 129), (63, 200), (256, 340)])
def test_planes_are_those_of_libjpeg(size: tuple[int, int], quality: int) -> None:
    data = _jpeg(_scene(*size), quality)
    planes = JpegDecoder(*size).decode(data)
    assert planes is not None and planes[0].shape == size
    assert planes[1].shape == planes[2].shape == ((size[0] + 1) // 2, (size[1] + 1) // 2)
    _assert_closer_than_the_fast_transform(planes[0], data, colorspace="GRAY")
    rgb = np.empty((*size, 3), np.uint8)
    crop_to_rgb(rgb, planes, 0, 0, mirrored=False, colour="bt601-full")
    _assert_closer_than_the_fast_transform(rgb, data, fastupsample=True)


@needs_compiled
def test_noise_saturates_as_it_should() -> None:
    draw = np.random.default_rng(0)
    data = _jpeg(draw.choice([0, 255], (64, 96, 3)).astype(np.uint8), 90)
    planes = JpegDecoder(64, 96).decode(data)
    assert planes is not None
    _assert_closer_than_the_fast_transform(planes[0], data, colorspace="GRAY")


@needs_compiled
def test_tables_of_another_encoder() -> None:
    """FFmpeg writes other quantisation and, at will, Huffman codes of the picture itself."""
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 130, 70, "yuvj420p"
    encoder.time_base, encoder.options = Fraction(1, 25), {"huffman": "optimal"}
    encoder.thread_count = 1  # several make slices, which restarts part
    frame = av.VideoFrame.from_ndarray(_scene(70, 130), format="rgb24").reformat(format="yuvj420p")
    (packet,) = [*encoder.encode(frame), *encoder.encode(None)]
    decoder = JpegDecoder(70, 130)
    for data in (_jpeg(_scene(70, 130)), bytes(packet)):
        planes = decoder.decode(data)
        assert planes is not None
        _assert_closer_than_the_fast_transform(planes[0], data, colorspace="GRAY")


@needs_compiled
def test_the_memory_is_used_again() -> None:
    decoder = JpegDecoder(40, 50)
    first = decoder.decode(_jpeg(_scene(40, 50, seed=1)))
    assert first is not None
    before = first[0].copy()
    second = decoder.decode(_jpeg(_scene(40, 50, seed=2)))
    assert second is not None and np.shares_memory(first[0], second[0])
    assert not np.array_equal(second[0], before)


@needs_compiled
def test_of_full_range_luma_alone_comes_grey() -> None:
    planes = JpegDecoder(16, 16).decode(_jpeg(np.full((16, 16, 3), 77, np.uint8), 100))
    assert planes is not None
    whole = np.concatenate([plane.ravel() for plane in planes]).reshape(1, 1, 24, 16)
    assert (i420_to_rgb(torch.from_numpy(whole), "bt601-full") == 77).all()


def _mutilated() -> dict[str, bytes]:
    data = _jpeg(_scene(40, 50))
    scan = data.index(b"\xff\xda") + 14
    grey = simplejpeg.encode_jpeg(_scene(40, 50)[..., :1].copy(), colorspace="GRAY")
    return {
        "nothing": b"",
        "no JPEG": bytes(1000),
        "another size": _jpeg(_scene(40, 64)),
        "all of the chroma": _jpeg(_scene(40, 50), sampling="444"),
        "grey": grey,
        "header alone": data[:scan],
        "cut": data[: scan + (len(data) - scan) // 2],
        "cut and ended": data[: scan + (len(data) - scan) // 2] + b"\xff\xd9",
        "without its end": data[:-2],
        "too much": data[:-2] + bytes(50) + data[-2:],
        "zeros": data[:scan] + bytes(len(data) - scan - 2) + data[-2:],
        "ones": data[:scan] + b"\xff\x00" * 800 + data[-2:],
        "a restart": data[: scan + 40] + b"\xff\xd0" + data[scan + 40 :],
        "progressive": data.replace(b"\xff\xc0", b"\xff\xc2", 1),
    }


@pytest.mark.parametrize("kind", _mutilated())
def test_other_kinds_and_damage_are_left_to_others(kind: str) -> None:
    assert JpegDecoder(40, 50).decode(_mutilated()[kind]) is None


@needs_compiled
def test_random_damage_ends_in_planes_or_none() -> None:
    draw = np.random.default_rng(0)
    whole = np.frombuffer(_jpeg(_scene(40, 50)), np.uint8)
    decoder, refused = JpegDecoder(40, 50), 0
    for _ in range(2000):
        data = whole[: draw.integers(1, len(whole) + 1)].copy()
        at = draw.integers(0, len(data), draw.integers(0, 5))
        data[at] = draw.integers(0, 256, len(at))
        refused += decoder.decode(data.tobytes()) is None
    assert refused > 1500  # most are cut


def test_wrong_sides_are_named() -> None:
    with pytest.raises(ValueError, match="sides from 1 on, got 0 x 5"):
        JpegDecoder(0, 5)
