"""Build the decoder's sequence: encoded tokens, then mask tokens, each with its position.

Shape letters: B clips, V encoded tokens, M mask tokens, D channels, N positions of a table, R rows
(tokens of all sequences).
Source: arXiv:2212.05922, section 3.2. Attention does not see the order of its keys, so encoded
and mask tokens stay grouped: the mask tokens, which the loss looks at, are the tail of a sequence.
MAE's own order, every token at its place in the grid, is there for comparison and for transfer.
"""

import itertools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from avmae_kernels._check import wanted
from avmae_kernels._column_sums import PROGRAMS
from avmae_kernels._library import define, register_backward
from avmae_kernels._resources import CompileCase
from avmae_kernels._tiles import column_block
from avmae_kernels._triton import tl, triton
from avmae_kernels.patches import check_index
from avmae_kernels.row_sums import sum_by_position, sum_rows

Order = Literal["grouped", "grid"]
_ELEMENTS, _WARPS = 2048, 4


def assemble_decoder_reference(
    tokens: Tensor,
    token_index: Tensor,
    token_pos: Tensor,
    mask_token: Tensor,
    mask_index: Tensor,
    mask_pos: Tensor,
    order: Order = "grouped",
) -> Tensor:
    """What `assemble_decoder` must return, in plain PyTorch; it defines the operation."""
    encoded = tokens + token_pos[token_index]
    masked = mask_token + mask_pos[mask_index]
    grouped = torch.cat([encoded, masked.to(encoded.dtype)], dim=1)
    if order == "grouped":
        return grouped
    place = torch.cat([token_index, mask_index], dim=1)
    return grouped.gather(1, place.argsort(dim=1)[..., None].expand_as(grouped))


