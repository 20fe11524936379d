"""Attention inside each sequence of a packed set of tokens, without padding and without a mask.

Shape letters: T tokens of all sequences together, Q query tokens, S sequences, H heads, d head_dim.
Source: softmax(q k^T / sqrt(d)) v of arXiv:1706.03762, for sequences laid end to end; sequence s
is the rows cu_seqlens[s] .. cu_seqlens[s + 1]. Rows past the last sequence, and queries of a
sequence without keys, give zeros and get none but zero gradients.

Here are the operations and the public functions. What they mean: attention_meaning. Kernels:
attention_forward and attention_backward, and attention_hopper, on the slots of attention_layout, in
the configurations of attention_tiles. Other back ends, and the choice between them:
attention_backends. The log-sum-exp that an operation returns beside its output is for its gradient
alone: [H, slots * 128], in powers of two, laid out by slot.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from avmae_kernels._check import wanted
from avmae_kernels._library import define, register_backward
from avmae_kernels._triton import INTERPRET
from avmae_kernels.attention_backends import HOPPER, KERNELS, attend, resolve
from avmae_kernels.attention_backward import launch_backward
from avmae_kernels.attention_forward import launch_forward
from avmae_kernels.attention_hopper import launch_hopper_backward, launch_hopper_forward
from avmae_kernels.attention_layout import (
    SLOT,
    Sequences,
    owners_by_kernel,
    slot_count,
    slot_owners_reference,
)
from avmae_kernels.attention_meaning import (
    backward_meaning,
    forward_meaning,
    packed_attention_reference,
)
from avmae_kernels.attention_tiles import (
    backward_tiles,
    compile_cases,
    forward_tile,
    hopper_backward_tiles,
    hopper_forward_tile,
)

__all__ = [
    "compile_cases",
    "packed_attention",
    "packed_attention_reference",
    "packed_query_attention",
    "slot_owners",
]

# Within a tile, of at most 128 tokens, kernels count elements in 32 bits.
MAX_STRIDE = 2**24

slot_owners = define(
    "slot_owners(Tensor cu_seqlens, SymInt tokens) -> Tensor",
    meaning=slot_owners_reference,
    kernels=owners_by_kernel,
    fake=lambda cu, tokens: cu.new_empty(slot_count(tokens, cu.shape[0] - 1, None)),
)


class _Kernels(NamedTuple):
    """How the launches of one back end are called.

    forward: (q, k, v, seqs) to the output [Q, H, d] and its log-sum-exp. backward: (grad, q, k, v,
    out, lse, seqs, grads) writes the gradients of q, k and v into the three `grads`.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Sequences], tuple[Tensor, Tensor]]
    backward: Callable[..., None]


def _forward(q: Tensor, k: Tensor, v: Tensor, seqs: Sequences) -> tuple[Tensor, Tensor]:
    return launch_forward(q, k, v, seqs, forward_tile(q, k, seqs))


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seqs: Sequences,
    grads: Sequence[Tensor],
) -> None:
    launch_backward(grad, q, k, v, out, lse, seqs, grads, backward_tiles(q, k, seqs))


def _hopper_forward(q: Tensor, k: Tensor, v: Tensor, seqs: Sequences) -> tuple[Tensor, Tensor]:
    return launch_hopper_forward(q, k, v, seqs, hopper_forward_tile(q, k, seqs))


def _hopper_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seqs: Sequences,
    grads: Sequence[Tensor],
) -> None:
    tiles = hopper_backward_tiles(q, k, seqs)
    launch_hopper_backward(grad, q, k, v, out, lse, seqs, grads, tiles)


_FOR_ALL_GPUS = _Kernels(_forward, _backward)
_FOR_HOPPER = _Kernels(_hopper_forward, _hopper_backward)


def _fake_output(q: Tensor, cu_q: Tensor, length: int | None) -> tuple[Tensor, Tensor]:
    Q, H, d = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(H, slot_count(Q, cu_q.shape[0] - 1, length) * SLOT, dtype=dtype)
    return q.new_empty(Q, H * d), lse


