"""The transformer block and a stack of blocks, on packed tokens.

Shape letters: T packed tokens, Q query tokens, D width, H heads, d head_dim.
Source: pre-norm ViT blocks; a sub-layer returns its update, and the seam to the next one adds it
to the residual stream and normalises (`add_layer_norm`).
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from avmae_fast.config import Backbone, StackConfig
from avmae_fast.models.init import xavier_linear
from avmae_fast.models.layout import Tail, TokenLayout
from avmae_fast.models.memory import Checkpoint, product
from avmae_kernels.attention import packed_attention, packed_query_attention
from avmae_kernels.gelu import Approximation, bias_gelu
from avmae_kernels.norm import add_layer_norm

_MLP_BIAS_STD = 1e-6

# Computes the input of a product once more, so that it need not be kept.
Again = Callable[[], Tensor] | None


class Attention(nn.Module):
    """Multi-head self-attention inside each sequence of a layout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = xavier_linear(width, 3 * width, parts=3)
        self.proj = xavier_linear(width, width)

    def forward(
        self,
        x: Tensor,
        layout: TokenLayout,
        tail: Tail | None,
        again: Again = None,
        with_bias: bool = True,
    ) -> Tensor:
        """The update of every token [T, D], or of the tail's tokens only [Q, D].

        `again` computes `x` once more for the backward pass. `with_bias=False` leaves the bias of
        the last product to the seam that adds the update.
        """
        out = self._attend(x, layout, tail, again)
        return F.linear(out, self.proj.weight, self.proj.bias if with_bias else None)

    def _attend(
        self, x: Tensor, layout: TokenLayout, tail: Tail | None, again: Again = None
    ) -> Tensor:
        if tail is None:
            qkv = product(x, self.qkv, again).unflatten(-1, (3, self.heads, -1))
            return packed_attention(
                qkv, layout.cu_seqlens, layout.fixed_length, owners=layout.owners
            )
        width = x.shape[-1]
        w_q, w_kv = self.qkv.weight.split([width, 2 * width])
        b_q, b_kv = self.qkv.bias.split([width, 2 * width])
        q = F.linear(x[tail.rows], w_q, b_q).unflatten(-1, (self.heads, -1))
        kv = F.linear(x, w_kv, b_kv).unflatten(-1, (2, self.heads, -1))
        fixed = None
        if tail.layout.fixed_length is not None and layout.fixed_length is not None:
            fixed = (tail.layout.fixed_length, layout.fixed_length)
        # Of one kind both: fixed lengths, or slots found for both.
        owners = (None, None) if fixed else (tail.layout.owners, layout.owners)
        offsets = tail.layout.cu_seqlens, layout.cu_seqlens
        return packed_query_attention(q, kv, *offsets, fixed, owners=owners)


class Mlp(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, width: int, hidden: int, gelu: Approximation) -> None:
        super().__init__()
        self.gelu = gelu
        self.fc1 = xavier_linear(width, hidden, bias_std=_MLP_BIAS_STD)
        self.fc2 = xavier_linear(hidden, width, bias_std=_MLP_BIAS_STD)

    def forward(self, x: Tensor, again: Again = None, with_bias: bool = True) -> Tensor:
        """The update; `again` and `with_bias` as in `Attention`."""
        z = product(x, self.fc1, again, with_bias=False)
        h = bias_gelu(z, self.fc1.bias, self.gelu)
        h_again: Again = None
        if again is not None:
            kept, bias = z.detach(), self.fc1.bias.detach()
            h_again = lambda: bias_gelu(kept, bias, self.gelu)  # noqa: E731
        return product(h, self.fc2, h_again, with_bias)


