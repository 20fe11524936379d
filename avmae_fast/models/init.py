"""Initial weights as the authors' code draws them.

Xavier-uniform for every product inside a transformer, LeCun-normal for the patch embedding, zeros
for what the first step must not disturb: the prediction heads and the mask tokens.
"""

import math

import torch
from torch import nn

# A normal cut at two standard deviations has this standard deviation; Flax divides by it.
_TRUNCATED_STD = 0.87962566103423978
LEARNED_POS_STD = 0.02


def lecun_normal_linear(values: int, width: int) -> nn.Linear:
    """A patch embedding: truncated normal of variance 1 / values, bias 0."""
    linear = nn.Linear(values, width)
    std = math.sqrt(1.0 / values) / _TRUNCATED_STD
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(linear.bias)
    return linear


def xavier_linear(
    width_in: int, width_out: int, *, parts: int = 1, bias: bool = True, bias_std: float = 0.0
) -> nn.Linear:
    """A product inside a transformer; `parts` stacked matrices are drawn one by one (q, k, v)."""
    linear = nn.Linear(width_in, width_out, bias=bias)
    for weight in linear.weight.detach().chunk(parts):
        nn.init.xavier_uniform_(weight)
    if linear.bias is not None:
        nn.init.normal_(linear.bias, std=bias_std) if bias_std else nn.init.zeros_(linear.bias)
    return linear


def zero_linear(width: int, values: int) -> nn.Linear:
    """A prediction head: the first prediction is zero."""
    linear = nn.Linear(width, values)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def learned_positions(tokens: int, width: int) -> nn.Parameter:
    """A position table to be learned, normal with standard deviation 0.02."""
    return nn.Parameter(torch.empty(tokens, width).normal_(std=LEARNED_POS_STD))
