"""What pixels mean to a model, folded into its patch embedding.

Models of others see `(p - mean) / std` for each colour channel, p in [0, 1]; ours see 2 p - 1.
Patch convolutions have no padding, so an affine map of the input is one of weights and bias,
exactly; it is computed in float64 and rounded once.
"""

import torch
from torch import Tensor

from avmae_fast.interop.entries import ConvertError

Triple = tuple[float, float, float]

# Mean and standard deviation of red, green and blue.
PIXELS: dict[str, tuple[Triple, Triple]] = {
    "signed": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # ours: nothing to fold
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "kinetics": ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225)),  # of MAE-ST
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def fold_pixels(weight: Tensor, bias: Tensor, pixels: str) -> tuple[Tensor, Tensor]:
    """Weight [D, P] and bias [D] that do to pixels in [-1, 1] what the given ones do to theirs.

    Differentiable. P runs (time, height, width, channel).

    Raises:
        ConvertError: `pixels` is not a name in `PIXELS`.
    """
    scale, offset = _affine(pixels)
    wide = weight.double().unflatten(1, (-1, 3))
    folded = bias.double() + (wide * offset).sum((1, 2))
    return (wide * scale).flatten(1).to(weight.dtype), folded.to(bias.dtype)


def unfold_pixels(weight: Tensor, bias: Tensor, pixels: str) -> tuple[Tensor, Tensor]:
    """Undo `fold_pixels`, up to one rounding."""
    scale, offset = _affine(pixels)
    wide = weight.double().unflatten(1, (-1, 3)) / scale
    unfolded = bias.double() - (wide * offset).sum((1, 2))
    return wide.flatten(1).to(weight.dtype), unfolded.to(bias.dtype)


def _affine(pixels: str) -> tuple[Tensor, Tensor]:
    """Their pixel is `ours * scale + offset`."""
    if pixels not in PIXELS:
        valid = ", ".join(map(repr, PIXELS))
        raise ConvertError(f"pixels = {pixels!r} is not valid: it must be one of {valid}")
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in PIXELS[pixels])
    return 0.5 / std, (0.5 - mean) / std
