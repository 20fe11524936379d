"""Attention at the lengths of the mission, by every back end there is."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from avmae_kernels.attention import packed_attention
from avmae_kernels.attention_backends import BACKENDS
from benchmarks.kernel_cases import Call, Case, Inputs, unavailable_call

# Visible tokens of video, of sound, of both in two presets, then of a whole decoder sequence.
LENGTHS = (157, 149, 306, 357, 496, 1568, 2064)
VARYING = ((157, 149), (1568, 496))
HEADS = {32: 16, 64: 12, 80: 16}
_TOKENS = 65536
CHECKED = 2  # sequences of each length: in float64 their scores must fit in memory


def attention_cases(device: torch.device, tiny: bool = False) -> list[Case]:
    """One case for each length (or mixture of lengths) and head_dim."""
    if tiny:
        return [_case(device, (9,), 2, 8, 3), _case(device, (9, 5), 2, 8, 2)]
    found = []
    for head_dim, heads in HEADS.items():
        for lengths in [*((n,) for n in LENGTHS), *VARYING]:
            each = max(1, round(_TOKENS / sum(lengths)))
            found.append(_case(device, lengths, heads, head_dim, each))
    return found


def _case(
    device: torch.device, lengths: tuple[int, ...], heads: int, head_dim: int, each: int
) -> Case:
    all_lengths = [n for n in lengths for _ in range(each)]
    fixed = lengths[0] if len(lengths) == 1 else None
    tokens, width = sum(all_lengths), heads * head_dim
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    offsets = torch.tensor([0, *all_lengths]).cumsum(0).to(device, torch.int32)

    def make() -> Inputs:
        qkv = torch.randn(tokens, 3, heads, head_dim, device=device, dtype=dtype)
        return (qkv.requires_grad_(),)

    def by(impl: str) -> Callable[..., Tensor]:
        return lambda qkv: packed_attention(qkv, offsets, fixed, impl=impl)

    calls: dict[str, Call] = {"eager": partial(dense, lengths=all_lengths)}
    if fixed is not None:
        calls["compiled"] = torch.compile(partial(dense, lengths=all_lengths), dynamic=False)
    else:
        calls["compiled"] = unavailable_call("the eager meaning of varying lengths is a loop")
    calls |= {("ours" if impl == "triton" else impl): by(impl) for impl in BACKENDS}
    if device.type != "cuda":
        calls["ours"] = lambda qkv: packed_attention(qkv, offsets, fixed)
    pairs = float(sum(n * n for n in all_lengths)) * width
    element = torch.empty(0, dtype=dtype).element_size()
    return Case(
        op="attention",
        shape=f"{'+'.join(map(str, lengths))} tokens, head_dim {head_dim}",
        details={"lengths": list(lengths), "heads": heads, "head_dim": head_dim, "each": each},
        make=make,
        calls=calls,
        exact=dense,
        part=partial(_first, lengths=lengths, each=each),
        # Useful ones: two products forward, five backward, nothing for padding.
        flops=(4.0 * pairs, 14.0 * pairs),
        bytes=(4.0 * element * tokens * width, 12.0 * element * tokens * width),
    )


def dense(qkv: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attention written out, runs of equal lengths as one batch: [T, H * d]."""
    parts: list[Tensor] = []
    row = 0
    while row < len(qkv):
        length = lengths[sum(p.shape[0] for p in parts)]
        count = sum(1 for n in lengths if n == length)
        rows = qkv[row : row + count * length].unflatten(0, (count, length))
        q, k, v = rows.permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        parts.append((scores @ v).transpose(1, 2).flatten(2))
        row += count * length
    return torch.cat([part.flatten(0, 1) for part in parts])


def _first(x: Tensor, lengths: tuple[int, ...], each: int) -> Tensor:
    """Rows of the first sequences of each length, whose results depend on nothing else."""
    rows, start = [], 0
    for length in lengths:
        rows.append(x[start : start + min(CHECKED, each) * length])
        start += each * length
    return torch.cat(rows)
