"""Attention inside each sequence of a packed set of tokens, without padding and without a mask.

Shape letters: T tokens of all sequences together, Q query tokens, S sequences, H heads, d head_dim.
Source: softmax(q k^T / sqrt(d)) v of arXiv:1706.03762, for sequences laid end to end; sequence s
is the rows cu_seqlens[s] .. cu_seqlens[s + 1].
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from avmae_kernels._check import wanted


def packed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, fixed: tuple[int, int] | None
) -> Tensor:
    """What both operations must return, in plain PyTorch: q [Q, H, d], k and v [T, H, d]."""
    if fixed is not None:
        return _equal_lengths(q, k, v, *fixed)
    out = torch.empty_like(q)
    offsets = zip(_pairs(cu_q), _pairs(cu_kv), strict=True)
    lengths = [((q1 - q0), (k1 - k0), q0, k0) for (q0, q1), (k0, k1) in offsets]
    parts = []
    # Neighbours of equal lengths go through one batched call: two calls for two modalities.
    for (n_q, n_k), run in itertools.groupby(lengths, key=lambda entry: entry[:2]):
        members = list(run)
        q0, k0 = members[0][2:]
        rows_q, rows_k = n_q * len(members), n_k * len(members)
        if rows_q == 0:
            continue
        k_run, v_run = k[k0 : k0 + rows_k], v[k0 : k0 + rows_k]
        parts.append(_equal_lengths(q[q0 : q0 + rows_q], k_run, v_run, n_q, n_k))
    return torch.cat(parts) if parts else out


def _pairs(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cu_seqlens.tolist()))


def _equal_lengths(q: Tensor, k: Tensor, v: Tensor, n_q: int, n_k: int) -> Tensor:
    if n_k == 0:
        raise ValueError(f"packed attention wants keys for its {n_q} queries a sequence, got none")
    q_SHQd = q.unflatten(0, (-1, n_q)).transpose(1, 2)
    k_SHKd = k.unflatten(0, (-1, n_k)).transpose(1, 2)
    v_SHKd = v.unflatten(0, (-1, n_k)).transpose(1, 2)
    out = F.scaled_dot_product_attention(q_SHQd, k_SHKd, v_SHKd)
    return out.transpose(1, 2).flatten(0, 1)


def packed_attention(qkv: Tensor, cu_seqlens: Tensor, fixed_length: int | None = None) -> Tensor:
    """Return `softmax(q k^T / sqrt(d)) v` of every sequence, [T, H * d].

    Args:
        qkv: queries, keys and values, [T, 3, H, d], as one product writes them. Differentiable.
        cu_seqlens: offsets of the sequences, [S + 1], int32, from 0 to T, not decreasing. Values
            are not checked: reading them would stall a GPU.
        fixed_length: the length of every sequence where all have the same, else None.

    Raises:
        ValueError: a shape or dtype is not as above, or T is no multiple of `fixed_length`.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise wanted("packed_attention", "qkv [T, 3, H, d]", qkv=qkv)
    _check_offsets("packed_attention", cu_seqlens)
    fixed = None
    if fixed_length is not None:
        if fixed_length < 1 or qkv.shape[0] % fixed_length:
            raise wanted("packed_attention", f"a multiple of {fixed_length} tokens", qkv=qkv)
        fixed = (fixed_length, fixed_length)
    q, k, v = qkv.unbind(1)
    return packed_attention_reference(q, k, v, cu_seqlens, cu_seqlens, fixed).flatten(1)


def packed_query_attention(
    q: Tensor,
    kv: Tensor,
    cu_q: Tensor,
    cu_kv: Tensor,
    fixed_lengths: tuple[int, int] | None = None,
) -> Tensor:
    """Return attention for a subset of queries over all keys of their sequence, [Q, H * d].

    The last decoder block asks only for the tokens that the loss looks at.

    Args:
        q: queries, [Q, H, d]. Differentiable.
        kv: keys and values, [T, 2, H, d]. Differentiable.
        cu_q, cu_kv: offsets of the sequences in `q` and in `kv`, [S + 1], int32.
        fixed_lengths: (queries, keys) of every sequence where all have the same, else None.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    if q.ndim != 3 or kv.ndim != 4 or kv.shape[1] != 2 or kv.shape[2:] != q.shape[1:]:
        raise wanted("packed_query_attention", "q [Q, H, d], kv [T, 2, H, d]", q=q, kv=kv)
    _check_offsets("packed_query_attention", cu_q)
    _check_offsets("packed_query_attention", cu_kv)
    if cu_q.shape != cu_kv.shape:
        raise wanted("packed_query_attention", "as many sequences in q", cu_q=cu_q, cu_kv=cu_kv)
    k, v = kv.unbind(1)
    return packed_attention_reference(q, k, v, cu_q, cu_kv, fixed_lengths).flatten(1)


def _check_offsets(op: str, cu_seqlens: Tensor) -> None:
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype != torch.int32:
        raise wanted(op, "offsets int32 [S + 1]", cu_seqlens=cu_seqlens)
