"""Augmentation: what is drawn, by what it is keyed, and the colour arithmetic."""

import colorsys
from dataclasses import replace

import numpy as np
import pytest
import torch

from avmae_fast.config import VideoConfig
from avmae_fast.finetune_config import RecipeConfig
from avmae_fast.train.augment import (
    _recoloured,
    _stretches,
    augment_pictures,
    augment_sound,
    hsv_to_rgb,
    rgb_to_hsv,
)

PLAIN = RecipeConfig()
SIZE = VideoConfig(frames=2, height=8, width=8, tubelet=(2, 4, 4))
KEYS = np.arange(40, 48)


def _clips(side: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (8, 2, side, side, 3), dtype=torch.uint8, generator=generator)


def test_nothing_asked_for_changes_nothing() -> None:
    video, audio = _clips(8), torch.randn(8, 20, 16)
    assert augment_pictures(video, KEYS, 1, PLAIN, SIZE) is video
    assert augment_sound(audio, KEYS, 1, PLAIN) is audio


def test_a_clip_is_changed_alike_in_any_batch() -> None:
    """Keyed by position: alone, or among others, or in another order."""
    recipe = replace(PLAIN, colour=0.8, greyscale=0.5, scale_jitter=(0.8, 1.4))
    recipe = replace(recipe, frequency_masks=2, frequency_mask_bins=8, time_shift=True)
    video, audio = _clips(), torch.randn(8, 20, 16)
    whole = augment_pictures(video, KEYS, 1, recipe, SIZE)
    assert whole.shape == (8, 2, 8, 8, 3) and whole.dtype == torch.uint8
    heard = augment_sound(audio, KEYS, 1, recipe)
    for i in (5, 0):
        one = slice(i, i + 1)
        assert torch.equal(augment_pictures(video[one], KEYS[one], 1, recipe, SIZE), whole[one])
        assert torch.equal(augment_sound(audio[one], KEYS[one], 1, recipe), heard[one])
    assert not torch.equal(augment_pictures(video, KEYS, 2, recipe, SIZE), whole)
    assert not torch.equal(augment_pictures(video, KEYS + 8, 1, recipe, SIZE), whole)


def test_every_frame_of_a_clip_is_changed_alike() -> None:
    recipe = replace(PLAIN, colour=1.0, scale_jitter=(0.8, 1.4))
    video = _clips()
    video[:, 1] = video[:, 0]
    out = augment_pictures(video, KEYS, 1, recipe, SIZE)
    assert torch.equal(out[:, 0], out[:, 1])


def test_stretching_a_constant_or_a_ramp() -> None:
    """A constant stays; a ramp stays one, with the slope of 1 over the factor."""
    recipe = replace(PLAIN, scale_jitter=(0.8, 1.4))
    assert (augment_pictures(torch.full_like(_clips(), 77), KEYS, 1, recipe, SIZE) == 77).all()
    ramp = torch.arange(0, 240, 20, dtype=torch.uint8)
    video = ramp[None, None, None, :, None].expand(8, 2, 12, 12, 3).contiguous()
    out = augment_pictures(video, KEYS, 1, recipe, SIZE).float()
    slopes = (out[:, :, :, 6] - out[:, :, :, 2]).flatten(1)[:, 0] / 4 / 20
    factors = 1 / slopes
    assert factors.min() > 0.75 and factors.max() < 1.5 and factors.std() > 0.05


def test_hsv_is_that_of_the_standard_library() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 8, 8, generator=generator, dtype=torch.float64)
    x[..., 0] = x[:, :1, :, 0]  # greys
    hue, saturation, value = rgb_to_hsv(x)
    for pixel, *wanted in zip(x[0].flatten(1).T, hue.flatten(), saturation.flatten(),
                              value.flatten(), strict=True):  # fmt: skip
        assert colorsys.rgb_to_hsv(*pixel.tolist()) == pytest.approx([float(w) for w in wanted])
    torch.testing.assert_close(hsv_to_rgb(hue + 3, saturation, value), x)


def test_colour_changes_by_hand() -> None:
    """Draws of 1/2 change nothing; brightness, contrast and hue alone do what they say."""
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64) * 0.6 + 0.2
    torch.testing.assert_close(_recoloured(x, [0.5, 0.5, 0.5, 0.5]), x)
    brighter = _recoloured(x, [1.0, 0.5, 0.5, 0.5])
    torch.testing.assert_close(brighter, x + 32 / 255)
    mean = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(
        _recoloured(x, [0.5, 0.5, 1.0, 0.5]), (mean + 1.4 * (x - mean)).clamp(0, 1)
    )
    turned = rgb_to_hsv(_recoloured(x, [0.5, 0.5, 0.5, 1.0]))[0]
    off = (turned - rgb_to_hsv(x)[0] - 0.2) % 1
    assert torch.minimum(off, 1 - off).max() < 1e-9


def test_greyscale_has_one_colour() -> None:
    out = augment_pictures(_clips(8), KEYS, 1, replace(PLAIN, greyscale=1.0), SIZE)
    assert torch.equal(out[..., 0], out[..., 1]) and torch.equal(out[..., 0], out[..., 2])
    first = _clips(8)[0, 0, 0, 0].double()
    luma = 0.2989 * first[0] + 0.587 * first[1] + 0.114 * first[2]
    assert abs(out[0, 0, 0, 0, 0].item() - luma) <= 0.51


def test_stretches_by_hand() -> None:
    # int(0.99 * 4) = 3 places from int(0.5 * (10 - 3)) = 3 on; none; the last one.
    u = np.array([[[0.99, 0.5]], [[0.1, 0.9]], [[0.3, 0.999]]])
    covered = _stretches(u, 10, 4)
    assert np.flatnonzero(covered[0]).tolist() == [3, 4, 5]
    assert not covered[1].any() and np.flatnonzero(covered[2]).tolist() == [8]


def test_masks_are_shorter_than_their_limit_and_set_to_zero() -> None:
    recipe = replace(PLAIN, frequency_masks=1, frequency_mask_bins=6, time_masks=1)
    audio = torch.ones(500, 30, 16)
    out = augment_sound(audio, np.arange(500), 3, replace(recipe, time_mask_frames=9))
    bins, frames = (out == 0).all(1).sum(1), (out == 0).all(2).sum(1)
    assert sorted(set(bins.tolist())) == list(range(6))
    assert sorted(set(frames.tolist())) == list(range(9))
    assert set(out.unique().tolist()) == {0.0, 1.0}
    # As released, time masks have no effect: presets do not ask for any.
    assert not (augment_sound(audio, np.arange(500), 3, recipe) == 0).all(2).any()


def test_time_shift_turns_round() -> None:
    audio = torch.arange(20.0)[None, :, None].expand(8, 20, 4).contiguous()
    out = augment_sound(audio, KEYS, 1, replace(PLAIN, time_shift=True))
    shifts = out[:, 0, 0].long()
    assert len(set(shifts.tolist())) > 3
    for row, shift in zip(out[..., 0], shifts, strict=True):
        assert torch.equal(row, (torch.arange(20.0) + shift) % 20)
