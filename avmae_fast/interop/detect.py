"""Which code base tensors come from, told by their names."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from avmae_fast.interop import huggingface
from avmae_fast.interop.entries import ConvertError, listed
from avmae_fast.interop.names import NAMES

FORMATS = (*NAMES, "cav-mae")

# The first row of which every name is there tells the format.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("cav-mae", (r"blocks_u\.0\.", r"patch_embed_a\.")),
    ("mae-st", (r"pos_embed_spatial$", r"blocks\.0\.attn\.q\.")),
    ("videomae", (r"(encoder\.)?blocks\.0\.attn\.q_bias$",)),
    ("hf-videomae", (r"(videomae\.)?encoder\.layer\.0\.attention\.attention\.(q_bias|query\.bias)$",
                     r"(videomae\.)?embeddings\.patch_embeddings\.projection\.weight$ 5")),
    ("hf-vitmae", (r"decoder\.decoder_embed\.weight$", r"vit\.embeddings\.cls_token$")),
    ("hf-vit", (r"((vit|deit)\.)?embeddings\.cls_token$", r"((vit|deit)\.)?(encoder|layers)\.")),
    ("audiomae", (r"patch_embed\.proj\.weight$ 1", r"blocks\.0\.attn\.qkv\.")),
    ("mae", (r"decoder_embed\.weight$", r"patch_embed\.proj\.weight$ 4", r"blocks\.0\.attn\.q")),
    ("timm", (r"patch_embed\.proj\.weight$ 4", r"blocks\.0\.attn\.qkv\.")),
)  # fmt: skip


def detect(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> str:
    """The format of tensors, from their names and, if there is one, a config.json.

    Raises:
        ConvertError: it is none of `FORMATS`.
    """
    named = huggingface.format_of(config or {})
    if named is not None:
        return named
    for source, signs in _SIGNS:
        if all(any(_shows(sign, name, x) for name, x in tensors.items()) for sign in signs):
            return source
    raise ConvertError(
        f"unknown architecture: {listed(sorted(tensors))} are names of none of {', '.join(FORMATS)}"
    )


def _shows(sign: str, name: str, tensor: Tensor) -> bool:
    """Whether a tensor has the name, and the axes (4, 5) or the channels (1), of a sign."""
    pattern, _, number = sign.partition(" ")
    if not re.match(pattern, name):
        return False
    if number == "1":
        return tensor.ndim == 4 and tensor.shape[1] == 1
    return not number or tensor.ndim == int(number)
