"""torch.nn.TransformerEncoderLayer, with LayerNorm before or after its sub-layers."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from avmae_fast.acceleration.modules import Part, Swapped
from avmae_fast.acceleration.operations import (
    add_norm,
    gelu_kind,
    is_plain,
    is_unhooked,
    linear_gelu,
    post_norm,
    say_once,
    self_attention,
    why_not_gelu,
    why_not_norm,
)
from avmae_fast.acceleration.report import ATTENTION, GELU, NORM
from avmae_kernels.gelu import Approximation


class EncoderLayer(Swapped):
    """Its three operations are swapped one by one, as far as they can be."""

    methods = ("forward", "_sa_block", "_ff_block")
    attends = False
    fuses_norm1 = False
    fuses_norm2 = False
    gelu: Approximation | None = None

    norm_first: bool
    self_attn: nn.MultiheadAttention
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    linear1: nn.Linear
    linear2: nn.Module
    activation: Any
    dropout: nn.Module
    dropout1: nn.Module
    dropout2: nn.Module
    # Its own sub-layers.
    _sa_block: Any
    _ff_block: Any

    @classmethod
    def examine(cls, module: Any) -> Iterator[Part]:
        attention, dropout = module.self_attn, module.self_attn.dropout
        condition = "own code in training: attention dropout" if dropout > 0 else None
        yield Part(
            ATTENTION, "self_attn", _why_not_attention(attention), condition, (("attends", True),)
        )
        if not module.norm_first:
            yield Part(NORM, "norm1", why_not_norm(module.norm1), settings=(("fuses_norm1", True),))
        yield Part(NORM, "norm2", why_not_norm(module.norm2), settings=(("fuses_norm2", True),))
        reason = why_not_gelu(module.linear1, module.activation)
        setting = ("gelu", gelu_kind(module.activation))
        yield Part(GELU, "linear1", reason, settings=(setting,))

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        masked = src_mask is not None or src_key_padding_mask is not None or is_causal
        if masked or src.is_nested or src.dim() != 3:
            what = "a mask" if masked else "a nested or unbatched tensor"
            say_once(f"accelerate: TransformerEncoderLayer runs its own code where it gets {what}")
            return super().forward(src, src_mask, src_key_padding_mask, is_causal=is_causal)
        if self.norm_first:
            update = self._attend(self.norm1(src))
            if not (self.fuses_norm2 and is_unhooked(self.norm2)):
                x = src + update
                return x + self._feed(self.norm2(x))
            x, h = add_norm(src, update, self.norm2)
            return x + self._feed(h)
        x = _add_norm_after(src, self._attend(src), self.norm1, self.fuses_norm1)
        return _add_norm_after(x, self._feed(x), self.norm2, self.fuses_norm2)

    def _attend(self, x: Tensor) -> Tensor:
        attention: Any = self.self_attn
        drops = self.training and attention.dropout > 0
        if drops or not (self.attends and is_unhooked(attention)):
            return self._sa_block(x, None, None)
        h = x if attention.batch_first else x.transpose(0, 1)
        qkv = F.linear(h, attention.in_proj_weight, attention.in_proj_bias)
        out = self_attention(qkv, attention.num_heads)
        out = F.linear(out, attention.out_proj.weight, attention.out_proj.bias)
        return self.dropout1(out if attention.batch_first else out.transpose(0, 1))

    def _feed(self, x: Tensor) -> Tensor:
        if self.gelu is None or not is_plain(self.linear1):
            return self._ff_block(x)
        h = linear_gelu(x, self.linear1, self.gelu)
        return self.dropout2(self.linear2(self.dropout(h)))


def _add_norm_after(x: Tensor, update: Tensor, norm: nn.LayerNorm, fuses: bool) -> Tensor:
    return post_norm(x, update, norm) if fuses and is_unhooked(norm) else norm(x + update)


def _why_not_attention(attention: Any) -> str | None:
    if type(attention) is not nn.MultiheadAttention:
        return f"{type(attention).__name__} is no MultiheadAttention"
    if not attention._qkv_same_embed_dim:
        return "keys or values have a width of their own"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "it attends to a bias or to zeros too"
    return None


MODULES: dict[str, type[Swapped]] = {
    "torch.nn.modules.transformer.TransformerEncoderLayer": EncoderLayer,
}
