"""The transformer of encoder and decoder: pre-norm ViT blocks closed by a LayerNorm.

Shape letters: B clips, L tokens of a sequence, D width, H heads, d head_dim.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avmae_fast.config import Backbone, Modality, StackConfig


class Attention(nn.Module):
    """Multi-head self-attention over all tokens of a sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out_BHLd = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out_BHLd.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    """Two layers with a GELU between them, in its tanh form as released."""

    def __init__(self, width: int, hidden: int, gelu: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """x + Attention(LN(x)), then x + Mlp(LN(x))."""

    def __init__(self, stack: StackConfig, config: Backbone) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(stack.width, config.layer_norm_eps)
        self.attn = Attention(stack.width, stack.heads)
        self.norm2 = nn.LayerNorm(stack.width, config.layer_norm_eps)
        self.mlp = Mlp(stack.width, stack.mlp, config.gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    """`layers` blocks and a closing LayerNorm, which `encoder_norm=False` leaves out."""

    def __init__(
        self, stack: StackConfig, config: Backbone, layers: int, norm: bool = True
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(stack, config) for _ in range(layers))
        closed = config.encoder_norm and norm
        self.norm = nn.LayerNorm(stack.width, config.layer_norm_eps) if closed else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.norm is None else self.norm(x)


def run_joint(stack: nn.Module, parts: dict[Modality, Tensor]) -> dict[Modality, Tensor]:
    """Run several token sequences [B, L, D] as one long sequence and split the result again."""
    out = stack(torch.cat(list(parts.values()), dim=1))
    return dict(zip(parts, out.split([x.shape[1] for x in parts.values()], dim=1), strict=True))
