"""What packed attention means, in plain PyTorch: as one differentiable expression, and as the
forward and backward pass of the operations, which is also how they run on a CPU.

Shape letters: Q, T query and key tokens, S sequences, H heads, d head_dim, n queries of a sequence.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from avmae_kernels.attention_layout import SLOT, Sequences, slot_count, slot_starts

LOG2_E = math.log2(math.e)


def packed_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_kv: Tensor,
    fixed: tuple[int, int] | None = None,
) -> Tensor:
    """What both operations must return, in plain PyTorch: q [Q, H, d], k and v [T, H, d].

    Rows past the last sequence and queries of a sequence without keys give zeros. Varying lengths
    are read on the host.
    """
    parts, end = [], 0
    for run in _runs(Sequences(cu_q, cu_kv, fixed=fixed)):
        end = run.q_row + run.number * run.q_length
        if run.kv_length == 0:
            parts.append(torch.zeros_like(q[run.q_row : end]))
        elif run.q_length > 0:
            out = F.scaled_dot_product_attention(run.queries(q), run.keys(k), run.keys(v))
            parts.append(out.transpose(1, 2).flatten(0, 1))
    return _joined(parts, q[end:])


class _Run(NamedTuple):
    """Neighbouring sequences of equal lengths: one batched call computes them."""

    first: int
    number: int
    q_row: int
    q_length: int
    kv_row: int
    kv_length: int

    def queries(self, x: Tensor) -> Tensor:
        """Their rows of x [Q, H, d], as a view [number, H, q_length, d]."""
        return _by_sequence(x, self.q_row, self.number, self.q_length)

    def keys(self, x: Tensor) -> Tensor:
        """Their rows of x [T, H, d], as a view [number, H, kv_length, d]."""
        return _by_sequence(x, self.kv_row, self.number, self.kv_length)

    def statistics(self, lse: Tensor, seqs: Sequences) -> tuple[Tensor, Any]:
        """`x, index` so that `x[index]` are their entries of statistics by slot, [H, number, n]."""
        if seqs.fixed is not None:
            # Equally far apart: a view, of which index takes a slice.
            each = slice(None)
            return lse.unflatten(1, (self.number, -1)), (each, each, slice(self.q_length))
        starts = slot_starts(seqs.cu_q)[self.first : self.first + self.number] * SLOT
        rows = starts[:, None] + torch.arange(self.q_length, device=starts.device)
        return lse, (slice(None), rows)


def _by_sequence(x: Tensor, row: int, number: int, length: int) -> Tensor:
    if number * length != len(x):
        x = x[row : row + number * length]
    return x.view(number, length, *x.shape[1:]).transpose(1, 2)


def _runs(seqs: Sequences) -> Iterator[_Run]:
    count = len(seqs.cu_q) - 1
    if seqs.fixed is not None:
        if count > 0:
            yield _Run(0, count, 0, seqs.fixed[0], 0, seqs.fixed[1])
        return
    sides = (itertools.pairwise(cu.tolist()) for cu in (seqs.cu_q, seqs.cu_kv))
    entries = [
        _Run(s, 1, q0, q1 - q0, k0, k1 - k0)
        for s, ((q0, q1), (k0, k1)) in enumerate(zip(*sides, strict=True))
    ]
    for _, group in itertools.groupby(entries, key=lambda run: (run.q_length, run.kv_length)):
        members = list(group)
        yield members[0]._replace(number=len(members))


def forward_meaning(q: Tensor, k: Tensor, v: Tensor, seqs: Sequences) -> tuple[Tensor, Tensor]:
    """The output [Q, H, d], and the log-sum-exp by slot: fp32 (fp64 of fp64), powers of two."""
    (Q, H, _), S = q.shape, len(seqs.cu_q) - 1
    slots = slot_count(Q, S, seqs.fixed and seqs.fixed[0])
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full((H, slots * SLOT), math.inf, dtype=dtype, device=q.device)
    parts, end = [], 0
    for run in _runs(seqs):
        end = run.q_row + run.number * run.q_length
        if run.kv_length == 0:
            parts.append(torch.zeros_like(q[run.q_row : end]))
        elif run.q_length > 0:
            out, lse_SHn = _dense_forward(run.queries(q), run.keys(k), run.keys(v))
            statistics, index = run.statistics(lse, seqs)
            statistics[index] = lse_SHn.transpose(0, 1) * LOG2_E
            parts.append(out.transpose(1, 2).flatten(0, 1))
    return _joined(parts, q[end:]).contiguous(), lse


def backward_meaning(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seqs: Sequences
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from that of the output, [Q, H, d]."""
    of_q, of_k, of_v = [], [], []
    q_end = kv_end = 0
    for run in _runs(seqs):
        q_end = run.q_row + run.number * run.q_length
        kv_end = run.kv_row + run.number * run.kv_length
        if run.q_length * run.kv_length == 0:
            of_q.append(torch.zeros_like(q[run.q_row : q_end]))
            of_k.append(torch.zeros_like(k[run.kv_row : kv_end]))
            of_v.append(torch.zeros_like(v[run.kv_row : kv_end]))
            continue
        statistics, index = run.statistics(lse, seqs)
        lse_SHn = statistics[index].transpose(0, 1) / LOG2_E
        dense = _dense_backward(
            run.queries(grad), run.queries(q), run.keys(k), run.keys(v), run.queries(out), lse_SHn
        )
        for parts, part in zip((of_q, of_k, of_v), dense, strict=True):
            parts.append(part.transpose(1, 2).flatten(0, 1))
    return _joined(of_q, q[q_end:]), _joined(of_k, k[kv_end:]), _joined(of_v, v[kv_end:])


def _joined(parts: list[Tensor], rest: Tensor) -> Tensor:
    """The parts one after another, then zeros for the `rest` of the rows."""
    if len(parts) == 1 and len(rest) == 0:
        return parts[0]
    return torch.cat([*parts, torch.zeros_like(rest)])


def _dense_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q [S, H, n, d], and its log-sum-exp [S, H, n] in powers of e."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return explicit_forward(q, k, v)


def _dense_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    if q.device.type == "cpu":
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, q, k, v, out, lse, 0.0, False)
    return explicit_backward(grad, q, k, v, out, lse)


def explicit_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q [S, H, n, d] with all scores in memory; log-sum-exp in powers of e."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.to(wide)).to(q.dtype), lse


def explicit_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; source: arXiv:2307.08691, section 2.3.2.

    Probabilities and their gradients are rounded to the dtype of q before they are multiplied, as
    the kernels do.
    """
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    grad, q, k, v, out = (x.to(wide) for x in (grad, q, k, v, out))
    scale = q.shape[-1] ** -0.5
    p = (q @ k.mT * scale - lse[..., None]).exp()
    delta = (grad * out).sum(-1, keepdim=True)
    ds = (p * (grad @ v.mT - delta)).to(dtype).to(wide)
    p = p.to(dtype).to(wide)
    return (ds @ k * scale).to(dtype), (ds.mT @ q * scale).to(dtype), (p.mT @ grad).to(dtype)