class Block(nn.Module):
    """x + Attention(LN(x)), then x + Mlp(LN(x)); the last addition is left to the next seam."""

    def __init__(self, stack: StackConfig, config: Backbone) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(stack.width, config.layer_norm_eps)
        self.attn = Attention(stack.width, stack.heads)
        self.norm2 = nn.LayerNorm(stack.width, config.layer_norm_eps)
        self.mlp = Mlp(stack.width, stack.mlp, config.gelu)

    def forward(
        self,
        x: Tensor,
        update: Tensor | None,
        layout: TokenLayout,
        tail: Tail | None,
        selective: bool = False,
        update_bias: Tensor | None = None,
        with_bias: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and the update to be added to it; for a tail, of its rows only.

        `selective` keeps what `avmae_fast.models.memory` says. `update_bias` is still to be added
        to the update that comes in, and with `with_bias=False` so is `mlp.fc2.bias` to the one
        that goes out: a seam adds it, and sums its gradient, in a pass that it makes anyway.
        """
        x, h = seam(x, update, self.norm1, update_bias)
        again = norm_again(x, self.norm1) if selective else None
        attended = self.attn(h, layout, tail, again, with_bias=False)
        if tail is not None:
            x = x[tail.rows]
        x, h = seam(x, attended, self.norm2, self.attn.proj.bias)
        return x, self.mlp(h, norm_again(x, self.norm2) if selective else None, with_bias)


class Stack(nn.Module):
    """`layers` blocks and, unless it is switched off, the LayerNorm that closes every stack."""

    def __init__(
        self, stack: StackConfig, config: Backbone, layers: int | None = None, norm: bool = True
    ) -> None:
        super().__init__()
        count = stack.layers if layers is None else layers
        self.blocks = nn.ModuleList(Block(stack, config) for _ in range(count))
        self.checkpoint: Checkpoint = "selective"
        # Whether a block leaves a bias to the next one, which then reads a parameter of another.
        self.passes_bias = True
        closed = config.encoder_norm and norm
        self.norm = nn.LayerNorm(stack.width, config.layer_norm_eps) if closed else None

    def forward(self, x: Tensor, layout: TokenLayout, tail: Tail | None = None) -> Tensor:
        """[T, D] to [T, D], or to [Q, D] where only a tail of each sequence is asked for."""
        update: Tensor | None = None
        bias: Tensor | None = None
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            # Keys and values of the last block need every token, its queries only the tail's.
            asked = tail if i == last else None
            x, update = self._run(i, x, update, layout, asked, bias, not self.passes_bias)
            bias = cast(Block, block).mlp.fc2.bias if self.passes_bias else None
        if self.norm is None:
            assert update is not None  # a stack has a block
            return x + (update if bias is None else update + bias)
        return seam(x, update, self.norm, bias)[1]

    def run_block(
        self,
        i: int,
        x: Tensor,
        update: Tensor | None,
        layout: TokenLayout,
        tail: Tail | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Block number `i` alone, as `Block.forward` says, under the stack's checkpoint policy."""
        return self._run(i, x, update, layout, tail, None, True)

    def _run(
        self,
        i: int,
        x: Tensor,
        update: Tensor | None,
        layout: TokenLayout,
        tail: Tail | None,
        update_bias: Tensor | None,
        with_bias: bool,
    ) -> tuple[Tensor, Tensor]:
        selective = self.checkpoint == "selective"
        args = (x, update, layout, tail, selective, update_bias, with_bias)
        if self.checkpoint == "full" and torch.is_grad_enabled():
            # No random numbers are drawn in a block; keeping their state would wait for the GPU.
            return checkpoint(self.blocks[i], *args, use_reentrant=False, preserve_rng_state=False)
        return self.blocks[i](*args)


def set_checkpoint(model: nn.Module, policy: Checkpoint) -> None:
    """Choose what every stack of `model` keeps for its backward pass, see `memory`."""
    if policy not in ("none", "selective", "full"):
        raise ValueError(f"checkpoint = {policy!r} must be 'none', 'selective' or 'full'")
    for module in model.modules():
        if isinstance(module, Stack):
            module.checkpoint = policy


def norm_again(x: Tensor, norm: nn.LayerNorm) -> Again:
    """LayerNorm of a residual stream that is kept anyway."""
    kept, weight, bias = x.detach(), norm.weight.detach(), norm.bias.detach()
    return lambda: add_layer_norm(kept, None, weight, bias, norm.eps)[1]


def seam(
    x: Tensor, update: Tensor | None, norm: nn.LayerNorm, update_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The residual stream with the update and its bias added, and its LayerNorm."""
    return add_layer_norm(x, update, norm.weight, norm.bias, norm.eps, update_bias=update_bias)