@triton.jit
def _place_rows(
    program, x_ptr, index_ptr, pos_ptr, out_ptr,
    first, count, clips, length, x_b, x_k, x_d, index_b, index_k,
    D: tl.constexpr, GRID: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write BLOCK channels of ROWS of the `count` tokens of each clip, in rows `first` and on."""
    row_R = program * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live_R = row_R < clips * count
    live_RD = live_R[:, None]
    if D % BLOCK != 0:
        live_RD = live_RD & (d < D)[None, :]
    clip_R, own_R = (row_R // count).to(tl.int64), (row_R % count).to(tl.int64)
    place_R = tl.load(index_ptr + clip_R * index_b + own_R * index_k, mask=live_R, other=0)
    x_RD = x_ptr + (clip_R * x_b + own_R * x_k)[:, None] + (d.to(tl.int64) * x_d)[None, :]
    pos_RD = pos_ptr + place_R[:, None] * D + d[None, :]
    # Summed in fp32 and rounded once.
    sum_RD = tl.load(x_RD, mask=live_RD, other=0.0).to(tl.float32)
    sum_RD += tl.load(pos_RD, mask=live_RD, other=0.0).to(tl.float32)
    if GRID:
        row_R = clip_R * length + place_R
    else:
        row_R = clip_R * length + first + own_R
    out_RD = out_ptr + row_R[:, None] * D + d[None, :]
    tl.store(out_RD, sum_RD.to(out_ptr.dtype.element_ty), mask=live_RD)


@triton.jit(
    do_not_specialize=["B", "V", "M", "token_b", "token_k", "mask_b", "mask_k"],
    do_not_specialize_on_alignment=["token_index_ptr", "mask_index_ptr"],
)
def _assemble_kernel(
    tokens_ptr,  # [B, V, D], strides below
    token_index_ptr,  # [B, V] int64
    token_pos_ptr,  # [N, D]
    mask_token_ptr,  # [D]
    mask_index_ptr,  # [B, M] int64
    mask_pos_ptr,  # [N, D]
    out_ptr,  # [B, V + M, D]
    B, V, M, tokens_b, tokens_v, tokens_d, token_b, token_k, mask_b, mask_k,
    D: tl.constexpr, GRID: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The first programs write the encoded tokens of all clips, the others the mask tokens.
    program = tl.program_id(0)
    shown = tl.cdiv(B * V, ROWS)
    if program < shown:
        _place_rows(
            program, tokens_ptr, token_index_ptr, token_pos_ptr, out_ptr,
            0, V, B, V + M, tokens_b, tokens_v, tokens_d, token_b, token_k, D, GRID, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _place_rows(
            program - shown, mask_token_ptr, mask_index_ptr, mask_pos_ptr, out_ptr,
            V, M, B, V + M, 0, 0, 1, mask_b, mask_k, D, GRID, ROWS, BLOCK,
        )  # fmt: skip


def _tile(channels: int) -> dict[str, int]:
    block = column_block(channels, 256)
    return {"ROWS": _ELEMENTS // block, "BLOCK": block}


def _meaning(*arguments: Any) -> Tensor:
    tokens, token_index, token_pos, mask_token, mask_index, mask_pos, in_grid = arguments
    out = _fake(*arguments)
    # In grid order the two parts are put together first and moved to their places afterwards.
    grouped = torch.empty_like(out) if in_grid else out
    encoded, masked = grouped.split([token_index.shape[1], mask_index.shape[1]], dim=1)
    torch.add(tokens, F.embedding(token_index, token_pos), out=encoded)
    torch.add(mask_token, F.embedding(mask_index, mask_pos), out=masked)
    if in_grid:
        rows = _row_numbers(torch.cat([token_index, mask_index], dim=1), out.shape[1])
        out.flatten(0, 1).index_copy_(0, rows, grouped.flatten(0, 1))
    return out


def _row_numbers(index: Tensor, length: int) -> Tensor:
    """Rows of a flattened [B, length, D] at which each clip has its positions `index` [B, K]."""
    clip = torch.arange(index.shape[0], device=index.device)[:, None]
    return (clip * length + index).flatten()


def _by_kernel(*arguments: Any) -> Tensor:
    tokens, token_index, token_pos, mask_token, mask_index, mask_pos, in_grid = arguments
    out = _fake(*arguments)
    if out.numel() == 0:
        return out
    B, _, D = out.shape
    V, M = token_index.shape[1], mask_index.shape[1]
    tile = _tile(D)
    programs = triton.cdiv(B * V, tile["ROWS"]) + triton.cdiv(B * M, tile["ROWS"])
    grid = (programs, triton.cdiv(D, tile["BLOCK"]))
    _assemble_kernel[grid](
        tokens,
        token_index,
        token_pos,
        mask_token,
        mask_index,
        mask_pos,
        out,
        B,
        V,
        M,
        *tokens.stride(),
        *token_index.stride(),
        *mask_index.stride(),
        D=D,
        GRID=in_grid,
        **tile,
        num_warps=_WARPS,
    )
    return out


def _fake(*arguments: Any) -> Tensor:
    tokens, token_index, token_pos, _, mask_index, *_ = arguments
    B, _, D = tokens.shape
    dtype = torch.promote_types(tokens.dtype, token_pos.dtype)
    return tokens.new_empty(B, token_index.shape[1] + mask_index.shape[1], D, dtype=dtype)


_ASSEMBLE = define(
    "assemble_decoder(Tensor tokens, Tensor token_index, Tensor token_pos, Tensor mask_token, "
    "Tensor mask_index, Tensor mask_pos, bool in_grid) -> Tensor",
    meaning=_meaning,
    kernels=_by_kernel,
    fake=_fake,
)


def _meaning_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, token_index, mask_index, in_grid, token_rows, mask_rows = arguments
    if in_grid:
        shown, masked = _take(grad, token_index), _take(grad, mask_index)
    else:
        shown, masked = grad.split([token_index.shape[1], mask_index.shape[1]], dim=1)
    wide = torch.promote_types(grad.dtype, torch.float32)
    tables = []
    for index, rows, part in ((token_index, token_rows, shown), (mask_index, mask_rows, masked)):
        table = grad.new_zeros(rows, grad.shape[-1], dtype=wide)
        if rows:
            table.index_add_(0, index.flatten(), part.flatten(0, 1).to(wide))
        tables.append(table)
    return masked.sum((0, 1), dtype=wide), tables[0], tables[1]


def _take(grad: Tensor, index: Tensor) -> Tensor:
    """`grad[b, index[b]]`: [B, K, D]."""
    rows = grad.flatten(0, 1).index_select(0, _row_numbers(index, grad.shape[1]))
    return rows.unflatten(0, index.shape)


def _backward_by_kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, token_index, mask_index, in_grid, token_rows, mask_rows = arguments
    V, M = token_index.shape[1], mask_index.shape[1]
    if in_grid:
        mask_token = sum_rows(grad, M, index=mask_index)
    else:
        mask_token = sum_rows(grad, M, first=V)
    tables = []
    for index, rows, first in ((token_index, token_rows, 0), (mask_index, mask_rows, V)):
        if not rows:
            tables.append(mask_token.new_empty(0, grad.shape[-1]))
            continue
        line = index
        if not in_grid:
            line = torch.arange(first, first + index.shape[1], device=index.device)[None, :]
        tables.append(sum_by_position(grad, index, line, rows))
    return mask_token, tables[0], tables[1]


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, _, _, _, token_rows, mask_rows = arguments
    D, wide = grad.shape[-1], torch.promote_types(grad.dtype, torch.float32)
    shapes = (D,), (token_rows, D), (mask_rows, D)
    mask_token, token_pos, mask_pos = (grad.new_empty(shape, dtype=wide) for shape in shapes)
    return mask_token, token_pos, mask_pos


_ASSEMBLE_BACKWARD = define(
    "assemble_decoder_backward(Tensor grad, Tensor token_index, Tensor mask_index, bool in_grid, "
    "int token_rows, int mask_rows) -> (Tensor, Tensor, Tensor)",
    meaning=_meaning_backward,
    kernels=_backward_by_kernel,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, token_index, token_pos, mask_token, mask_index, mask_pos, ctx.in_grid = inputs
    ctx.save_for_backward(token_index, mask_index)
    ctx.dtypes = tokens.dtype, mask_token.dtype, token_pos.dtype, mask_pos.dtype
    ctx.rows = token_pos.shape[0], mask_pos.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    token_index, mask_index = ctx.saved_tensors
    _, _, learns_token_pos, learns_mask_token, _, learns_mask_pos, _ = ctx.needs_input_grad
    of_tokens, of_mask_token, of_token_pos, of_mask_pos = ctx.dtypes
    # An encoded token has one row in the sequence: its gradient is that row, no sum is needed.
    tokens = _take(grad, token_index) if ctx.in_grid else grad[:, : token_index.shape[1]]
    mask_token = token_pos = mask_pos = None
    if learns_token_pos or learns_mask_token or learns_mask_pos:
        token_rows = ctx.rows[0] if learns_token_pos else 0
        mask_rows = ctx.rows[1] if learns_mask_pos else 0
        mask_token, token_pos, mask_pos = _ASSEMBLE_BACKWARD(
            grad, token_index, mask_index, ctx.in_grid, token_rows, mask_rows
        )
        mask_token = mask_token.to(of_mask_token)
        token_pos = token_pos.to(of_token_pos) if token_rows else None
        mask_pos = mask_pos.to(of_mask_pos) if mask_rows else None
    return tokens.to(of_tokens), None, token_pos, mask_token, None, mask_pos, None


register_backward("assemble_decoder", _backward, _setup_context)


def assemble_decoder(
    tokens: Tensor,
    token_index: Tensor,
    token_pos: Tensor,
    mask_token: Tensor,
    mask_index: Tensor,
    mask_pos: Tensor,
    *,
    order: Order = "grouped",
) -> Tensor:
    """Return `[tokens + token_pos[token_index], mask_token + mask_pos[mask_index]]` of each clip.

    Args:
        tokens: encoded tokens at the decoder's width, [B, V, D]. Differentiable.
        token_index: position of each of them, [B, V], int64, in [0, rows of token_pos), none
            twice in a clip.
        token_pos: position (plus modality) table of the encoded tokens, [N, D]. Differentiable.
        mask_token: [D]. Differentiable.
        mask_index: position of each mask token, [B, M], int64, in [0, rows of mask_pos), none
            twice in a clip.
        mask_pos: position (plus modality) table of the mask tokens, [N, D]. Differentiable.
        order: `grouped`, as above, or `grid`: each token is the row of its position. For that the
            two indices of a clip must together be 0 .. V + M - 1, which is not checked: a row
            that neither names is left as memory was.

    Returns:
        Sequences [B, V + M, D] in the wider dtype of `tokens` and `token_pos`.

    Raises:
        ValueError: a shape, an index dtype or `order` is not as above. Index values are not
            checked.
    """
    op = "assemble_decoder"
    if order not in ("grouped", "grid"):
        raise ValueError(f"{op} wants order 'grouped' or 'grid', got {order!r}")
    if tokens.ndim != 3 or mask_token.shape != tokens.shape[-1:]:
        want = "tokens [B, V, D] and mask_token [D]"
        raise wanted(op, want, tokens=tokens, mask_token=mask_token)
    check_index(op, "token_index", token_index, tokens)
    check_index(op, "mask_index", mask_index, tokens)
    if token_index.shape[1] != tokens.shape[1]:
        want = "one position for each token"
        raise wanted(op, want, tokens=tokens, token_index=token_index)
    for name, table in (("token_pos", token_pos), ("mask_pos", mask_pos)):
        if table.ndim != 2 or table.shape[1] != tokens.shape[-1] or not table.is_contiguous():
            raise wanted(op, f"{name} [N, D], contiguous", tokens=tokens, **{name: table})
    if not mask_token.is_contiguous():
        raise wanted(op, "mask_token contiguous", mask_token=mask_token)
    return _ASSEMBLE(
        tokens, token_index, token_pos, mask_token, mask_index, mask_pos, order == "grid"
    )


def compile_cases() -> list[CompileCase]:
    """The shipped configurations of the assembly."""
    counts = ("B", "V", "M", "token_b", "token_k", "mask_b", "mask_k", "tokens_b", "tokens_v")
    pointers = ("token_pos_ptr", "mask_token_ptr", "mask_pos_ptr", "out_ptr")
    return [
        CompileCase(
            op="assemble_decoder",
            config=f"D{D} {tokens} {'grid' if in_grid else 'grouped'}",
            kernel=_assemble_kernel,
            arch=arch,
            signature={
                "tokens_ptr": f"*{tokens}",
                **dict.fromkeys(("token_index_ptr", "mask_index_ptr"), "*i64"),
                **dict.fromkeys(pointers, "*fp32"),
                **dict.fromkeys(counts, "i32"),
            },
            constexprs={"tokens_d": 1, "D": D, "GRID": in_grid, **_tile(D)},
            aligned=("tokens_ptr", *pointers, "tokens_b", "tokens_v"),
            num_warps=_WARPS,
            min_blocks=8,
        )
        for arch, D, tokens, in_grid in itertools.product(
            PROGRAMS, (384, 512), ("bf16", "fp32"), (False, True)
        )
    ]
