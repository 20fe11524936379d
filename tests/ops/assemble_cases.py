"""Problems for the assembly of decoder sequences."""

import torch
from torch import Tensor

LEAVES = ("tokens", "token_pos", "mask_token", "mask_pos")


def problem(
    B: int, V: int, M: int, D: int, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> dict[str, Tensor]:
    """Indices that partition the positions of each clip, and random tensors that want gradients."""
    generator = torch.Generator().manual_seed(0)
    N = V + M
    order = [torch.randperm(N, generator=generator) for _ in range(max(B, 1))]
    place = torch.stack(order)[:B].to(device)
    shapes = {"tokens": (B, V, D), "token_pos": (N, D), "mask_token": (D,), "mask_pos": (N, D)}
    leaves = {
        name: torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    return {**leaves, "token_index": place[:, :V], "mask_index": place[:, V:]}
