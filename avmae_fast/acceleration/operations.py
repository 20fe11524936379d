"""What the swapped modules compute with, and when one may not: the same for every library.

Shape letters: B sequences, N tokens of each, H heads, d head_dim, D width.
"""

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avmae_kernels.attention import packed_attention
from avmae_kernels.gelu import Approximation, bias_gelu
from avmae_kernels.norm import MAX_WIDTH, add_layer_norm

log = logging.getLogger(__name__)

# Kernels are compiled for a length. A model that meets more than this many gets those for any.
_MOST_LENGTHS = 16
_lengths: set[int] = set()

# Classes whose forward is that of nn.LayerNorm.
_LAYER_NORMS = ("torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm")
_GELUS: dict[str, Approximation] = {
    "timm.layers.activations.GELU": "erf",
    "timm.layers.activations.GELUTanh": "tanh",
    "transformers.activations.GELUActivation": "erf",
    "transformers.activations.GELUTanh": "tanh",
    "transformers.activations.NewGELUActivation": "tanh",
}


def class_name(cls: type) -> str:
    """Where a class is defined: `timm.models.vision_transformer.Block`."""
    return f"{cls.__module__}.{cls.__qualname__}"


@torch.compiler.assume_constant_result
def say_once(message: str) -> None:
    """Log a warning the first time; under torch.compile, when the code is traced."""
    _warn(message)


@functools.cache
def _warn(message: str) -> None:
    log.warning(message)


def self_attention(qkv: Tensor, heads: int) -> Tensor:
    """Attention of every sequence to itself: qkv [B, N, 3 * H * d] to [B, N, H * d]."""
    B, N, channels = qkv.shape
    packed = qkv.contiguous().view(B * N, 3, heads, channels // (3 * heads))
    cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=qkv.device) * N
    out = packed_attention(packed, cu_seqlens, _fixed_length(N) if B else None)
    return out.view(B, N, channels // 3)


def _fixed_length(length: int) -> int | None:
    if torch.compiler.is_compiling():
        return length
    if length not in _lengths:
        if len(_lengths) == _MOST_LENGTHS:
            say_once(
                f"accelerate: sequences of more than {_MOST_LENGTHS} lengths; further ones share "
                "attention kernels for varying lengths, which are not compiled anew for each"
            )
            return None
        _lengths.add(length)
    return length or None


def joint_projection(x: Tensor, linears: Sequence[nn.Linear]) -> Tensor:
    """The outputs of some linear layers side by side, by one product; a missing bias is zero."""
    weight = torch.cat(tuple(linear.weight for linear in linears))
    if all(linear.bias is None for linear in linears):
        return F.linear(x, weight)
    biases: list[Tensor] = [
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        for linear in linears
    ]
    return F.linear(x, weight, torch.cat(biases))


def add_norm(x: Tensor, update: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """`x + update`, and its LayerNorm, under autocast in the dtype of the product after it."""
    return add_layer_norm(x.contiguous(), update.contiguous(), norm.weight, norm.bias, norm.eps)


def post_norm(x: Tensor, update: Tensor, norm: nn.LayerNorm) -> Tensor:
    """`LayerNorm(x + update)` where that is the residual stream: wide under autocast."""
    if not torch.is_autocast_enabled(x.device.type):
        return add_norm(x, update, norm)[1]
    with torch.autocast(x.device.type, enabled=False):
        return add_norm(x.to(torch.promote_types(x.dtype, torch.float32)), update, norm)[1]


def linear_gelu(x: Tensor, linear: nn.Linear, approximate: Approximation) -> Tensor:
    """`gelu(linear(x))`."""
    return bias_gelu(F.linear(x, linear.weight).contiguous(), linear.bias, approximate)


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear layer is its weight and its bias and nothing else.

    Adapters, quantisation, parametrisations and sharding of a single layer change its class or
    hook into its call.
    """
    return type(linear) is nn.Linear and is_unhooked(linear)


def is_unhooked(module: nn.Module) -> bool:
    """Whether nothing happens around the call of a module that is about to be left out."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def why_not_norm(norm: nn.Module) -> str | None:
    """What keeps the addition before `norm` from being fused with it."""
    if not isinstance(norm, nn.LayerNorm) or not _is_layer_norm(norm):
        return f"{type(norm).__name__} is no LayerNorm that is known"
    if norm.weight is None or norm.bias is None:
        return "it has no bias" if norm.bias is None else "it has no weight"
    if len(norm.normalized_shape) != 1 or norm.normalized_shape[0] > MAX_WIDTH:
        return f"its shape {tuple(norm.normalized_shape)} is not one axis of up to {MAX_WIDTH}"
    if getattr(norm, "_fast_norm", False):
        return "timm's fast norm is switched on"
    return None


def _is_layer_norm(norm: nn.LayerNorm) -> bool:
    return any(
        class_name(cls) in _LAYER_NORMS and cls.forward is type(norm).forward
        for cls in type(norm).__mro__
        if issubclass(cls, nn.LayerNorm)
    )


def gelu_kind(activation: object) -> Approximation | None:
    """Which GELU an activation is, None for all others."""
    if activation is F.gelu:
        return "erf"
    if type(activation) is nn.GELU:
        return "tanh" if activation.approximate == "tanh" else "erf"
    return _GELUS.get(class_name(type(activation)))


def why_not_gelu(linear: nn.Module, activation: object) -> str | None:
    """What keeps an activation from being fused with the bias of the layer before it."""
    if gelu_kind(activation) is None:
        name = getattr(activation, "__name__", type(activation).__name__)
        return f"its activation is {name}"
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__} stands where a Linear was expected"
    return "the layer before it has no bias" if linear.bias is None else None
