"""Mean squared error between predicted and true patches, at the scored tokens only.

Shape letters: B clips, S scored tokens, P values in a patch.
Source: arXiv:2212.05922, section 3.3; target normalisation as in the authors' code, as He et al.,
arXiv:2111.06377, and as Tong et al. (VideoMAE), arXiv:2203.12602.

On a GPU the targets are made in registers; there is no tensor of them.
"""

from typing import Any

import torch
from torch import Tensor

from avmae_kernels._check import wanted
from avmae_kernels._library import define, register_backward
from avmae_kernels.patch_gather import VIEW_SCHEMA
from avmae_kernels.patches import (
    ClipView,
    VideoLayout,
    check_index,
    gather_patches,
    normalise_pixels,
    read_patches,
    refuse_source_gradient,
    view_clips,
)
from avmae_kernels.reconstruction_loss_kernels import (
    COUNT_EPS,
    MAX_VALUES,
    NORMS,
    PER_CHANNEL,
    TARGET_EPS,
    UNBIASED,
    TargetNorm,
    launch_loss,
    launch_scale,
)
from avmae_kernels.yuv import Colour


def target_patches(
    source: Tensor,
    index: Tensor,
    patch: tuple[int, ...],
    norm: TargetNorm,
    dtype: torch.dtype,
    **view: Any,
) -> Tensor:
    """The patches to be predicted, [B, S, P]: pixels in [-1, 1] or log-mel, then normalised.

    `patch` subtracts the mean of the patch and divides by sqrt(biased variance + 1e-6),
    `patch_unbiased` (MAE) by sqrt(unbiased variance + 1e-6). `patch_channel` does as `patch` for
    each colour channel; `videomae` divides each channel by its unbiased standard deviation + 1e-6,
    both of pixels in [0, 1]. These two leave a spectrogram as it is: it has no channels.
    """
    target = normalise_pixels(gather_patches(source, index, patch, **view), dtype)
    mean, spread = target_statistics(target, norm, has_channels=source.ndim != 3)
    return (target - mean) / spread


def target_statistics(
    patches: Tensor, norm: TargetNorm, has_channels: bool
) -> tuple[Tensor, Tensor]:
    """Mean and spread of every value's group, [..., P]: targets are `(patches - mean) / spread`.

    Args:
        patches: pixels in [-1, 1] or log-mel, not normalised, [..., P].
        norm: see `target_patches`.
        has_channels: whether they are patches of video, whose values run through three channels.
    """
    if norm == "none" or (norm in PER_CHANNEL and not has_channels):
        return torch.zeros_like(patches), torch.ones_like(patches)
    groups = patches.unflatten(-1, (-1, 3 if norm in PER_CHANNEL else 1))
    # One value alone has no unbiased variance: it is its own mean, and its target is 0.
    correction = 1 if norm in UNBIASED and groups.shape[-2] > 1 else 0
    variance, mean = torch.var_mean(groups, dim=-2, correction=correction, keepdim=True)
    # Pixels in [0, 1] have half the deviation of these, so twice the epsilon does the same.
    videomae = norm == "videomae"
    spread = variance.sqrt() + 2 * TARGET_EPS if videomae else (variance + TARGET_EPS).sqrt()
    return mean.expand_as(groups).flatten(-2), spread.expand_as(groups).flatten(-2)


