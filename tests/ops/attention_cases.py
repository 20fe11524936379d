"""Packed sequences for the attention tests: lengths that have broken attention kernels."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from avmae_kernels.attention_meaning import (
    explicit_backward,
    explicit_forward,
    packed_attention_reference,
)

# name: lengths of the sequences; 32 and 64 are sizes of blocks, 128 that of a slot.
LENGTHS = {
    "one among others": (1, 20, 1),
    "empty between": (3, 0, 0, 5, 0),
    "block edges": (31, 64, 65),
    "slot edges": (127, 129, 1),
}
# name: (queries, keys) of each sequence.
QUERY_LENGTHS = {
    "fewer queries": ((1, 3, 40), (5, 67, 40)),
    "more queries": ((70, 9), (2, 1)),
    "no queries": ((0, 4), (6, 4)),
    "no keys": ((3, 4), (0, 4)),
}


def offsets(lengths: Sequence[int]) -> Tensor:
    """cu_seqlens of the lengths."""
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def self_problem(
    lengths: Sequence[int], H: int, d: int, dtype: torch.dtype, extra: int = 0
) -> dict[str, Any]:
    """Arguments of `packed_attention`; `extra` rows belong to no sequence."""
    qkv = torch.randn(sum(lengths) + extra, 3, H, d)
    return {"qkv": qkv.to(dtype), "cu_seqlens": offsets(lengths)}


def query_problem(
    q_lengths: Sequence[int], kv_lengths: Sequence[int], H: int, d: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of `packed_query_attention`."""
    return {
        "q": torch.randn(sum(q_lengths), H, d).to(dtype),
        "kv": torch.randn(sum(kv_lengths), 2, H, d).to(dtype),
        "cu_q": offsets(q_lengths),
        "cu_kv": offsets(kv_lengths),
    }


def self_reference(
    qkv: Tensor, cu_seqlens: Tensor, fixed_length: int | None = None, **_: Any
) -> Tensor:
    """What `packed_attention` must return, differentiable by autograd."""
    q, k, v = qkv.unbind(1)
    return packed_attention_reference(q, k, v, cu_seqlens, cu_seqlens).flatten(1)


def query_reference(q: Tensor, kv: Tensor, cu_q: Tensor, cu_kv: Tensor, **_: Any) -> Tensor:
    """What `packed_query_attention` must return, differentiable by autograd."""
    return packed_attention_reference(q, *kv.unbind(1), cu_q, cu_kv).flatten(1)


class _Explicit(torch.autograd.Function):
    """One sequence, q [n, H, d], the way the kernels go: the gradient from the output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = explicit_forward(*(x.transpose(0, 1) for x in (q, k, v)))
        ctx.save_for_backward(q, k, v, out, lse)
        return out.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad, q, k, v = (x.transpose(0, 1) for x in (grad, q, k, v))
        return tuple(x.transpose(0, 1) for x in explicit_backward(grad, q, k, v, out, lse))


def _plain(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor) -> Tensor:
    parts = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_kv.tolist()), strict=True):
        rows, keys = slice(q0, q1), slice(k0, k1)
        parts.append(_Explicit.apply(q[rows], k[keys], v[keys]) if k1 > k0 else q[rows] * 0)
    return torch.cat([*parts, q[int(cu_q[-1]) :] * 0 + k[:0].sum() + v[:0].sum()]).flatten(1)


def self_plain(qkv: Tensor, cu_seqlens: Tensor, *_: Any, **__: Any) -> Tensor:
    """`packed_attention` by the kernels' arithmetic, in the dtype of its inputs."""
    return _plain(*qkv.unbind(1), cu_seqlens, cu_seqlens)


def query_plain(q: Tensor, kv: Tensor, cu_q: Tensor, cu_kv: Tensor, **_: Any) -> Tensor:
    """`packed_query_attention` likewise."""
    return _plain(q, *kv.unbind(1), cu_q, cu_kv)
