"""Does this GPU, with this compiler, compute attention rightly? A question for the start of a run.

Compilers for sm_90 have produced wrong code for attention without a word (Triton 3.4 to 3.7, ptxas
12.8), so kernels that no test has seen on a given machine are tried there first.
Shape letters: S sequences, H heads, d head_dim.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from avmae_kernels._triton import INTERPRET
from avmae_kernels.attention import packed_attention
from avmae_kernels.attention_backends import HOPPER, OWN, may_choose_hopper, reject
from avmae_kernels.attention_hopper import why_unsupported
from avmae_kernels.attention_meaning import packed_attention_reference

log = logging.getLogger(__name__)

# One key, the edges of a block, odd lengths; short and long, varying and fixed, as each has kernels
# or block sizes of its own.
_LENGTHS = ((1, 63, 64, 65, 129), (330, 513), (63, 63), (157, 157), (330, 330))
_HEADS = 2


def self_check(
    device: torch.device,
    head_dims: Sequence[int],
    dtypes: Sequence[torch.dtype],
    impls: Sequence[str] | None = None,
) -> dict[tuple[torch.dtype, int], float]:
    """Run our attention kernels once against their meaning in float64, forward and backward.

    Ones, single hot channels, large and random values; varying and fixed lengths. Kernels of a
    dtype and head_dim that miss are not used by "auto" in this process: a warning says so, and
    `attention_backends.explain` gives it as the reason. Some milliseconds for each pair, once its
    kernels are compiled; call it before torch.compile or a CUDA graph fixes the choice.

    Args:
        impls: which of our kernels, `attention_backends.KERNELS`; those that "auto" may take on
            this device if None. Those for Hopper are passed over for heads they do not take.

    Returns:
        The worst error of each (dtype, head_dim) as a share of what is allowed: above 1 is wrong.
    """
    # With the number that its tensors have: "cuda" alone has none.
    device = torch.empty(0, device=device).device
    worst = {}
    for dtype in dtypes:
        for head_dim in head_dims:
            shares = []
            for impl in impls or _may_choose(device, head_dim):
                if impl == HOPPER and why_unsupported(dtype, head_dim) is not None:
                    continue
                shares.append(_worst(_shares(device, dtype, head_dim, impl)))
                # Written so that a NaN fails.
                if not shares[-1] <= 1:
                    _reject(impl, device, dtype, head_dim, shares[-1])
            if shares:
                worst[dtype, head_dim] = _worst(shares)
    return worst


def _may_choose(device: torch.device, head_dim: int) -> tuple[str, ...]:
    return (OWN, HOPPER) if may_choose_hopper(device, head_dim) else (OWN,)


def _reject(
    impl: str, device: torch.device, dtype: torch.dtype, head_dim: int, share: float
) -> None:
    reject(impl, device, dtype, head_dim)
    log.warning(
        "attention kernels (%s) FAILED their self-check on %s for %s, head_dim %d (error %.3g "
        "times what is allowed): %s instead. A newer ptxas (CUDA 13.1), named by "
        "TRITON_PTXAS_PATH, may help.",
        impl, device, dtype, head_dim, share,
        "torch's SDPA is used" if impl == OWN else f"{OWN} is used",
    )  # fmt: skip


def _shares(device: torch.device, dtype: torch.dtype, head_dim: int, impl: str) -> Iterator[float]:
    for lengths in _LENGTHS:
        fixed = lengths[0] if len(set(lengths)) == 1 else None
        offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
        for qkv in _inputs(sum(lengths), head_dim):
            yield _share(qkv.to(device, dtype), offsets, fixed, impl)


def _inputs(tokens: int, head_dim: int) -> Iterator[Tensor]:
    """Queries, keys and values [T, 3, H, d]."""
    shape = (tokens, 3, _HEADS, head_dim)
    yield torch.ones(shape)
    generator = torch.Generator().manual_seed(0)
    hot = torch.randint(0, head_dim, shape[:3], generator=generator)
    yield torch.nn.functional.one_hot(hot, head_dim).float()
    values = torch.randn(shape, generator=generator)
    yield values
    # Scores of some hundreds: nearly all weight on one key, exponentials of -hundreds elsewhere.
    yield values * torch.tensor([16.0, 1.0, 1.0])[:, None, None]


def _share(qkv: Tensor, offsets: Tensor, fixed: int | None, impl: str) -> float:
    """The largest error of output and gradient, as a share of what may be: twice the error of
    PyTorch in the same dtype, one rounding of the result, and that of the fp32 sums behind it."""

    def results(x: Tensor, ours: bool) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        if ours:
            # Without kernels to choose from, "auto" is the operation's meaning.
            name = impl if x.is_cuda or INTERPRET else "auto"
            out = packed_attention(x, offsets, fixed, impl=name)
        else:
            q, k, v = x.unbind(1)
            out = packed_attention_reference(q, k, v, offsets, offsets).flatten(1)
        # Small numbers, exact in every dtype, and not the same in every place.
        grad = (torch.arange(out.numel(), device=x.device) % 7 - 3).view(out.shape).to(x.dtype)
        return out.detach(), torch.autograd.grad(out, x, grad)[0]

    # The gradient of a score is the difference of two sums of d products of a value and a gradient
    # of at most 3; it is multiplied by a query or key and by d^-0.5.
    q, k, v = (x.double().abs().max() for x in qkv.unbind(1))
    sums = 2 * qkv.shape[-1] ** 0.5 * 3 * v * torch.maximum(q, k) * torch.finfo(torch.float32).eps
    shares = []
    exact, plain = results(qkv.double(), ours=False), results(qkv, ours=False)
    for got, low, want in zip(results(qkv, ours=True), plain, exact, strict=True):
        rounding = torch.finfo(got.dtype).eps * want.abs().max()
        allowed = 2 * (low - want).abs().max() + rounding + sums
        shares.append(((got - want).abs().max() / allowed).item())
    return _worst(shares)


def _worst(shares: Iterable[float]) -> float:
    """Their maximum, or NaN if one is."""
    found = list(shares)
    return math.nan if any(map(math.isnan, found)) else max(found)
