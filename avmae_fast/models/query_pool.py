"""Attentive pooling: one query that is learned reads the tokens of a clip.

Shape letters: B clips, N tokens of a modality, D width.
Source: the attentive probe of arXiv:2202.03026, section 4, with a single cross-attention.
"""

import torch
from torch import Tensor, nn

from avmae_fast.models.init import LEARNED_POS_STD, xavier_linear
from avmae_fast.models.layout import TokenLayout
from avmae_kernels.attention import packed_query_attention


class QueryPool(nn.Module):
    """A learned query attends to all tokens: [B, N, D] to [B, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(width).normal_(std=LEARNED_POS_STD))
        self.kv = xavier_linear(width, 2 * width, parts=2)
        self.proj = xavier_linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape[:2]
        kv = self.kv(tokens.flatten(0, 1)).unflatten(-1, (2, self.heads, -1))
        q = self.query.to(kv.dtype).unflatten(0, (self.heads, -1)).repeat(batch, 1, 1)
        cu_q = TokenLayout.fixed(batch, 1, tokens.device).cu_seqlens
        cu_kv = TokenLayout.fixed(batch, length, tokens.device).cu_seqlens
        return self.proj(packed_query_attention(q, kv, cu_q, cu_kv, (1, length)))
