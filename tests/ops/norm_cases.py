"""Inputs of `add_layer_norm` that every kind of run is tested on: CPU, interpreter, GPU."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# (T, D): no token, one token, no power of two, odd tails of tiles; and every shipped block size.
SMALL_SHAPES = [(0, 32), (1, 4), (2, 3), (5, 64), (4, 100), (7, 384)]
WIDE_SHAPES = [(33, 768), (3, 1280), (2, 2048)]

# What is switched on, and the dtypes of x and update where they are not all alike.
VARIANTS = {
    "update": {},
    "no update": {"update": None},
    "bias": {"update_bias": True},
    "scale": {"row_scale": True},
    "bias and scale": {"update_bias": True, "row_scale": True},
    "wide stream": {"x": torch.float32, "update_bias": True},
    "wide update": {"update": torch.float32},
}


def norm_inputs(
    T: int, D: int, variant: str, dtype: torch.dtype, device: str = "cpu"
) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `add_layer_norm` and the names of those with a gradient."""
    spec = VARIANTS[variant]
    generator = torch.Generator().manual_seed(T * D + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    inputs: dict[str, Any] = {
        # A mean far from zero: squares minus squares would lose the variance here.
        "x": (normal(T, D) + 3).to(spec.get("x", dtype)),
        "update": normal(T, D).to(spec.get("update") or dtype),
        "weight": normal(D),
        "bias": normal(D),
        "eps": 1e-6,
    }
    if spec.get("update", True) is None:
        inputs["update"] = None
    if "update_bias" in spec:
        inputs["update_bias"] = normal(D)
    if "row_scale" in spec:
        # A dropped row and rows that make up for it, as stochastic depth has them.
        inputs["row_scale"] = (normal(T) > -0.5).float() * 1.25
    constants = ("eps", "row_scale")
    return inputs, [n for n, v in inputs.items() if v is not None and n not in constants]


def plain_add_layer_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    update_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A block's usual code in low precision: every step rounds to the dtype it is in."""
    if update is None:
        total = x
    else:
        if update_bias is not None:
            update = update + update_bias.to(update.dtype)
        if row_scale is not None:
            update = update * row_scale.to(update.dtype)[:, None]
        total = x + update
    y = F.layer_norm(total, total.shape[-1:], weight.to(total.dtype), bias.to(total.dtype), eps)
    return total, y