def reconstruction_loss_reference(
    pred: Tensor,
    source: Tensor,
    scored: Tensor,
    patch: tuple[int, ...],
    norm: TargetNorm,
    valid: Tensor | None,
    mean_over_patch: bool,
    **view: Any,
) -> Tensor:
    """What `reconstruction_loss` must return, in plain PyTorch; it defines the operation."""
    # fp32 at least: a sum of 1536 squares keeps three digits in bf16.
    wide = torch.promote_types(pred.dtype, torch.float32)
    target = target_patches(source, scored, patch, norm, wide, **view)
    error_BS = (pred.to(wide) - target).square().sum(dim=-1)
    if valid is None:
        count = pred.shape[0] * pred.shape[1] + COUNT_EPS
        total = error_BS.sum() / count
    else:
        weight = valid.to(wide)
        # Not 0 * error: a clip that is left out may hold anything, even NaN.
        error_B = error_BS.sum(dim=1).where(weight != 0, 0.0)
        total = (error_B * weight).sum() / (weight.sum() * pred.shape[1] + COUNT_EPS)
    return total / pred.shape[2] if mean_over_patch else total


def _targets(view: ClipView, scored: Tensor, norm: TargetNorm, dtype: torch.dtype) -> Tensor:
    """`target_patches` with half its passes over memory, and exact sums of uint8."""
    patches = read_patches(view, scored)
    if norm == "none":
        return normalise_pixels(patches, dtype)
    groups = patches.to(dtype).unflatten(-1, (-1, 3 if norm in PER_CHANNEL else 1))
    count = groups.shape[-2]
    if patches.dtype == torch.uint8:
        # Sums of bytes are integers, so n x - sum has no rounding: a flat patch is exactly 0.
        unit = 2.0 / 255.0 / count
        total = groups.sum(-2, keepdim=True)
        groups.mul_(count).sub_(total)
    else:
        unit = 1.0
        groups.sub_(groups.mean(-2, keepdim=True))
    degrees = max(count - 1, 1) if norm in UNBIASED else count
    variance = _sum_of_squares(groups, -2)[..., None, :].mul_(unit * unit / degrees)
    if norm == "videomae":
        return groups.mul_(unit / (variance.sqrt() + 2 * TARGET_EPS)).flatten(-2)
    return groups.mul_(unit / (variance + TARGET_EPS).sqrt()).flatten(-2)


def _sum_of_squares(x: Tensor, dim: int) -> Tensor:
    # A norm makes no tensor of squares, but adds them up one by one: in blocks of 64, so that a
    # sum of thousands keeps the accuracy of PyTorch's own.
    if x.shape[dim] % 64:
        return x.square().sum(dim)
    blocks = x.unflatten(dim, (-1, 64))
    return torch.linalg.vector_norm(blocks, dim=dim).square().sum(dim)


