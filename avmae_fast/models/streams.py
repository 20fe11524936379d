"""The token sequences of one modality on their way through the blocks, packed.

Shape letters: B clips, L rows of a sequence, K bottleneck rows at its end, D width.
Source: bottleneck fusion is MBT's, arXiv:2107.00135, section 3.3; averaging the copies of the
bottleneck after every layer is how the authors' code updates it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from avmae_fast.models.blocks import Block, Stack, norm_again, seam
from avmae_fast.models.drop_path import LayerDrop
from avmae_fast.models.layout import Tail, TokenLayout


@dataclass(frozen=True)
class Stream:
    """One sequence a clip, all of one length, laid end to end.

    x: [B * L, D], residual stream. update: what is still to be added to it, or None.
    bottleneck_rows: [B * K] int64, where the bottleneck tokens are, once there are any.
    """

    x: Tensor
    update: Tensor | None
    layout: TokenLayout
    batch: int
    bottleneck_rows: Tensor | None = None

    @classmethod
    def of(cls, tokens: Tensor) -> "Stream":
        """The sequences [B, L, D]."""
        batch, length = tokens.shape[:2]
        layout = TokenLayout.fixed(batch, length, tokens.device)
        return cls(tokens.flatten(0, 1), None, layout, batch)

    @property
    def length(self) -> int:
        return self.x.shape[0] // self.batch

    def settled(self) -> "Stream":
        """The same with nothing left to add."""
        return self if self.update is None else replace(self, x=self.x + self.update, update=None)

    def tokens(self) -> Tensor:
        """The settled sequences, [B, L, D]."""
        return self.settled().x.unflatten(0, (self.batch, -1))


def advance(stack: Stack, i: int, stream: Stream, drop: LayerDrop | None) -> Stream:
    """Block number `i` of a stack on every sequence, attending to itself."""
    if drop is None:
        x, update = stack.run_block(i, stream.x, stream.update, stream.layout)
        return replace(stream, x=x, update=update)
    stream = stream.settled()
    return _thinned(stack, i, stream, stream.tokens(), drop)


def advance_looking(
    stack: Stack, i: int, stream: Stream, other: Tensor, drop: LayerDrop | None
) -> Stream:
    """Block number `i` on every sequence, attending to the other modality's tokens as well.

    other: [B, L', D], taken in front of the sequence.
    """
    stream = stream.settled()
    seen = torch.cat([other, stream.tokens()], dim=1)
    if drop is not None:
        return _thinned(stack, i, stream, seen, drop)
    layout, tail = _looking(stream.batch, seen.shape[1], stream.length, seen.device)
    x, update = stack.run_block(i, seen.flatten(0, 1), None, layout, tail)
    return replace(stream, x=x, update=update)


def _looking(
    batch: int, seen: int, own: int, device: torch.device
) -> tuple[TokenLayout, Tail | None]:
    """Sequences of `seen` rows of which the last `own` ask; no tail where all of them do."""
    layout = TokenLayout.fixed(batch, seen, device)
    if seen == own:
        return layout, None
    rows = _last_rows(batch, seen, own, device)
    return layout, Tail(rows, TokenLayout.fixed(batch, own, device))


def _last_rows(batch: int, length: int, count: int, device: torch.device) -> Tensor:
    """The last `count` rows of every sequence of `length`, [B * count] int64."""
    starts = torch.arange(batch, device=device)[:, None] * length
    return (starts + torch.arange(length - count, length, device=device)).flatten()


def _thinned(stack: Stack, i: int, stream: Stream, seen: Tensor, drop: LayerDrop) -> Stream:
    """A block that computes each branch for the clips that keep it, and for no others."""
    block = stack.blocks[i]
    assert isinstance(block, Block)
    x = stream.tokens()
    if stack.checkpoint == "full" and torch.is_grad_enabled():
        # No random numbers are drawn in a block: the clips are chosen beforehand.
        args = (block, x, seen, drop, False)
        x = checkpoint(_thinned_block, *args, use_reentrant=False, preserve_rng_state=False)
    else:
        x = _thinned_block(block, x, seen, drop, stack.checkpoint == "selective")
    return replace(stream, x=x.flatten(0, 1), update=None)


def _thinned_block(
    block: Block, x: Tensor, seen: Tensor, drop: LayerDrop, selective: bool
) -> Tensor:
    """x [B, L, D] with the updates of the clips that take part; L are the last rows of `seen`."""
    clips = drop.attention.clips
    kept = seen.index_select(0, clips)
    layout, tail = _looking(len(clips), kept.shape[1], x.shape[1], x.device)
    kept, h = seam(kept.flatten(0, 1), None, block.norm1)
    update = block.attn(h, layout, tail, norm_again(kept, block.norm1) if selective else None)
    x = x.index_add(0, clips, _rows_of(x, update, clips), alpha=drop.attention.scale)
    clips = drop.mlp.clips
    kept, h = seam(x.index_select(0, clips).flatten(0, 1), None, block.norm2)
    update = block.mlp(h, norm_again(kept, block.norm2) if selective else None)
    # x is this function's own by now, and nothing keeps it for a backward pass.
    return x.index_add_(0, clips, _rows_of(x, update, clips), alpha=drop.mlp.scale)


def _rows_of(x: Tensor, update: Tensor, clips: Tensor) -> Tensor:
    return update.unflatten(0, (len(clips), -1)).to(x.dtype)


def with_bottleneck(stream: Stream, bottleneck: Tensor) -> Stream:
    """The sequences with the bottleneck tokens [K, D] at their ends; this lays them out anew."""
    tokens = stream.tokens()
    shared = bottleneck.to(tokens.dtype).expand(stream.batch, -1, -1)
    joined = Stream.of(torch.cat([tokens, shared], dim=1))
    rows = _last_rows(stream.batch, joined.length, len(bottleneck), tokens.device)
    return replace(joined, bottleneck_rows=rows)


def share_bottleneck(streams: dict[str, Stream]) -> dict[str, Stream]:
    """Give the bottleneck rows of every sequence their mean over the streams.

    Only these rows are written, in place, into what each stream has to itself: the update still
    to be added, or else the residual stream.
    """
    own = {name: _bottleneck(stream) for name, stream in streams.items()}
    mean = torch.stack(list(own.values())).mean(0)
    return {name: _shift(stream, mean - own[name]) for name, stream in streams.items()}


def _bottleneck(stream: Stream) -> Tensor:
    rows = stream.bottleneck_rows
    assert rows is not None
    x = stream.x.index_select(0, rows)
    return x if stream.update is None else x + stream.update.index_select(0, rows)


def _shift(stream: Stream, difference: Tensor) -> Stream:
    """The bottleneck rows moved by `difference`: adding passes gradients on as they are."""
    rows = stream.bottleneck_rows
    assert rows is not None
    if stream.update is None:
        return replace(stream, x=stream.x.index_add_(0, rows, difference))
    difference = difference.to(stream.update.dtype)
    return replace(stream, update=stream.update.index_add_(0, rows, difference))
