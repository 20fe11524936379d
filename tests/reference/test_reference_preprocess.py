"""Data steps beyond the golden arrays, which fix every index and pixel of the usual cases."""

import torch

from avmae_fast.reference import preprocess


def test_a_video_of_the_right_size_is_not_touched() -> None:
    frames = torch.randint(256, (2, 8, 11, 3), dtype=torch.uint8)
    assert torch.equal(preprocess.resize_short_side(frames, 8), frames)


def test_crop_where_told() -> None:
    frames = torch.arange(2 * 5 * 6 * 3).reshape(2, 5, 6, 3)
    assert torch.equal(preprocess.crop(frames, 3, top=2, left=0), frames[:, 2:5, :3])


def test_windows_wrap() -> None:
    assert preprocess.window(length=5, count=4, stride=2, offset=3).tolist() == [3, 0, 2, 4]


def test_every_training_offset_stays_inside_a_long_enough_clip() -> None:
    length, count, stride = 70, 16, 4
    last = preprocess.train_offsets(length, count, stride) - 1
    assert preprocess.window(length, count, stride, last).tolist()[-1] == length - 1
