"""timm's VisionTransformer: its block, attention and MLP (timm 1.0)."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from avmae_fast.acceleration.modules import Part, Swapped
from avmae_fast.acceleration.operations import (
    add_norm,
    gelu_kind,
    is_plain,
    is_unhooked,
    linear_gelu,
    say_once,
    self_attention,
    why_not_gelu,
    why_not_norm,
)
from avmae_fast.acceleration.report import ATTENTION, GELU, NORM
from avmae_kernels.gelu import Approximation


class TimmBlock(Swapped):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); layer scale and stochastic depth are kept."""

    reads = ("norm2", "ls1", "ls2", "drop_path1", "drop_path2")
    norm1: nn.Module
    norm2: nn.LayerNorm
    attn: nn.Module
    mlp: nn.Module
    ls1: nn.Module
    ls2: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module

    @classmethod
    def examine(cls, module: Any) -> Iterator[Part]:
        yield Part(NORM, "norm2", why_not_norm(module.norm2))

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        mask = _given(attn_mask, is_causal)
        if not is_unhooked(self.norm2):
            return super().forward(x, **mask)
        update = self.drop_path1(self.ls1(self.attn(self.norm1(x), **mask)))
        x, h = add_norm(x, update, self.norm2)
        return x + self.drop_path2(self.ls2(self.mlp(h)))


class TimmAttention(Swapped):
    """Attention with one product for q, k and v."""

    reads = ("q_norm", "k_norm", "scale", "attn_drop", "norm", "proj_drop")
    num_heads: int
    head_dim: int
    qkv: nn.Module
    attn_drop: nn.Dropout
    norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    @classmethod
    def examine(cls, module: Any) -> Iterator[Part]:
        reason = None
        if type(module.q_norm) is not nn.Identity or type(module.k_norm) is not nn.Identity:
            reason = "qk_norm"
        elif module.scale != module.head_dim**-0.5:
            reason = f"its scale {module.scale} is not head_dim ** -0.5"
        condition = "own code in training: attention dropout" if module.attn_drop.p > 0 else None
        yield Part(ATTENTION, "", reason, condition)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        mask = _given(attn_mask, is_causal)
        if mask:
            say_once("accelerate: timm's Attention runs its own code where it is given a mask")
        if mask or (self.training and self.attn_drop.p > 0):
            return super().forward(x, **mask)
        out = self.norm(self_attention(self.qkv(x), self.num_heads))
        gate: nn.Module | None = getattr(self, "gate", None)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class TimmMlp(Swapped):
    """fc1, GELU, dropout, an optional norm, fc2, dropout."""

    reads = ("fc1", "act", "drop1", "norm", "fc2", "drop2")
    gelu: Approximation
    fc1: nn.Linear
    act: nn.Module
    drop1: nn.Module
    norm: nn.Module
    fc2: nn.Module
    drop2: nn.Module

    @classmethod
    def examine(cls, module: Any) -> Iterator[Part]:
        setting = ("gelu", gelu_kind(module.act))
        yield Part(GELU, "", why_not_gelu(module.fc1, module.act), settings=(setting,))

    def forward(self, x: Tensor) -> Tensor:
        if not (is_plain(self.fc1) and is_unhooked(self.act)):
            return super().forward(x)
        h = self.drop1(linear_gelu(x, self.fc1, self.gelu))
        return self.drop2(self.fc2(self.norm(h)))


def _given(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """The masks that were given, as keywords: older releases know fewer of them."""
    mask = {} if attn_mask is None else {"attn_mask": attn_mask}
    return {**mask, "is_causal": True} if is_causal else mask


MODULES: dict[str, type[Swapped]] = {
    "timm.models.vision_transformer.Block": TimmBlock,
    "timm.layers.attention.Attention": TimmAttention,
    "timm.layers.mlp.Mlp": TimmMlp,
}
