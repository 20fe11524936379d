"""The authors' data pipeline as plain functions: which frames, which rows, which pixels.

Shape letters: T frames, H, W height and width, C channels.
Source: Scenic's AV-MAE project and the DMVR video reader it builds on, both Apache-2.0; training
draws the offsets at random, tests take the middle. A clip that is too short starts over.
"""

import torch
from torch import Tensor


def train_offsets(length: int, count: int, stride: int) -> int:
    """Number of start offsets training draws from: 0 up to this, exclusive."""
    return max(length - (count - 1) * stride, 1)


def eval_offsets(length: int, count: int, stride: int, clips: int = 1) -> list[int]:
    """Start offsets at test time: the middle, or `clips` from the first to the last possible."""
    last = max(0, length - count * stride)
    if clips == 1:
        return [last // 2]
    return [last * i // (clips - 1) for i in range(clips)]


def window(length: int, count: int, stride: int, offset: int) -> Tensor:
    """Indices `(offset + i stride) mod length` of the `count` frames or rows, int64."""
    return (offset + stride * torch.arange(count)) % length


def segment_indices(length: int, count: int) -> Tensor:
    """`count` indices spread over the whole clip, whatever the stride, int64."""
    step = length // count
    each = torch.arange(count)
    return each * step if step > 0 else each * length // count


def synchronised_offset(offset: int, length: int, other_length: int) -> int:
    """The offset in the spectrogram that is in the same proportion as the one in the video."""
    return round(offset / length * other_length)


def resize_short_side(frames: Tensor, short_side: int) -> Tensor:
    """Bilinear resize to `short_side` with the aspect kept; uint8 [T, H, W, C] both ways.

    The long side is rounded down and so are the pixels, without antialiasing, as released.
    """
    height, width = frames.shape[1:3]
    x = frames.to(torch.float32)
    new_height = max(short_side, height * short_side // width)
    new_width = max(short_side, width * short_side // height)
    return _resize_axis(_resize_axis(x, 2, new_width), 1, new_height).to(torch.uint8)


def _resize_axis(x: Tensor, axis: int, size: int) -> Tensor:
    """Linear interpolation along one axis, samples at the middle of their pixels."""
    old = x.shape[axis]
    at = (torch.arange(size, dtype=torch.float32) + 0.5) * (old / size) - 0.5
    low = at.floor()
    share = (at - low).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    below = x.index_select(axis, low.clamp(min=0).long())
    above = x.index_select(axis, at.ceil().clamp(max=old - 1).long())
    return below + (above - below) * share


def crop(frames: Tensor, size: int, top: int | None = None, left: int | None = None) -> Tensor:
    """A square of `size` pixels out of [T, H, W, C], from the centre unless told where."""
    height, width = frames.shape[1:3]
    top = (height - size) // 2 if top is None else top
    left = (width - size) // 2 if left is None else left
    return frames[:, top : top + size, left : left + size]


def flip(frames: Tensor) -> Tensor:
    """[T, H, W, C] mirrored left to right."""
    return frames.flip(2)


def normalise_frames(frames: Tensor, dtype: torch.dtype, zero_centred: bool = True) -> Tensor:
    """uint8 pixels as `x 2/255 - 1` in [-1, 1], or as `x / 255` in [0, 1], in `dtype`."""
    x = frames.to(dtype)
    return x * (2.0 / 255.0) - 1.0 if zero_centred else x / 255.0


def standardise_spectrogram(
    log_mel: Tensor, mean: float = 0.0, std: float = 1.0, zero_centred: bool = True
) -> Tensor:
    """`(x - mean) / std`; then `(x + 1) / 2` where not zero-centred. Pretraining keeps raw x."""
    x = (log_mel - mean) / std
    return x if zero_centred else (x + 1.0) / 2.0
