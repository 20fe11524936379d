"""Windows: the authors' rules in time, in sound and in the picture."""

import numpy as np
import pytest

from avmae_fast.data.windows import (
    centred_sound_start,
    centred_start,
    crop_corner,
    random_start,
    sound_spans,
    sound_start,
    ticks_in,
    waveform_samples,
    window_ticks,
)
from avmae_fast.reference import preprocess

# (ticks in the clip, frames, stride): short ones wrap, the last ones are the released recipes.
CLIPS = [(10, 16, 4), (1, 8, 3), (33, 8, 3), (61, 16, 4), (250, 16, 4), (250, 32, 2)]


@pytest.mark.parametrize(("ticks", "frames", "stride"), CLIPS)
def test_same_pictures_as_the_authors(ticks, frames, stride):
    starts = preprocess.train_offsets(ticks, frames, stride)
    # Draws at the middle of each of `starts` equal parts of [0, 1) give each start once.
    draws = (np.arange(starts) + 0.5) / starts
    assert [random_start(u, ticks, frames, stride) for u in draws] == list(range(starts))
    assert random_start(np.nextafter(1.0, 0.0), ticks, frames, stride) == starts - 1
    (middle,) = preprocess.eval_offsets(ticks, frames, stride)
    assert centred_start(ticks, frames, stride) == middle
    for start in (0, starts // 2, starts - 1, middle):
        ours = window_ticks(start, ticks, frames, stride, "wrap")
        assert ours.tolist() == preprocess.window(ticks, frames, stride, start).tolist()


def test_padding_stands_still():
    assert window_ticks(3, 10, 5, 4, "pad").tolist() == [3, 7, 9, 9, 9]


def test_ticks_of_a_duration():
    assert ticks_in(10.0, 25.0) == 250
    assert ticks_in(2.9999999, 25.0) == 75  # 1/12800 s, say, lost in a header
    assert ticks_in(9.97, 25.0) == 249
    assert ticks_in(0.01, 25.0) == 1


def test_waveform_length():
    assert waveform_samples(1) == 400
    assert waveform_samples(1000) == 160240
    assert 1 + (waveform_samples(128) - 400) // 160 == 128


def _pieced(start, samples, length, clip_end):
    out = np.full(samples, -1)
    for span in sound_spans(start, samples, length, clip_end):
        out[span.target : span.target + span.count] = np.arange(
            span.source, span.source + span.count
        )
    return out


@pytest.mark.parametrize(
    ("start", "samples", "length"), [(0, 5, 9), (7, 5, 9), (8, 30, 9), (0, 9, 9), (0, 1, 1)]
)
def test_sound_wraps_or_falls_silent(start, samples, length):
    position = start + np.arange(samples)
    assert _pieced(start, samples, length, "wrap").tolist() == (position % length).tolist()
    expected = np.where(position < length, position, -1)
    assert _pieced(start, samples, length, "pad").tolist() == expected.tolist()


@pytest.mark.parametrize("start", [0, 1, 95, 189])
def test_sound_starts_with_the_picture(start):
    # The authors' offset is in rows of 10 ms and in proportion to the clip's two lengths.
    row = preprocess.synchronised_offset(start, 250, 1000)
    assert sound_start(start, 25.0) / 160 == pytest.approx(row, abs=0.5)


def test_centred_sound():
    assert centred_sound_start(160000, 128080) == 15960
    assert centred_sound_start(100, 128080) == 0


def test_crop():
    picture, last = (6, 9, 3), np.nextafter(1.0, 0.0)
    assert crop_corner(picture, (4, 4)) == (1, 2)
    assert crop_corner(picture, (4, 4), 0.0, 0.0) == (0, 0)
    assert crop_corner(picture, (4, 4), last, last) == (2, 5)
    assert crop_corner(picture, (6, 9), 0.5, 0.5) == (0, 0)


def test_corners_in_planes_are_even():
    """A picture of 10 x 14 pixels: the middle and every even corner there is."""
    planes, last = (15, 14), np.nextafter(1.0, 0.0)
    assert crop_corner(planes, (4, 4)) == (2, 4)
    assert crop_corner(planes, (4, 4), last, last) == (6, 10)
    corners = {crop_corner(planes, (4, 4), u, u) for u in np.linspace(0, last, 50)}
    assert {top for top, _ in corners} == {0, 2, 4, 6}
    assert {left for _, left in corners} == {0, 2, 4, 6, 8, 10}


def test_every_crop_is_as_likely():
    corners = [
        crop_corner((6, 9, 3), (4, 4), (i + 0.5) / 3, (j + 0.5) / 6)
        for i in range(3)
        for j in range(6)
    ]
    assert sorted(corners) == [(top, left) for top in range(3) for left in range(6)]