def _pair(q_length: int | None, kv_length: int | None) -> tuple[int, int] | None:
    return None if q_length is None or kv_length is None else (q_length, kv_length)


def _self_sequences(cu: Tensor, owners: Tensor | None, length: int | None) -> Sequences:
    return Sequences(cu, cu, owners, owners, _pair(length, length))


def _query_sequences(
    cu_q: Tensor,
    cu_kv: Tensor,
    owners_q: Tensor | None,
    owners_kv: Tensor | None,
    q_length: int | None,
    kv_length: int | None,
) -> Sequences:
    return Sequences(cu_q, cu_kv, owners_q, owners_kv, _pair(q_length, kv_length))


def _packed(forward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    def run(qkv: Tensor, *sequences: Any) -> tuple[Tensor, Tensor]:
        out, lse = forward(*qkv.unbind(1), _self_sequences(*sequences))
        return out.flatten(1), lse

    return run


def _packed_backward_meaning(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *sequences: Any
) -> Tensor:
    q, k, v = qkv.unbind(1)
    heads = _as_heads(grad, q), q, k, v, _as_heads(out, q)
    return torch.stack(backward_meaning(*heads, lse, _self_sequences(*sequences)), 1)


def _packed_backward(backward: Callable[..., None]) -> Callable[..., Tensor]:
    def run(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *sequences: Any) -> Tensor:
        grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        q, k, v = qkv.unbind(1)
        heads = _as_heads(grad, q), q, k, v, _as_heads(out, q)
        backward(*heads, lse, _self_sequences(*sequences), grad_qkv.unbind(1))
        return grad_qkv

    return run


def _as_heads(x: Tensor, q: Tensor) -> Tensor:
    """x [Q, H * d] in the shape of q. Copied if it is a gradient of other strides: that of a sum is
    one number in every place."""
    return x.contiguous().view(q.shape)


def _packed_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv, cu, owners, ctx.length = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output, cu, owners)


