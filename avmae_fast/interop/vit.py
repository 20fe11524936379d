"""Vision transformers of one modality, by the tables of `names`: name maps and configurations.

Shape letters: D width, P prefix tokens, N tokens of the grid.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

from torch import Tensor

from avmae_fast.config import (
    AudioConfig,
    ConfigError,
    ModelConfig,
    StackConfig,
    TargetNorm,
    VideoConfig,
)
from avmae_fast.interop.entries import ConvertError, Entry, listed
from avmae_fast.interop.names import ENCODER_HEADS, Names

# The decoder of a configuration whose weights are an encoder's alone; nothing is made from it.
_NO_DECODER = StackConfig(width=384, layers=4, heads=6, mlp=1536)
_MEL_BINS = 128


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What tensors do not say, from a configuration file or the caller; None: as published.

    heads, decoder_heads: attention heads. frames: pictures, or rows of a spectrogram.
    size: height and width of the pictures.
    """

    heads: int | None = None
    decoder_heads: int | None = None
    frames: int | None = None
    size: tuple[int, int] | None = None
    layer_norm_eps: float | None = None
    gelu: Literal["tanh", "erf"] = "erf"
    target_norm: TargetNorm | None = None


def respell(tensors: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The same tensors under the names of the table."""
    respelt = {}
    for name, tensor in tensors.items():
        for pattern, replacement in names.renames:
            name = re.sub(pattern, replacement, name)
        respelt[name] = tensor
    return respelt


def set_aside(
    tensors: Mapping[str, Tensor], patterns: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What belongs to the model, and what a pattern leaves out."""
    aside = {n: x for n, x in tensors.items() if any(fnmatch(n, p) for p in patterns)}
    return {n: x for n, x in tensors.items() if n not in aside}, aside


def config_of(tensors: Mapping[str, Tensor], names: Names, shape: Shape) -> ModelConfig:
    """The configuration of a model, from the shapes of its tensors; its positions are learned.

    Raises:
        ConvertError: a tensor that says the geometry is missing or has an impossible shape, or
            something that no tensor says is needed.
    """
    weight = _tensor(tensors, f"{names.patch_embed}.weight", len(names.conv_axes.split()))
    width, _, *patch = weight.shape
    encoder = _stack(tensors, names.block, width, shape.heads, ENCODER_HEADS, "heads")
    decoder = _NO_DECODER
    if names.decoder and f"{names.decoder.embed}.weight" in tensors:
        rows, heads = _tensor(tensors, f"{names.decoder.embed}.weight", 2).shape[0], shape
        decoder = _stack(
            tensors,
            names.decoder.block,
            rows,
            heads.decoder_heads,
            names.decoder.heads,
            "decoder_heads",
        )
    prefix = sum(name in tensors for name in names.prefix)
    stored = tensors.get(names.positions or "")
    if stored is None and names.positions is not None and names.computed == "sincos_grid":
        raise ConvertError(f"missing {names.positions}")
    tokens = None if stored is None else stored.shape[1] - prefix
    inputs: dict[str, VideoConfig | AudioConfig | None] = {"video": None, "audio": None}
    try:
        if names.modality == "audio":
            inputs["audio"] = _audio(patch, tokens, names, shape)
        else:
            inputs["video"] = _video(patch, tokens, names, shape)
        return ModelConfig(
            encoder=encoder,
            decoder=decoder,
            fusion="separate",
            decoding="shared",
            positions="learned" if stored is not None else names.computed,  # type: ignore[arg-type]
            decoder_positions="learned" if names.decoder and names.decoder.positions else "fixed",
            prefix_tokens=prefix,
            encoder_norm=f"{names.norm}.weight" in tensors,
            projection_bias=names.decoder is None or names.decoder.embed_bias,
            gelu=shape.gelu,
            layer_norm_eps=shape.layer_norm_eps or names.layer_norm_eps,
            target_norm=shape.target_norm or names.target_norm,
            **inputs,  # type: ignore[arg-type]
        )
    except ConfigError as error:
        raise ConvertError(f"these tensors make no model of ours: {error}") from error


def entries_of(names: Names, config: ModelConfig, decoder: bool) -> list[Entry]:
    """The whole table of a model, with the decoder or without."""
    m, width, prefix = names.modality, config.encoder.width, config.prefix_tokens
    if config.modalities != (m,):
        has = " and ".join(config.modalities)
        raise ConvertError(f"{names.label} holds {m} alone, this model has {has}")
    rows = prefix + config.input(m).tokens
    entries = _patch_embed(names, config)
    if not names.least_prefix <= prefix <= len(names.prefix):
        room = f"{names.least_prefix} to {len(names.prefix)}"
        raise ConvertError(f"{names.label} has {room} prefix tokens, this model has {prefix}")
    if prefix:
        leaves = names.prefix[:prefix]
        entries.append(Entry(f"prefix_token.{m}", leaves, (1, 1, width), (1, width)))
    if config.positions == "learned":
        if names.positions is None:
            raise ConvertError(f"{names.label} has no learned positions, this model has")
        shape = rows, width
        entries.append(Entry(f"pos_embed.{m}", (names.positions,), (1, *shape), shape))
    entries += _stack_entries(f"encoder.{m}", names.block, names.rows, config.encoder)
    if config.encoder_norm:
        entries += _rows(f"encoder.{m}.norm", names.norm, (width,))
    return entries + (_decoder_entries(names, config) if decoder else [])


def _patch_embed(names: Names, config: ModelConfig) -> list[Entry]:
    """The convolution: theirs has the channels first, our rows have them last."""
    spec, width = config.input(names.modality), config.encoder.width
    axes = names.conv_axes.split()
    if isinstance(spec, AudioConfig):
        sizes = {"t": spec.patch[0], "f": spec.patch[1], "c": 1}
    else:
        sizes = dict(zip("thw", spec.tubelet, strict=True)) | {"c": 3}
        if "t" not in axes and spec.tubelet[0] != 1:
            raise ConvertError(
                f"{names.label} has patches of one frame, this model's tubelet is {spec.tubelet}"
            )
    kernel = tuple(width if axis == "D" else sizes[axis] for axis in axes)
    ours = [axis for axis in ("D", "t", "h", "w", "f", "c") if axis in axes]
    weight = Entry(
        f"patch_embed.{names.modality}.weight",
        (f"{names.patch_embed}.weight",),
        kernel,
        (width, spec.patch_dim),
        axes=tuple(axes.index(axis) for axis in ours),
    )
    bias = (f"{names.patch_embed}.bias",)
    return [weight, Entry(f"patch_embed.{names.modality}.bias", bias, (width,), (width,))]


def _decoder_entries(names: Names, config: ModelConfig) -> list[Entry]:
    parts, m = names.decoder, names.modality
    assert parts is not None  # who asks for a decoder knows that there is one
    width, narrow, spec = config.encoder.width, config.decoder.width, config.input(m)
    if config.projection_bias != parts.embed_bias:
        without = "no" if config.projection_bias else "a"
        raise ConvertError(f"{names.label} has {without} bias in {parts.embed}")
    entries = [
        Entry(f"decoder_embed.{m}.weight", (f"{parts.embed}.weight",), *2 * [(narrow, width)]),
        Entry(f"mask_token.{m}", (parts.mask_token,), (1, 1, narrow), (narrow,)),
    ]
    if parts.embed_bias:
        entries.append(Entry(f"decoder_embed.{m}.bias", (f"{parts.embed}.bias",), *2 * [(narrow,)]))
    if config.decoder_positions == "learned":
        if parts.positions is None:
            raise ConvertError(f"{names.label} has no learned decoder positions, this model has")
        shape = config.prefix_tokens + spec.tokens, narrow
        entries.append(Entry(f"decoder_pos_embed.{m}", (parts.positions,), (1, *shape), shape))
    entries += _stack_entries("decoder.both", parts.block, names.rows, config.decoder)
    entries += _rows("decoder.both.norm", parts.norm, (narrow,))
    return entries + _rows(f"head.{m}", parts.head, (spec.patch_dim, narrow))


def _stack_entries(
    prefix: str, block: str, rows: Mapping[str, str], stack: StackConfig
) -> list[Entry]:
    entries = []
    for i in range(stack.layers):
        entries += block_entries(f"{prefix}.blocks.{i}", block.format(i), rows, stack)
    return entries


def block_entries(
    ours: str, theirs: str, rows: Mapping[str, str], stack: StackConfig
) -> list[Entry]:
    """The rows of one block."""
    D, hidden = stack.width, stack.mlp
    shapes = {
        "norm1": (D,),
        "norm2": (D,),
        "attn.qkv": (3 * D, D),
        "attn.proj": (D, D),
        "mlp.fc1": (hidden, D),
        "mlp.fc2": (D, hidden),
    }
    entries = []
    for name, leaves in rows.items():
        there = " ".join(leaf if leaf == "-" else f"{theirs}.{leaf}" for leaf in leaves.split())
        part = name.removesuffix(".weight").removesuffix(".bias")
        entries += _rows(f"{ours}.{name}", there, shapes[part])
    return entries


def _rows(ours: str, theirs: str, shape: tuple[int, ...]) -> list[Entry]:
    """Weight and bias of a part, or the one that is named."""
    if ours.endswith((".weight", ".bias")):
        suffixes = [("", shape if ours.endswith(".weight") else shape[:1])]
    else:
        suffixes = [(".weight", shape), (".bias", shape[:1])]
    entries = []
    for suffix, whole in suffixes:
        leaves = tuple(None if leaf == "-" else leaf + suffix for leaf in theirs.split())
        part = whole[0] // len(leaves), *whole[1:]
        entries.append(Entry(ours + suffix, leaves, part, part))
    return entries


def _stack(
    tensors: Mapping[str, Tensor],
    block: str,
    width: int,
    heads: int | None,
    known: Mapping[int, int],
    field: str,
) -> StackConfig:
    first, _, rest = block.partition("{}")
    pattern = re.compile(re.escape(first) + r"(\d+)" + re.escape(rest) + r"\.")
    numbers = {int(found[1]) for name in tensors if (found := pattern.match(name))}
    if numbers != set(range(len(numbers))) or not numbers:
        raise ConvertError(f"blocks {block} are numbered {sorted(numbers)}, want 0 and on")
    names = [n for n in tensors if n.startswith(f"{block.format(0)}.")]
    # The only vector that is neither of the width nor three of it is the bias of the hidden layer.
    hidden = [n for n in names if n.endswith((".mlp.fc1.bias", ".intermediate.dense.bias"))]
    if not hidden:
        raise ConvertError(f"block {block.format(0)} has no hidden layer, only {listed(names)}")
    heads = heads or known.get(width)
    if heads is None:
        raise ConvertError(
            f"{field} is not set: no tensor says it, and no published model is {width} wide"
        )
    try:
        return StackConfig(
            width=width, layers=len(numbers), heads=heads, mlp=tensors[hidden[0]].shape[0]
        )
    except ConfigError as error:
        raise ConvertError(str(error)) from error


def _video(patch: list[int], tokens: int | None, names: Names, shape: Shape) -> VideoConfig:
    t, h, w = (1, *patch) if len(patch) == 2 else patch
    frames = shape.frames or (1 if len(patch) == 2 else 16)
    if shape.size is not None:
        height, width = shape.size
    elif tokens is None:
        height = width = 224
    else:
        side = math.isqrt(tokens // max(frames // t, 1))
        height, width = side * h, side * w
    video = VideoConfig(
        frames=frames,
        height=height,
        width=width,
        tubelet=(t, h, w),
        mask_ratio=0.75 if frames == 1 else 0.9,
        mask="tube" if names.computed == "sincos1d" else "random",
        loss_weight=1.0,
    )
    if tokens is not None and video.tokens != tokens:
        raise ConvertError(
            f"{names.positions} is for {tokens} tokens, but {video.frames} frames of "
            f"{video.height} x {video.width} make {video.tokens}: say frames and size"
        )
    return video


def _audio(patch: list[int], tokens: int | None, names: Names, shape: Shape) -> AudioConfig:
    rows = _MEL_BINS // patch[1]
    frames = shape.frames or (1024 if tokens is None else tokens // rows * patch[0])
    audio = AudioConfig(
        frames=frames,
        mel_bins=_MEL_BINS,
        patch=(patch[0], patch[1]),
        mask_ratio=0.8,
        loss_weight=1.0,
        mean=names.audio_scale[0],
        std=names.audio_scale[1],
    )
    if tokens is not None and audio.tokens != tokens:
        raise ConvertError(
            f"{names.positions} is for {tokens} tokens, but {audio.frames} rows of {_MEL_BINS} "
            f"bins make {audio.tokens}"
        )
    return audio


def _tensor(tensors: Mapping[str, Tensor], name: str, axes: int) -> Tensor:
    if name not in tensors:
        raise ConvertError(f"missing {name}")
    if tensors[name].ndim != axes:
        shape = tuple(tensors[name].shape)
        raise ConvertError(f"{name} has shape {shape}, want {axes} axes")
    return tensors[name]
