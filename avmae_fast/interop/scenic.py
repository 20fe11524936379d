"""Pretraining weights of the authors' code (Scenic, Flax) to our state dict and back.

A table says, for each of our names, which leaves of the Flax tree hold it and how they are laid
out; both directions and every error follow from that table.
Layouts: Flax stores kernels as [in, out], attention kernels as [in, H, d] or [H, d, out] and patch
kernels as [t, h, w, c, out] or [time, frequency, 1, out]; H heads, d head_dim.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avmae_fast.config import AudioConfig, Modality, ModelConfig, StackConfig, VideoConfig
from avmae_fast.interop.entries import ConvertError, Entry, to_ours, to_theirs

SCENIC_MODALITY: dict[Modality, str] = {"video": "rgb", "audio": "spectrogram"}

Array = NDArray[np.generic]

# Fields in which our models go beyond the authors'.
_RELEASED = {"decoder_positions": "fixed", "prefix_tokens": 0, "middle_norm": True}


def from_scenic(params: Mapping[str, Array], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict, from Flax leaves by path ("Transformer/encoderblock_0/...").

    Args:
        params: every parameter of the model; dtypes are kept.
        config: the model the parameters belong to.

    Raises:
        ConvertError: leaves are missing, superfluous or of another shape; the text names them.
    """
    return read_leaves(params, entries_of(config))


def read_leaves(params: Mapping[str, Array], entries: Sequence[Entry]) -> dict[str, Tensor]:
    """`from_scenic` by any table."""
    tensors = {
        name: leaf if isinstance(leaf, Tensor) else torch.from_numpy(np.array(leaf))
        for name, leaf in params.items()
    }
    return to_ours(entries, tensors, "Scenic leaves")


def to_scenic(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Array]:
    """Flax leaves by path, from our state dict (or from gradients under the same names).

    Raises:
        ConvertError: names are missing, superfluous or of another shape; the text names them.
    """
    return write_leaves(state, entries_of(config))


def write_leaves(state: Mapping[str, Tensor], entries: Sequence[Entry]) -> dict[str, Array]:
    """`to_scenic` by any table."""
    return {name: x.numpy() for name, x in to_theirs(entries, state).items()}


