"""Embed the visible patches of a clip, and only those.

Shape letters: B clips, N tokens of the grid, K visible tokens, P values in a patch, D channels,
R rows (tokens of all clips).
Source: arXiv:2212.05922, section 3.1; the embedding is a convolution whose stride is its kernel,
that is, a matrix product of flattened patches.

On a GPU a kernel gathers and normalises the patches, cuBLAS multiplies and a kernel adds bias and
position. The backward pass gathers once more instead of keeping the patches.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from avmae_kernels._check import wanted
from avmae_kernels._column_sums import PROGRAMS
from avmae_kernels._library import define, register_backward
from avmae_kernels._resources import CompileCase
from avmae_kernels._tiles import column_block
from avmae_kernels._triton import tl, triton
from avmae_kernels.patch_gather import VIEW_SCHEMA, launch_gather
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
from avmae_kernels.row_sums import sum_by_position, sum_rows
from avmae_kernels.yuv import Colour

_ELEMENTS, _WARPS = 2048, 4


def patch_embed_visible_reference(
    source: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    patch: tuple[int, ...],
    **view: Any,
) -> Tensor:
    """What `patch_embed_visible` must return, in plain PyTorch; it defines the operation."""
    patches = normalise_pixels(gather_patches(source, visible, patch, **view), weight.dtype)
    return F.linear(patches, weight, bias) + pos[visible]


@triton.jit(
    do_not_specialize=["total", "K", "index_b", "index_k"],
    do_not_specialize_on_alignment=["index_ptr"],
)
def _add_position_kernel(
    product_ptr,  # [R, D]
    bias_ptr,  # [D]
    pos_ptr,  # [N, D]
    index_ptr,  # [B, K] int64
    out_ptr,  # [R, D]
    total, K, index_b, index_k,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program writes BLOCK channels of ROWS tokens, summed in fp32 and rounded once.
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live_R = row_R < total
    live_RD = live_R[:, None]
    if D % BLOCK != 0:
        live_RD = live_RD & (d < D)[None, :]
    clip_R = (row_R // K).to(tl.int64)
    place_R = tl.load(index_ptr + clip_R * index_b + row_R % K * index_k, mask=live_R, other=0)
    offset_RD = row_R.to(tl.int64)[:, None] * D + d[None, :]
    sum_RD = tl.load(product_ptr + offset_RD, mask=live_RD, other=0.0).to(tl.float32)
    sum_RD += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    pos_RD = pos_ptr + place_R[:, None] * D + d[None, :]
    sum_RD += tl.load(pos_RD, mask=live_RD, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset_RD, sum_RD.to(out_ptr.dtype.element_ty), mask=live_RD)


def _meaning(*arguments: Any) -> Tensor:
    *view, visible, weight, bias, pos, dtype = arguments
    patches = normalise_pixels(read_patches(ClipView(*view), visible), dtype)
    product = F.linear(patches, weight.to(dtype), bias.to(dtype))
    placed = F.embedding(visible, pos)
    out_dtype = torch.promote_types(dtype, pos.dtype)
    if out_dtype == dtype:
        return product.add_(placed)
    return placed.to(out_dtype).add_(product)


def _by_kernel(*arguments: Any) -> Tensor:
    *view, visible, weight, bias, pos, dtype = arguments
    (B, K), D = visible.shape, weight.shape[0]
    patches = launch_gather(ClipView(*view), visible, dtype)
    product = patches.flatten(0, 1) @ weight.to(dtype).t()
    out = product.new_empty(B, K, D, dtype=torch.promote_types(dtype, pos.dtype))
    if out.numel() == 0:
        return out
    tile = _tile(D)
    grid = (triton.cdiv(B * K, tile["ROWS"]), triton.cdiv(D, tile["BLOCK"]))
    _add_position_kernel[grid](
        product, bias, pos, visible, out, B * K, K, *visible.stride(), D, **tile, num_warps=_WARPS
    )
    return out


def _tile(channels: int) -> dict[str, int]:
    block = column_block(channels, 256)
    return {"ROWS": _ELEMENTS // block, "BLOCK": block}


def _fake(*arguments: Any) -> Tensor:
    *_, visible, weight, _, pos, dtype = arguments
    out_dtype = torch.promote_types(dtype, pos.dtype)
    return visible.new_empty(*visible.shape, weight.shape[0], dtype=out_dtype)


_EMBED = define(
    f"patch_embed_visible({VIEW_SCHEMA}, Tensor visible, Tensor weight, Tensor bias, Tensor pos, "
    "ScalarType dtype) -> Tensor",
    meaning=_meaning,
    kernels=_by_kernel,
    fake=_fake,
)


def _meaning_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, *view, visible, dtype, positions = arguments
    wide = torch.promote_types(grad.dtype, torch.float32)
    patches = normalise_pixels(read_patches(ClipView(*view), visible), dtype)
    grad = grad.flatten(0, 1)
    weight = (grad.to(dtype).t() @ patches.flatten(0, 1)).to(wide)
    pos = grad.new_zeros(positions, grad.shape[1], dtype=wide)
    if positions:
        pos.index_add_(0, visible.flatten(), grad.to(wide))
    return weight, grad.sum(0, dtype=wide), pos


def _backward_by_kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, *view, visible, dtype, positions = arguments
    (_, K), D = visible.shape, grad.shape[-1]
    patches = launch_gather(ClipView(*view), visible, dtype)
    weight = (grad.flatten(0, 1).to(dtype).t() @ patches.flatten(0, 1)).float()
    if not positions:
        return weight, sum_rows(grad, K), weight.new_empty(0, D)
    line = torch.arange(K, device=visible.device)[None, :]
    return weight, sum_rows(grad, K), sum_by_position(grad, visible, line, positions)


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, *view, _, _, positions = arguments
    D = grad.shape[-1]
    wide = torch.promote_types(grad.dtype, torch.float32)
    shapes = (D, ClipView(*view).values), (D,), (positions, D)
    weight, bias, pos = (grad.new_empty(shape, dtype=wide) for shape in shapes)
    return weight, bias, pos


_EMBED_BACKWARD = define(
    f"patch_embed_visible_backward(Tensor grad, {VIEW_SCHEMA}, Tensor visible, ScalarType dtype, "
    "int positions) -> (Tensor, Tensor, Tensor)",
    meaning=_meaning_backward,
    kernels=_backward_by_kernel,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    clips, ctx.patch, ctx.size, crop, flip, ctx.pixels, visible, *rest = inputs
    weight, bias, pos, ctx.dtype = rest
    # The patches are gathered again: the clips are there anyway, for the loss.
    ctx.save_for_backward(clips, crop, flip, visible)
    ctx.dtypes = weight.dtype, bias.dtype, pos.dtype
    ctx.positions = pos.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    clips, crop, flip, visible = ctx.saved_tensors
    view = clips, ctx.patch, ctx.size, crop, flip, ctx.pixels
    positions = ctx.positions if ctx.needs_input_grad[9] else 0
    grads = _EMBED_BACKWARD(grad, *view, visible, ctx.dtype, positions)
    weight, bias, pos = (g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
    return *(7 * [None]), weight, bias, pos if positions else None, None


register_backward("patch_embed_visible", _backward, _setup_context)


def patch_embed_visible(
    source: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    patch: tuple[int, ...],
    *,
    layout: VideoLayout = "THWC",
    crop: Tensor | None = None,
    size: tuple[int, int] | None = None,
    flip: Tensor | None = None,
    colour: Colour = "bt601",
) -> Tensor:
    """Return `normalised patch @ weight.T + bias + pos` for the visible tokens of every clip.

    Args:
        source: video [B, T, H, W, 3], uint8 (taken to [-1, 1] inside) or floating (taken as it
            is), or planes of it [B, T, 3H/2, W] uint8, or a log-mel spectrogram [B, T, F],
            floating. Gets no gradient.
        visible: token numbers, [B, K], int64, in [0, N), no token twice in a clip. Values are not
            checked.
        weight: [D, P], rows in the order of a patch vector. Differentiable.
        bias: [D]. Differentiable.
        pos: position (plus modality) of each token, [N, D]. Differentiable where it is learned.
        patch: (t, h, w) for video, (time, frequency) for a spectrogram.
        layout: `THWC`, or `CTHW` for video [B, 3, T, H, W], or `I420` for planes, which are
            converted inside (see `avmae_kernels.yuv`); a patch vector is the same.
        crop: top and left pixel of the part of each clip that is seen, [B, 2], int32, with its
            `size`. It must lie inside the clip, which is not checked.
        size: height and width of that part.
        flip: clips that are seen mirrored left to right, after the crop, [B], bool.
        colour: colour space of planes.

    Returns:
        Tokens [B, K, D]; the product in `weight`'s dtype (or autocast's), the sum in the wider of
        that and `pos`'s dtype.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    op = "patch_embed_visible"
    view = view_clips(op, source, patch, layout, crop, size, flip, colour)
    check_index(op, "visible", visible, source)
    refuse_source_gradient(op, source)
    D, P = weight.shape if weight.ndim == 2 else (-1, -1)
    if bias.shape != (D,) or pos.ndim != 2 or pos.shape[1] != D:
        want = "weight [D, P], bias [D], pos [N, D]"
        raise wanted(op, want, weight=weight, bias=bias, pos=pos)
    if view.values != P:
        want = f"P = {view.values} columns of weight for patch {patch}"
        raise wanted(op, want, source=source, weight=weight)
    if not (source.is_floating_point() or (source.ndim != 3 and source.dtype == torch.uint8)):
        want = "uint8 or floating video or a floating spectrogram"
        raise wanted(op, want, source=source)
    if not (bias.is_contiguous() and pos.is_contiguous()):
        raise wanted(op, "bias and pos contiguous", bias=bias, pos=pos)
    return _EMBED(*view, visible, weight, bias, pos, _product_dtype(weight))


def _product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that autocast, where it is on, multiplies in; it leaves fp64 alone."""
    kind = weight.device.type
    if weight.dtype == torch.float64 or weight.is_meta:
        return weight.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def compile_cases() -> list[CompileCase]:
    """The shipped configurations of the sum of product, bias and position."""
    return [
        CompileCase(
            op="patch_embed_visible",
            config=f"D{D} {product}",
            kernel=_add_position_kernel,
            arch=arch,
            signature={
                "product_ptr": f"*{product}",
                "bias_ptr": "*fp32",
                "pos_ptr": "*fp32",
                "index_ptr": "*i64",
                "out_ptr": "*fp32",
                **dict.fromkeys(("total", "K", "index_b", "index_k"), "i32"),
            },
            constexprs={"D": D, **_tile(D)},
            aligned=("product_ptr", "bias_ptr", "pos_ptr", "out_ptr"),
            num_warps=_WARPS,
            min_blocks=8,
        )
        for arch, D, product in itertools.product(PROGRAMS, (192, 384, 768), ("bf16", "fp32"))
    ]
