"""Put one part of the engine back to what PyTorch offers, for the ablation ladder.

The engine has no switches for its parts, and needs none: a benchmark puts each operation's
plain-PyTorch meaning in its place for as long as a `with` lasts.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from avmae_fast.config import Modality
from avmae_fast.models import autoencoder, blocks, encoder
from avmae_kernels.assemble import assemble_decoder_reference
from avmae_kernels.attention import packed_attention, packed_query_attention
from avmae_kernels.gelu import bias_gelu_reference
from avmae_kernels.norm import add_layer_norm_reference
from avmae_kernels.patch_embed import patch_embed_visible_reference
from avmae_kernels.reconstruction_loss import reconstruction_loss_reference

Part = Callable[[], AbstractContextManager[object]]


@contextmanager
def replaced(module: ModuleType, **values: Any) -> Iterator[None]:
    """`module` with other values of some names it already has."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def attention(impl: str) -> AbstractContextManager[object]:
    """Every attention of the model by one back end, a name of `attention_backends.BACKENDS`."""
    return replaced(
        blocks,
        packed_attention=partial(packed_attention, impl=impl),
        packed_query_attention=partial(packed_query_attention, impl=impl),
    )


def _every_token(
    stack: nn.Module,
    tokens: dict[Modality, Tensor],
    joint: bool,
    tails: dict[Modality, int] | None = None,
) -> dict[Modality, Tensor]:
    """`run_stack` whose last block finishes the tokens that nobody asks for, too."""
    out = encoder.run_stack(stack, tokens, joint)
    return out if tails is None else {m: x[:, -tails[m] :] for m, x in out.items()}


# What each rung says and does; the whole engine is the first.
PARTS: dict[str, Part] = {
    "whole engine": nullcontext,
    "PyTorch's LayerNorm and residual": partial(
        replaced, blocks, add_layer_norm=add_layer_norm_reference
    ),
    "PyTorch's GELU": partial(replaced, blocks, bias_gelu=bias_gelu_reference),
    "PyTorch's patch embedding": partial(
        replaced, encoder, patch_embed_visible=patch_embed_visible_reference
    ),
    "PyTorch's decoder sequence": partial(
        replaced, autoencoder, assemble_decoder=assemble_decoder_reference
    ),
    "PyTorch's loss": partial(
        replaced, autoencoder, reconstruction_loss=reconstruction_loss_reference
    ),
    "last decoder block on every token": partial(replaced, autoencoder, run_stack=_every_token),
}