def stack_names(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """Scenic's name and the depth of each transformer stack, by our prefix ("encoder.both")."""
    layers, modalities = config.encoder.layers, config.modalities
    stacks: dict[str, tuple[str, int]] = {}
    if config.fusion in ("early", "shared"):
        stacks["encoder.both"] = ("Transformer", layers)
    else:
        own = layers - config.fusion_layers if config.fusion == "mid" else layers
        for m in modalities:
            stacks[f"encoder.{m}"] = (f"Transformer_{SCENIC_MODALITY[m]}", own)
        if config.fusion == "mid":
            stacks["encoder.both"] = ("Transformer_concat", config.fusion_layers)
    if config.decoding == "separate":
        for m in modalities:
            stacks[f"decoder.{m}"] = (f"Decoder_{SCENIC_MODALITY[m]}", config.decoder.layers)
    else:
        stacks["decoder.both"] = ("Decoder", config.decoder.layers)
    return stacks


def entries_of(config: ModelConfig) -> list[Entry]:
    """The whole table: one entry for each parameter of a model.

    Raises:
        ConvertError: the model has a part that Scenic's has not.
    """
    for name, released in _RELEASED.items():
        if getattr(config, name) != released:
            value = getattr(config, name)
            raise ConvertError(f"Scenic's model has no {name} = {value!r}: it must be {released!r}")
    entries = [entry for m in config.modalities for entry in _modality_entries(config, m)]
    for prefix, (scenic, layers) in stack_names(config).items():
        stack = config.encoder if prefix.startswith("encoder") else config.decoder
        for i in range(layers):
            entries += block_entries(f"{prefix}.blocks.{i}", f"{scenic}/encoderblock_{i}", stack)
        if config.encoder_norm:
            entries += norm_entries(f"{prefix}.norm", f"{scenic}/encoder_norm", stack.width)
    return entries


def _modality_entries(config: ModelConfig, m: Modality) -> list[Entry]:
    spec, name = config.input(m), SCENIC_MODALITY[m]
    width, narrow, values = config.encoder.width, config.decoder.width, spec.patch_dim
    entries = [
        *embedding_entries(f"patch_embed.{m}", f"embedding_{name}", spec, width),
        token_entry(f"mask_token.{m}", f"mask_token_{name}", narrow),
    ]
    entries += dense_entries(
        f"decoder_embed.{m}",
        f"decoder_projection_{name}",
        width,
        narrow,
        bias=config.projection_bias,
    )
    entries += dense_entries(f"head.{m}", f"output_projection_{name}", narrow, values)
    if config.modality_tokens:
        entries.append(token_entry(f"modality_token.{m}", f"Encoder_modality_token_{name}", width))
        entries.append(
            token_entry(f"decoder_modality_token.{m}", f"Decoder_modality_token_{name}", narrow)
        )
    if config.positions == "learned":
        table, shape = f"posembed_input_{name}/pos_embedding", (spec.tokens, width)
        entries.append(Entry(f"pos_embed.{m}", (table,), (1, *shape), shape))
    return entries


def embedding_entries(
    name: str, scenic: str, spec: VideoConfig | AudioConfig, width: int
) -> list[Entry]:
    """A patch embedding."""
    patch = (*spec.tubelet, 3) if isinstance(spec, VideoConfig) else (*spec.patch, 1)
    kernel = Entry(
        f"{name}.weight",
        (f"{scenic}/kernel",),
        (*patch, width),
        (width, spec.patch_dim),
        axes=(len(patch), *range(len(patch))),
    )
    return [kernel, Entry(f"{name}.bias", (f"{scenic}/bias",), (width,), (width,))]


def block_entries(name: str, scenic: str, stack: StackConfig) -> list[Entry]:
    """A transformer block."""
    width, heads = stack.width, (stack.heads, stack.head_dim)
    attention = f"{scenic}/MultiHeadDotProductAttention_0"
    qkv = [f"{attention}/{part}" for part in ("query", "key", "value")]
    return [
        *norm_entries(f"{name}.norm1", f"{scenic}/LayerNorm_0", width),
        Entry(
            f"{name}.attn.qkv.weight",
            tuple(f"{part}/kernel" for part in qkv),
            (width, *heads),
            (width, width),
            axes=(1, 2, 0),
        ),
        Entry(f"{name}.attn.qkv.bias", tuple(f"{part}/bias" for part in qkv), heads, (width,)),
        Entry(
            f"{name}.attn.proj.weight",
            (f"{attention}/out/kernel",),
            (*heads, width),
            (width, width),
            axes=(2, 0, 1),
        ),
        Entry(f"{name}.attn.proj.bias", (f"{attention}/out/bias",), (width,), (width,)),
        *norm_entries(f"{name}.norm2", f"{scenic}/LayerNorm_1", width),
        *dense_entries(f"{name}.mlp.fc1", f"{scenic}/MlpBlock_0/Dense_0", width, stack.mlp),
        *dense_entries(f"{name}.mlp.fc2", f"{scenic}/MlpBlock_0/Dense_1", stack.mlp, width),
    ]


def norm_entries(name: str, scenic: str, width: int) -> list[Entry]:
    """A LayerNorm."""
    return [
        Entry(f"{name}.weight", (f"{scenic}/scale",), (width,), (width,)),
        Entry(f"{name}.bias", (f"{scenic}/bias",), (width,), (width,)),
    ]


def dense_entries(
    name: str, scenic: str, inputs: int, outputs: int, bias: bool = True
) -> list[Entry]:
    """A linear layer."""
    kernel = Entry(
        f"{name}.weight",
        (f"{scenic}/kernel",),
        (inputs, outputs),
        (outputs, inputs),
        axes=(1, 0),
    )
    if not bias:
        return [kernel]
    return [kernel, Entry(f"{name}.bias", (f"{scenic}/bias",), (outputs,), (outputs,))]


def token_entry(name: str, scenic: str, width: int) -> Entry:
    """A single learned vector."""
    return Entry(name, (scenic,), (1, 1, width), (width,))