def _meaning(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    pred, *view, scored, norm, valid, mean_over_patch, with_gradient = arguments
    B, S, P = pred.shape
    wide = torch.promote_types(pred.dtype, torch.float32)
    target = _targets(ClipView(*view), scored, norm, wide)
    difference = torch.sub(pred, target, out=target)
    weight = pred.new_ones(B, dtype=wide) if valid is None else valid.to(wide)
    if valid is not None:
        difference.masked_fill_((weight == 0)[:, None, None], 0.0)
    error_B = _sum_of_squares(difference, -1).sum(1)
    count = (weight.sum() * S + COUNT_EPS) * (P if mean_over_patch else 1)
    kept = difference.to(pred.dtype) if with_gradient else pred.new_empty(0)
    return (error_B * weight).sum() / count, kept, 2 * weight / count


def _by_kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    pred, *view, scored, norm, valid, mean_over_patch, with_gradient = arguments
    if norm != "none" and pred.shape[2] > MAX_VALUES:
        want = f"at most {MAX_VALUES} values in a patch for norm {norm!r}"
        raise wanted("reconstruction_loss", want, pred=pred)
    return launch_loss(pred, ClipView(*view), scored, norm, valid, mean_over_patch, with_gradient)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    pred, *_, with_gradient = arguments
    wide = torch.promote_types(pred.dtype, torch.float32)
    loss, factor = pred.new_empty((), dtype=wide), pred.new_empty(pred.shape[0], dtype=wide)
    return loss, pred.new_empty(pred.shape if with_gradient else 0), factor


_LOSS = define(
    f"reconstruction_loss(Tensor pred, {VIEW_SCHEMA}, Tensor scored, str norm, Tensor? valid, "
    "bool mean_over_patch, bool with_gradient) -> (Tensor, Tensor, Tensor)",
    meaning=_meaning,
    kernels=_by_kernel,
    fake=_fake,
)


def _meaning_backward(difference: Tensor, factor: Tensor, grad: Tensor) -> Tensor:
    return (difference * (factor * grad)[:, None, None]).to(difference.dtype)


def _fake_backward(difference: Tensor, factor: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(difference)


_LOSS_BACKWARD = define(
    "reconstruction_loss_backward(Tensor difference, Tensor factor, Tensor grad) -> Tensor",
    meaning=_meaning_backward,
    kernels=launch_scale,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, difference, factor = output
    ctx.mark_non_differentiable(difference, factor)
    ctx.save_for_backward(difference, factor)


def _backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return _LOSS_BACKWARD(*ctx.saved_tensors, grad), *(11 * [None])


register_backward("reconstruction_loss", _backward, _setup_context)


def reconstruction_loss(
    pred: Tensor,
    source: Tensor,
    scored: Tensor,
    patch: tuple[int, ...],
    norm: TargetNorm = "none",
    valid: Tensor | None = None,
    mean_over_patch: bool = True,
    *,
    layout: VideoLayout = "THWC",
    crop: Tensor | None = None,
    size: tuple[int, int] | None = None,
    flip: Tensor | None = None,
    colour: Colour = "bt601",
) -> Tensor:
    """Return `sum(valid * |pred - target|^2) / (count * P)` over the scored tokens; a scalar.

    Args:
        pred: predicted patches, [B, S, P]. Differentiable.
        source: what is predicted: video [B, T, H, W, 3], uint8 or floating in [-1, 1], or
            planes of it [B, T, 3H/2, W] uint8, or a log-mel spectrogram [B, T, F], floating. Gets
            no gradient.
        scored: token number of each prediction, [B, S], int64. Values are not checked.
        patch: (t, h, w) for video, (time, frequency) for a spectrogram.
        norm: how a target patch is normalised, see `target_patches`.
        valid: weight of each clip, [B], 0 leaves it out, or None for all ones. No gradient.
        mean_over_patch: divide by P, as every released configuration does.
        layout, crop, size, flip, colour: what is seen of the source, as in `patch_embed_visible`.

    Returns:
        The loss, fp32 (fp64 for an fp64 `pred`). 0 where nothing is scored.

    Raises:
        ValueError: a shape or dtype does not fit or `norm` is not a name above.
    """
    op = "reconstruction_loss"
    view = view_clips(op, source, patch, layout, crop, size, flip, colour)
    check_index(op, "scored", scored, source)
    refuse_source_gradient(op, source)
    if pred.ndim != 3 or scored.shape != pred.shape[:2]:
        raise wanted(op, "pred [B, S, P], scored [B, S]", pred=pred, scored=scored)
    if pred.shape[2] != view.values:
        raise wanted(op, f"P = {view.values} for patch {patch}", pred=pred, source=source)
    if norm not in NORMS:
        choices = ", ".join(map(repr, NORMS))
        raise ValueError(f"{op} wants norm in {choices}, got {norm!r}")
    if valid is not None and valid.shape != pred.shape[:1]:
        raise wanted(op, "valid [B]", pred=pred, valid=valid)
    if not (source.is_floating_point() or (source.ndim != 3 and source.dtype == torch.uint8)):
        want = "uint8 or floating video or a floating spectrogram"
        raise wanted(op, want, source=source)
    # The authors standardise channels of video alone.
    used = "none" if source.ndim == 3 and norm in PER_CHANNEL else norm
    with_gradient = torch.is_grad_enabled() and pred.requires_grad
    return _LOSS(pred, *view, scored, used, valid, mean_over_patch, with_gradient)[0]