def _define_packed(name: str, kernels: _Kernels) -> tuple[Any, Any]:
    """The operation `name` and its backward operation."""
    forward = define(
        f"{name}(Tensor qkv, Tensor cu_seqlens, Tensor? owners, SymInt? fixed_length)"
        " -> (Tensor, Tensor)",
        meaning=_packed(forward_meaning),
        kernels=_packed(kernels.forward),
        fake=lambda qkv, cu, owners, length: _fake_output(qkv[:, 0], cu, length),
    )
    backward = define(
        f"{name}_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens,"
        " Tensor? owners, SymInt? fixed_length) -> Tensor",
        meaning=_packed_backward_meaning,
        kernels=_packed_backward(kernels.backward),
        fake=lambda grad, qkv, *_: qkv.new_empty(qkv.shape),
    )

    def gradient(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
        return backward(grad, *ctx.saved_tensors, ctx.length), None, None, None

    register_backward(name, gradient, _packed_context)
    return forward, backward


_packed_attention, _packed_attention_backward = _define_packed("packed_attention", _FOR_ALL_GPUS)
_packed_attention_hopper, _packed_attention_hopper_backward = _define_packed(
    "packed_attention_hopper", _FOR_HOPPER
)


def _query(forward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    def run(q: Tensor, kv: Tensor, *sequences: Any) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, *kv.unbind(1), _query_sequences(*sequences))
        return out.flatten(1), lse

    return run


def _query_backward_meaning(
    grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, *sequences: Any
) -> tuple[Tensor, Tensor]:
    k, v = kv.unbind(1)
    heads = _as_heads(grad, q), q, k, v, _as_heads(out, q)
    of_q, of_k, of_v = backward_meaning(*heads, lse, _query_sequences(*sequences))
    return of_q.contiguous(), torch.stack([of_k, of_v], 1)


def _query_backward(backward: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(
        grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, *sequences: Any
    ) -> tuple[Tensor, Tensor]:
        grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        grad_kv = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
        heads = _as_heads(grad, q), q, *kv.unbind(1), _as_heads(out, q)
        backward(*heads, lse, _query_sequences(*sequences), (grad_q, *grad_kv.unbind(1)))
        return grad_q, grad_kv

    return run


def _query_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, kv, *offsets, ctx.q_length, ctx.kv_length = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, kv, *output, *offsets)


def _define_query(name: str, kernels: _Kernels) -> tuple[Any, Any]:
    """The operation `name` and its backward operation."""
    forward = define(
        f"{name}(Tensor q, Tensor kv, Tensor cu_q, Tensor cu_kv, Tensor? owners_q,"
        " Tensor? owners_kv, SymInt? q_length, SymInt? kv_length) -> (Tensor, Tensor)",
        meaning=_query(forward_meaning),
        kernels=_query(kernels.forward),
        fake=lambda q, kv, cu_q, cu_kv, of_q, of_kv, length, _: _fake_output(q, cu_q, length),
    )
    backward = define(
        f"{name}_backward(Tensor grad, Tensor q, Tensor kv, Tensor out, Tensor lse, Tensor cu_q,"
        " Tensor cu_kv, Tensor? owners_q, Tensor? owners_kv, SymInt? q_length, SymInt? kv_length)"
        " -> (Tensor, Tensor)",
        meaning=_query_backward_meaning,
        kernels=_query_backward(kernels.backward),
        fake=lambda grad, q, kv, *_: (q.new_empty(q.shape), kv.new_empty(kv.shape)),
    )

    def gradient(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
        grads = backward(grad, *ctx.saved_tensors, ctx.q_length, ctx.kv_length)
        return *grads, *[None] * 6

    register_backward(name, gradient, _query_context)
    return forward, backward


_packed_query_attention, _packed_query_attention_backward = _define_query(
    "packed_query_attention", _FOR_ALL_GPUS
)
_packed_query_attention_hopper, _packed_query_attention_hopper_backward = _define_query(
    "packed_query_attention_hopper", _FOR_HOPPER
)


def packed_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    fixed_length: int | None = None,
    *,
    owners: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return `softmax(q k^T / sqrt(d)) v` of every sequence, [T, H * d].

    Computed in the dtype of `qkv`, which autocast leaves alone: the projection before it already
    is in autocast's. Statistics and sums are fp32 (float64 for float64, which no kernel computes).

    Args:
        qkv: queries, keys and values, [T, 3, H, d], as one product writes them: [H, d] contiguous.
            Differentiable, once.
        cu_seqlens: offsets of the sequences, [S + 1], int32, from 0 to at most T, not decreasing.
            Values are not checked: reading them would stall a GPU.
        fixed_length: the length of every sequence where all have the same, else None. Kernels
            are compiled for it: leave it out where it changes from step to step.
        owners: `slot_owners(cu_seqlens, T)`, where the caller has it already (one launch a call
            saved); needed for varying lengths on a GPU only.
        impl: a name in `attention_backends.BACKENDS`, or "auto": the operation itself on a CPU,
            `attention_backends.choose` on a GPU.

    Raises:
        ValueError: a shape, dtype or memory layout is not as above.
        BackendUnavailable: `impl` cannot be had on this machine, or not for such tensors.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise wanted("packed_attention", "qkv [T, 3, H, d]", qkv=qkv)
    _check_heads("packed_attention", qkv=qkv)
    _check_offsets("packed_attention", qkv, cu_seqlens)
    if fixed_length is not None:
        sequences = cu_seqlens.shape[0] - 1
        if fixed_length < 1 or qkv.shape[0] != fixed_length * sequences:
            want = f"{sequences} sequences of fixed_length {fixed_length}"
            raise wanted("packed_attention", want, qkv=qkv, cu_seqlens=cu_seqlens)
    q, k, v = qkv.unbind(1)
    fixed = _pair(fixed_length, fixed_length)
    impl = resolve(impl, q, k, v, fixed)
    if impl not in KERNELS:
        return attend(impl, q, k, v, cu_seqlens, cu_seqlens, fixed).flatten(1)
    if owners is None and fixed_length is None and _runs_kernels(qkv):
        owners = slot_owners(cu_seqlens, qkv.shape[0])
    op = _packed_attention_hopper if impl == HOPPER else _packed_attention
    return op(qkv, cu_seqlens, owners, fixed_length)[0]


def packed_query_attention(
    q: Tensor,
    kv: Tensor,
    cu_q: Tensor,
    cu_kv: Tensor,
    fixed_lengths: tuple[int, int] | None = None,
    *,
    owners: tuple[Tensor | None, Tensor | None] = (None, None),
    impl: str = "auto",
) -> Tensor:
    """Return attention for a subset of queries over all keys of their sequence, [Q, H * d].

    The last decoder block asks only for the tokens that the loss looks at.

    Args:
        q: queries, [Q, H, d], [H, d] contiguous. Differentiable, once.
        kv: keys and values, [T, 2, H, d], likewise, of the dtype of q. Differentiable, once.
        cu_q, cu_kv: offsets of the sequences in `q` and in `kv`, [S + 1], int32.
        fixed_lengths: (queries, keys) of every sequence where all have the same, else None.
        owners: `slot_owners` of both sides, as for `packed_attention`.
        impl: as for `packed_attention`.

    Raises:
        ValueError: a shape, dtype or memory layout is not as above.
        BackendUnavailable: `impl` cannot be had on this machine, or not for such tensors.
    """
    if q.ndim != 3 or kv.ndim != 4 or kv.shape[1] != 2 or kv.shape[2:] != q.shape[1:]:
        raise wanted("packed_query_attention", "q [Q, H, d], kv [T, 2, H, d]", q=q, kv=kv)
    if q.dtype != kv.dtype:
        raise wanted("packed_query_attention", "q and kv of one dtype", q=q, kv=kv)
    _check_heads("packed_query_attention", q=q)
    _check_heads("packed_query_attention", kv=kv)
    _check_offsets("packed_query_attention", q, cu_q)
    _check_offsets("packed_query_attention", kv, cu_kv)
    if cu_q.shape != cu_kv.shape:
        raise wanted("packed_query_attention", "as many sequences in q", cu_q=cu_q, cu_kv=cu_kv)
    if fixed_lengths is not None:
        sequences = cu_q.shape[0] - 1
        rows = tuple(n * sequences for n in fixed_lengths)
        if min(fixed_lengths) < 1 or rows != (q.shape[0], kv.shape[0]):
            want = f"{sequences} sequences of fixed_lengths {fixed_lengths}"
            raise wanted("packed_query_attention", want, q=q, kv=kv)
    k, v = kv.unbind(1)
    impl = resolve(impl, q, k, v, fixed_lengths)
    if impl not in KERNELS:
        return attend(impl, q, k, v, cu_q, cu_kv, fixed_lengths).flatten(1)
    owners_q, owners_kv = owners
    if fixed_lengths is None and _runs_kernels(q):
        owners_q = slot_owners(cu_q, q.shape[0]) if owners_q is None else owners_q
        owners_kv = slot_owners(cu_kv, kv.shape[0]) if owners_kv is None else owners_kv
    lengths = fixed_lengths or (None, None)
    op = _packed_query_attention_hopper if impl == HOPPER else _packed_query_attention
    return op(q, kv, cu_q, cu_kv, owners_q, owners_kv, *lengths)[0]


def _runs_kernels(x: Tensor) -> bool:
    return x.is_cuda or INTERPRET


def _check_heads(op: str, **got: Tensor) -> None:
    for x in got.values():
        H, d = x.shape[-2:]
        if not x.is_floating_point() or d < 1:
            raise wanted(op, "floating-point heads of at least one channel", **got)
        if (d > 1 and x.stride(-1) != 1) or (H > 1 and x.stride(-2) != d):
            raise wanted(op, f"each token's [H, d] contiguous, strides are {x.stride()}", **got)
        if x.stride(0) >= MAX_STRIDE:
            raise wanted(op, f"tokens less than {MAX_STRIDE} elements apart", **got)


def _check_offsets(op: str, x: Tensor, offsets: Tensor) -> None:
    if offsets.ndim != 1 or offsets.shape[0] < 1 or offsets.dtype != torch.int32:
        raise wanted(op, "offsets int32 [S + 1]", offsets=offsets)
    if offsets.device != x.device:
        raise wanted(op, "offsets on the device of the tokens", tokens=x, offsets=offsets)
