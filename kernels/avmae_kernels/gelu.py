"""The activation of the MLP with the bias of the product before it.

Shape letters: T tokens, M hidden channels. Source: arXiv:1606.08415; the authors' models use the
tanh approximation, timm and VideoMAE the erf form.
"""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from avmae_kernels._check import wanted

Approximation = Literal["tanh", "erf"]
_TORCH_NAME = {"tanh": "tanh", "erf": "none"}


def bias_gelu_reference(z: Tensor, bias: Tensor, approximate: Approximation) -> Tensor:
    """What `bias_gelu` must return, in plain PyTorch; it defines the operation."""
    return F.gelu(z + bias.to(z.dtype), approximate=_TORCH_NAME[approximate])


def bias_gelu(z: Tensor, bias: Tensor, approximate: Approximation = "tanh") -> Tensor:
    """Return `gelu(z + bias)`.

    Args:
        z: product of the first MLP layer before its bias, [T, M]. Differentiable.
        bias: [M]. Differentiable.
        approximate: `tanh`, as the authors' models, or `erf`, exact.

    Returns:
        The activation, [T, M], dtype of `z`.

    Raises:
        ValueError: the shapes do not fit or `approximate` is neither name.
    """
    if bias.shape != z.shape[-1:]:
        raise wanted("bias_gelu", "bias of z's last axis", z=z, bias=bias)
    if approximate not in _TORCH_NAME:
        raise ValueError(f"bias_gelu wants approximate 'tanh' or 'erf', got {approximate!r}")
    return bias_gelu_reference(z, bias, approximate)
