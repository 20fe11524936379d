"""Where a training sample is cut out of a clip: in time, in the sound, in the picture.

Time is counted in ticks of `data.fps`, whatever the native rate of a file: tick k of a clip is
k / fps seconds after its start, and a clip has as many ticks as fit. The rules are those of the
authors' loader; every draw u is uniform in [0, 1) and comes from the sample's key.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from avmae_fast.data.clip import AUDIO_RATE_HZ

ClipEnd = Literal["wrap", "pad"]

# Lengths in headers are rounded: a tick that is due this much after the end still counts.
_ROUNDING_TICKS = 1e-3

_HOP_SAMPLES = 160  # 10 ms
_WINDOW_SAMPLES = 400  # 25 ms


def ticks_in(duration_s: float, fps: float) -> int:
    """How many ticks a clip of `duration_s` has; at least one."""
    return max(1, math.floor(duration_s * fps + _ROUNDING_TICKS))


def waveform_samples(audio_frames: int) -> int:
    """16 kHz samples that make exactly `audio_frames` spectrogram rows (25 ms every 10 ms)."""
    return (audio_frames - 1) * _HOP_SAMPLES + _WINDOW_SAMPLES


def random_start(u: float, ticks: int, frames: int, stride: int) -> int:
    """First tick of a training window: uniform over the starts at which the window fits.

    Where none fits it is 0 and the window runs past the end.
    """
    starts = max(ticks - (frames - 1) * stride, 1)
    return min(int(u * starts), starts - 1)


def centred_start(ticks: int, frames: int, stride: int) -> int:
    """First tick of the validation window."""
    return max(0, (ticks - frames * stride) // 2)


def window_ticks(
    start: int, ticks: int, frames: int, stride: int, clip_end: ClipEnd
) -> NDArray[np.int64]:
    """The ticks of a window, [frames]. Past the end: from the start again, or the last one."""
    wanted = start + stride * np.arange(frames, dtype=np.int64)
    return wanted % ticks if clip_end == "wrap" else np.minimum(wanted, ticks - 1)


def sound_start(start: int, fps: float) -> int:
    """The sample at which the sound of a window starts: the same moment as its first picture."""
    return round(start / fps * AUDIO_RATE_HZ)


def centred_sound_start(length: int, samples: int) -> int:
    """First sample of the validation window, in a clip of `length` samples."""
    return max(0, (length - samples) // 2)


@dataclass(frozen=True)
class Span:
    """`count` samples from number `source` of the clip go to number `target` of the window."""

    source: int
    target: int
    count: int


def sound_spans(start: int, samples: int, length: int, clip_end: ClipEnd) -> Iterator[Span]:
    """How a window of sound is pieced together from a clip of `length` samples.

    A window past the end goes on at the clip's start (`wrap`) or is silent there (`pad`).
    """
    target = 0
    while target < samples:
        count = min(length - start, samples - target)
        yield Span(start, target, count)
        if clip_end == "pad":
            return
        target, start = target + count, 0


def crop_corner(
    picture: tuple[int, ...],
    size: tuple[int, int],
    u_top: float | None = None,
    u_left: float | None = None,
) -> tuple[int, int]:
    """Top and left of a crop (h, w): uniform by u_top and u_left, centred without them.

    Args:
        picture: shape of what is cropped, [H, W, 3], or [3H/2, W] of planes. In planes two lines
            and two columns share their chroma, so corners are even: uniform over those.
    """
    step = 1 if len(picture) == 3 else 2
    height = picture[0] if len(picture) == 3 else picture[0] // 3 * 2
    room_y, room_x = (height - size[0]) // step, (picture[1] - size[1]) // step
    top = room_y // 2 if u_top is None else int(u_top * (room_y + 1))
    left = room_x // 2 if u_left is None else int(u_left * (room_x + 1))
    return top * step, left * step
