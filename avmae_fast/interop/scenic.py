"""Pretraining weights of the authors' code (Scenic, Flax) to our state dict and back.

A table says, for each of our names, which leaves of the Flax tree hold it and how they are laid
out; both directions and every error follow from that table.
Layouts: Flax stores kernels as [in, out], attention kernels as [in, H, d] or [H, d, out] and patch
kernels as [t, h, w, c, out] or [time, frequency, 1, out]; H heads, d head_dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avmae_fast.config import AudioConfig, Modality, ModelConfig, StackConfig, VideoConfig

SCENIC_MODALITY: dict[Modality, str] = {"video": "rgb", "audio": "spectrogram"}

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Entry:
    """One of our parameters and where Scenic keeps it.

    name: our state-dict name.
    leaves: Flax path of each part; query, key and value are stacked into one parameter.
    flax_shape: shape of a leaf.
    part_shape: our shape of a part, before stacking.
    transpose: whether the leaf, as a matrix, has its inputs first.
    """

    name: str
    leaves: tuple[str, ...]
    flax_shape: tuple[int, ...]
    part_shape: tuple[int, ...]
    transpose: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of our parameter."""
        return len(self.leaves) * self.part_shape[0], *self.part_shape[1:]


def from_scenic(params: Mapping[str, Array], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict, from Flax leaves by path ("Transformer/encoderblock_0/...").

    Args:
        params: every parameter of the model; dtypes are kept.
        config: the model the parameters belong to.

    Raises:
        ValueError: leaves are missing, superfluous or of another shape; the text names them.
    """
    return read_leaves(params, entries_of(config))


def read_leaves(params: Mapping[str, Array], entries: Sequence[Entry]) -> dict[str, Tensor]:
    """`from_scenic` by any table."""
    _check(params, {leaf: e.flax_shape for e in entries for leaf in e.leaves}, "Scenic leaves")
    state = {}
    for entry in entries:
        parts = [np.asarray(params[leaf]) for leaf in entry.leaves]
        if entry.transpose:
            parts = [part.reshape(entry.part_shape[::-1]).T for part in parts]
        else:
            parts = [part.reshape(entry.part_shape) for part in parts]
        state[entry.name] = torch.from_numpy(np.concatenate(parts))
    return state


def to_scenic(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Array]:
    """Flax leaves by path, from our state dict (or from gradients under the same names).

    Raises:
        ValueError: names are missing, superfluous or of another shape; the text names them.
    """
    return write_leaves(state, entries_of(config))


def write_leaves(state: Mapping[str, Tensor], entries: Sequence[Entry]) -> dict[str, Array]:
    """`to_scenic` by any table."""
    _check(state, {entry.name: entry.shape for entry in entries}, "parameters")
    leaves = {}
    for entry in entries:
        stacked = state[entry.name].detach().cpu().numpy()
        for leaf, part in zip(entry.leaves, np.split(stacked, len(entry.leaves)), strict=True):
            part = part.T if entry.transpose else part
            leaves[leaf] = np.ascontiguousarray(part).reshape(entry.flax_shape)
    return leaves


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
    """The whole table: one entry for each parameter of a model."""
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
        transpose=True,
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
            transpose=True,
        ),
        Entry(f"{name}.attn.qkv.bias", tuple(f"{part}/bias" for part in qkv), heads, (width,)),
        Entry(
            f"{name}.attn.proj.weight",
            (f"{attention}/out/kernel",),
            (*heads, width),
            (width, width),
            transpose=True,
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
        transpose=True,
    )
    if not bias:
        return [kernel]
    return [kernel, Entry(f"{name}.bias", (f"{scenic}/bias",), (outputs,), (outputs,))]


def token_entry(name: str, scenic: str, width: int) -> Entry:
    """A single learned vector."""
    return Entry(name, (scenic,), (1, 1, width), (width,))


def _check(
    given: Mapping[str, Array] | Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    what: str,
) -> None:
    problems = []
    if missing := sorted(shapes.keys() - given.keys()):
        problems.append(f"missing {missing}")
    if unknown := sorted(given.keys() - shapes.keys()):
        problems.append(f"unknown {unknown}")
    for name in sorted(shapes.keys() & given.keys()):
        if tuple(given[name].shape) != shapes[name]:
            got, want = tuple(given[name].shape), shapes[name]
            problems.append(f"{name} has shape {got}, want {want}")
    if problems:
        raise ValueError(f"{what} do not fit the model: " + "; ".join(problems))
