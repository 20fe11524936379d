"""Gather patches out of uint8 or floating clips, normalised and in the dtype of a matrix product.

Shape letters: B clips, K tokens picked, P values in a patch, R rows (tokens of all clips).
The address arithmetic and the normalisation are shared with the loss, so that the embedding and
the target read the same pixels. Source: see patches.py.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from avmae_kernels._column_sums import PROGRAMS
from avmae_kernels._library import define
from avmae_kernels._resources import CompileCase
from avmae_kernels._tiles import column_block
from avmae_kernels._triton import tl, triton
from avmae_kernels.patches import (
    ClipView,
    VideoLayout,
    check_index,
    normalise_pixels,
    read_patches,
    refuse_source_gradient,
    view_clips,
)
from avmae_kernels.yuv import Colour, coefficients, convert

# Counts and strides that a kernel must not be compiled for anew, and pointers into slices.
COUNTS = ["total", "K", "index_b", "index_k", "rows", "columns", "width", "stride_w", "stride_c"]
SLICES = ["index_ptr", "crop_ptr", "flip_ptr"]
# 16 elements a thread: one 128-bit load of uint8 and two 128-bit stores of bf16. The same on every
# architecture, since the kernel only moves memory.
_ELEMENTS, _WARPS = 2048, 4
# A value of planes takes three addresses: half as many values a thread, and its registers suffice.
_PLANES_ELEMENTS = 1024


@triton.jit
def pixel_offsets(
    clip_R, token_R, live_R, value_P, crop_ptr, flip_ptr,
    stride_b, stride_t, stride_h, stride_w, stride_c, rows, columns, width,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Where value_P of patch token_R of clip_R lies: [R, P] int64, in elements from the clips."""
    site_R = token_R % (rows * columns)
    frame_R = token_R // (rows * columns) * PT
    y_R = site_R // columns * PH
    x_R = site_R % columns * PW
    if crop_ptr is not None:
        y_R += tl.load(crop_ptr + clip_R * 2, mask=live_R, other=0)
    first_R = clip_R * stride_b + frame_R.to(tl.int64) * stride_t + y_R.to(tl.int64) * stride_h
    line_P = value_P // (PW * C)
    step_P = (line_P // PH).to(tl.int64) * stride_t + (line_P % PH).to(tl.int64) * stride_h
    if PACKED:
        # A line of a patch is one run of memory; written so that the compiler sees it.
        if crop_ptr is not None:
            x_R += tl.load(crop_ptr + clip_R * 2 + 1, mask=live_R, other=0)
        return (first_R + x_R * C)[:, None] + (step_P + value_P % (PW * C))[None, :]
    x_RP = x_R[:, None] + (value_P // C % PW)[None, :]
    if flip_ptr is not None:
        mirrored_R = tl.load(flip_ptr + clip_R, mask=live_R, other=0) != 0
        x_RP = tl.where(mirrored_R[:, None], width - 1 - x_RP, x_RP)
    if crop_ptr is not None:
        x_RP += tl.load(crop_ptr + clip_R * 2 + 1, mask=live_R, other=0)[:, None]
    step_P += (value_P % C).to(tl.int64) * stride_c
    return first_R[:, None] + step_P[None, :] + x_RP.to(tl.int64) * stride_w


@triton.jit
def _load_planes(
    clips_ptr, clip_R, token_R, live_R, value_P, crop_ptr, flip_ptr,
    stride_b, stride_t, stride_h, stride_c, rows, columns, width,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, YUV: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """`load_pixels` of planes; the first chroma plane begins stride_c behind the luma."""
    site_R = token_R % (rows * columns)
    frame_RP = (token_R // (rows * columns) * PT)[:, None] + (value_P // (PH * PW * 3))[None, :]
    y_RP = (site_R // columns * PH)[:, None] + (value_P // (PW * 3) % PH)[None, :]
    x_RP = (site_R % columns * PW)[:, None] + (value_P // 3 % PW)[None, :]
    live_RP = live_R[:, None]
    if not EVEN:
        live_RP = live_RP & (value_P < PT * PH * PW * 3)[None, :]
    if flip_ptr is not None:
        mirrored_R = tl.load(flip_ptr + clip_R, mask=live_R, other=0) != 0
        x_RP = tl.where(mirrored_R[:, None], width - 1 - x_RP, x_RP)
    if crop_ptr is not None:
        y_RP += tl.load(crop_ptr + clip_R * 2, mask=live_R, other=0)[:, None]
        x_RP += tl.load(crop_ptr + clip_R * 2 + 1, mask=live_R, other=0)[:, None]
    first_RP = clips_ptr + (clip_R * stride_b)[:, None] + frame_RP.to(tl.int64) * stride_t
    # Inside a frame 32 bits are enough.
    luma_RP = tl.load(first_RP + y_RP * stride_h + x_RP, mask=live_RP, other=0)
    chroma_RP = first_RP + stride_c + (y_RP // 2 * (stride_h // 2) + x_RP // 2)
    u_RP = tl.load(chroma_RP, mask=live_RP, other=0)
    v_RP = tl.load(chroma_RP + stride_c // 4, mask=live_RP, other=0)
    rgb_RP = convert(luma_RP, u_RP, v_RP, (value_P % 3)[None, :], YUV)
    return tl.where(live_RP, rgb_RP, 0)


@triton.jit
def load_pixels(
    clips_ptr, clip_R, token_R, live_R, value_P, crop_ptr, flip_ptr,
    stride_b, stride_t, stride_h, stride_w, stride_c, rows, columns, width,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
    YUV: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Raw values value_P of the patches token_R, [R, P]; 0 in dead rows and past the patch's end.

    EVEN: no value_P is past the end. YUV: `yuv.coefficients` of planes; None for any other clips.
    """
    if YUV is not None:
        return _load_planes(
            clips_ptr, clip_R, token_R, live_R, value_P, crop_ptr, flip_ptr,
            stride_b, stride_t, stride_h, stride_c, rows, columns, width,
            PT, PH, PW, YUV, EVEN,
        )  # fmt: skip
    offset_RP = pixel_offsets(
        clip_R, token_R, live_R, value_P, crop_ptr, flip_ptr,
        stride_b, stride_t, stride_h, stride_w, stride_c, rows, columns, width,
        PT, PH, PW, C, PACKED,
    )  # fmt: skip
    live_RP = live_R[:, None]
    if not EVEN:
        live_RP = live_RP & (value_P < PT * PH * PW * C)[None, :]
    return tl.load(clips_ptr + offset_RP, mask=live_RP, other=0)


@triton.jit
def normalised(x):
    """fp32 values as the network sees them: uint8 in [-1, 1], see `normalise_pixels`."""
    if x.dtype == tl.uint8:
        return (x.to(tl.float32) - 127.5) * (2.0 / 255.0)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=SLICES)
def _gather_kernel(
    clips_ptr,  # uint8 or floating, strides below
    index_ptr,  # [B, K] int64
    crop_ptr,  # [B, 2] int32 or None
    flip_ptr,  # [B] uint8 or None
    out_ptr,  # [B * K, P]
    total, K, index_b, index_k,
    stride_b, stride_t, stride_h, stride_w, stride_c, rows, columns, width,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
    YUV: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program writes BLOCK values of ROWS patches.
    P: tl.constexpr = PT * PH * PW * C
    EVEN: tl.constexpr = P % BLOCK == 0
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live_R = row_R < total
    clip_R = (row_R // K).to(tl.int64)
    token_R = tl.load(index_ptr + clip_R * index_b + row_R % K * index_k, mask=live_R, other=0)
    value_P = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_RP = load_pixels(
        clips_ptr, clip_R, token_R.to(tl.int32), live_R, value_P, crop_ptr, flip_ptr,
        stride_b, stride_t, stride_h, stride_w, stride_c, rows, columns, width,
        PT, PH, PW, C, PACKED, YUV, EVEN,
    )  # fmt: skip
    live_RP = live_R[:, None]
    if not EVEN:
        live_RP = live_RP & (value_P < P)[None, :]
    out_RP = out_ptr + row_R.to(tl.int64)[:, None] * P + value_P[None, :]
    tl.store(out_RP, normalised(x_RP).to(out_ptr.dtype.element_ty), mask=live_RP)


def pixel_arguments(view: ClipView) -> dict[str, Any]:
    """Arguments, by name, of every kernel that calls `pixel_offsets`."""
    clips, (pt, ph, pw), (height, width), crop, flip, pixels = view
    channels = view.channels
    if pixels == "rgb":
        strides = dict(zip("bthwc", clips.stride(), strict=True))
        packed = strides["w"] == channels and (channels == 1 or strides["c"] == 1)
    else:
        # From one channel to the next: a plane of luma.
        plane = clips.shape[2] // 3 * 2 * clips.shape[3]
        strides = dict(zip("bthwc", (*clips.stride(), plane), strict=True))
        packed = False
    return {
        "clips_ptr": clips,
        "crop_ptr": crop,
        "flip_ptr": None if flip is None else flip.view(torch.uint8),
        **{f"stride_{axis}": stride for axis, stride in strides.items()},
        "rows": height // ph,
        "columns": width // pw,
        "width": width,
        "PT": pt,
        "PH": ph,
        "PW": pw,
        "C": channels,
        "PACKED": packed and flip is None,
        "YUV": None if pixels == "rgb" else coefficients(pixels),
    }


def launch_gather(view: ClipView, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The patches by the kernel: [B, K, P]."""
    B, K = index.shape
    values = view.values
    out = index.new_empty(B, K, values, dtype=dtype)
    if out.numel() == 0:
        return out
    tile = pixel_tile(values, view.pixels != "rgb")
    grid = (triton.cdiv(B * K, tile["ROWS"]), triton.cdiv(values, tile["BLOCK"]))
    _gather_kernel[grid](
        index_ptr=index,
        out_ptr=out,
        total=B * K,
        K=K,
        index_b=index.stride(0),
        index_k=index.stride(1),
        **pixel_arguments(view),
        **tile,
        num_warps=_WARPS,
    )
    return out


def pixel_tile(values: int, planes: bool) -> dict[str, int]:
    """Patches and values of each that a program of `_WARPS` warps reads at once."""
    block = column_block(values, 512)
    return {"ROWS": (_PLANES_ELEMENTS if planes else _ELEMENTS) // block, "BLOCK": block}


def _meaning(*arguments: Any) -> Tensor:
    *view, index, dtype = arguments
    return normalise_pixels(read_patches(ClipView(*view), index), dtype)


def _by_kernel(*arguments: Any) -> Tensor:
    *view, index, dtype = arguments
    # Uint8 clips may be asked for in fp64, which the kernel does not compute in.
    if dtype == torch.float64:
        return _meaning(*arguments)
    return launch_gather(ClipView(*view), index, dtype)


def _fake(*arguments: Any) -> Tensor:
    *view, index, dtype = arguments
    return index.new_empty(*index.shape, ClipView(*view).values, dtype=dtype)


# A `ClipView` in torch's schema language; every operation that reads patches starts with it.
VIEW_SCHEMA = "Tensor clips, int[] patch, int[] size, Tensor? crop, Tensor? flip, str pixels"
_GATHER = define(
    f"gather_patches_normalised({VIEW_SCHEMA}, Tensor index, ScalarType dtype) -> Tensor",
    meaning=_meaning,
    kernels=_by_kernel,
    fake=_fake,
)


def gather_patches_normalised(
    source: Tensor,
    index: Tensor,
    patch: tuple[int, ...],
    dtype: torch.dtype,
    *,
    layout: VideoLayout = "THWC",
    crop: Tensor | None = None,
    size: tuple[int, int] | None = None,
    flip: Tensor | None = None,
    colour: Colour = "bt601",
) -> Tensor:
    """Return the patches `index[b]` of every clip as the network sees them: [B, K, P], `dtype`.

    Uint8 pixels become `x * 2/255 - 1`, floating values stay; computed in fp32 (fp64 for an fp64
    result) and rounded once. No gradient. Arguments and errors as `gather_patches`; on a GPU the
    source is uint8, fp32, bf16 or fp16 and any strides will do, though packed pixels
    (`[B, T, H, W, 3]` contiguous) without a crop and a flip are read 16 at a time.

    Raises:
        ValueError: as `gather_patches`, or the source requires a gradient.
    """
    op = "gather_patches_normalised"
    view = view_clips(op, source, patch, layout, crop, size, flip, colour)
    check_index(op, "index", index, source)
    refuse_source_gradient(op, source)
    return _GATHER(*view, index, dtype)


# The patches of the released models and their sources: tubelets of uint8 video, as pixels or as
# planes, and squares of log-mel.
SHIPPED_PATCHES = {
    "video": {"PT": 2, "PH": 16, "PW": 16, "C": 3},
    "planes": {"PT": 2, "PH": 16, "PW": 16, "C": 3},
    "spectrogram": {"PT": 1, "PH": 16, "PW": 16, "C": 1},
}


def pixel_case(kind: str, moved: bool = False) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Signature, constexprs and aligned arguments of `pixel_offsets` for a compile case.

    moved: with a crop and a flip, hence read a byte at a time.
    """
    types = {"video": "*u8", "planes": "*u8", "spectrogram": "*fp32"}
    signature = {"clips_ptr": types[kind], "index_ptr": "*i64", **dict.fromkeys(COUNTS, "i32")}
    signature |= dict.fromkeys(("stride_b", "stride_t", "stride_h"), "i32")
    planes = kind == "planes"
    constants: dict[str, Any] = {
        **SHIPPED_PATCHES[kind],
        "PACKED": not moved and not planes,
        "YUV": coefficients("bt601") if planes else None,
    }
    aligned = ["clips_ptr", "stride_b", "stride_t", "stride_h"]
    if moved:
        signature |= {"crop_ptr": "*i32", "flip_ptr": "*u8"}
    else:
        constants |= {"crop_ptr": None, "flip_ptr": None}
    return signature, constants, aligned


def reads_wide(kind: str, moved: bool) -> bool:
    """Whether a case reads 128 bits at once.

    Mirrored pixels lie backwards in memory. Of planes the values of a patch vector, which are red,
    green and blue in turn, need the same byte of luma three times and one of chroma twelve times:
    they are read a byte at a time too, out of the cache.
    """
    return not moved and kind != "planes"


def compile_cases() -> list[CompileCase]:
    """The shipped configurations of the gather."""
    cases = []
    for arch, kind, out, moved in itertools.product(
        PROGRAMS, SHIPPED_PATCHES, ("bf16", "fp32"), (False, True)
    ):
        if moved and kind == "spectrogram":
            continue
        signature, constants, aligned = pixel_case(kind, moved)
        values = math.prod(SHIPPED_PATCHES[kind].values())
        cases.append(
            CompileCase(
                op="gather_patches_normalised",
                config=f"{kind} {out}{' crop flip' if moved else ''}",
                kernel=_gather_kernel,
                arch=arch,
                signature=signature | {"out_ptr": f"*{out}"},
                constexprs=constants | pixel_tile(values, kind == "planes"),
                aligned=(*aligned, "out_ptr"),
                num_warps=_WARPS,
                wide_loads=reads_wide(kind, moved),
                min_blocks={"planes": 8}.get(kind, 6 if moved else 12),
            )
        )
    return cases
