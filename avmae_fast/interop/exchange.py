"""Weights of other code bases to a model of ours and back, in memory."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from avmae_fast.config import AudioConfig, ModelConfig, VideoConfig
from avmae_fast.interop import cav_mae, huggingface
from avmae_fast.interop.detect import FORMATS, detect
from avmae_fast.interop.entries import ConvertError, listed, to_ours, to_theirs
from avmae_fast.interop.names import NAMES, Names
from avmae_fast.interop.pixels import PIXELS, fold_pixels, unfold_pixels
from avmae_fast.interop.tables import (
    join_tables,
    recognise,
    resize,
    split_table,
    write_out,
)
from avmae_fast.interop.vit import Shape, config_of, entries_of, respell, set_aside
from avmae_fast.models import AudiovisualMAE, Encoder


@dataclass(frozen=True)
class Imported:
    """A model of ours made from the weights of others.

    decoder: whether the state holds the decoder that pretrained it.
    source: its format and pixels, which `export_weights` needs to undo the import.
    notes: what was assumed, recognised or left out, a line each.
    left_out: tensors the model has no place for, under their names.
    """

    config: ModelConfig
    state: dict[str, Tensor]
    decoder: bool
    source: dict[str, str]
    notes: list[str]
    left_out: dict[str, Tensor]

    def model(self) -> Encoder:
        """The model itself, in evaluation mode; an `AudiovisualMAE` where there is a decoder."""
        model = (AudiovisualMAE if self.decoder else Encoder)(self.config)
        model.load_state_dict(self.state)
        return model.eval()


def import_weights(
    tensors: Mapping[str, Tensor],
    source: str | None = None,
    *,
    shape: Shape | None = None,
    pixels: str | None = None,
    encoder_only: bool = False,
    resize_to: tuple[int, ...] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Imported:
    """A model of ours from the weights of another code base.

    Args:
        tensors: by their names, as its state dict has them.
        source: one of `FORMATS`; None finds it out.
        shape: what tensors do not say, where it is not as published.
        pixels: the input normalisation the weights expect, a name in `PIXELS`: it goes into the
            patch embedding, so that the model takes pixels in [-1, 1]. Needed where the format
            does not tell.
        encoder_only: leave the decoder out, as is needed where ours cannot be like theirs.
        resize_to: frames, height and width the model is to have (for sound: rows); learned
            positions are interpolated.
        config: a config.json of Hugging Face.

    Raises:
        ConvertError: tensors are missing, unknown or of another shape, or our model cannot
            compute what theirs does.
    """
    source = source or detect(tensors, config)
    config = config or {}
    if source == "cav-mae":
        return _import_cav_mae(tensors, shape or Shape(), pixels, encoder_only)
    names = _names(source)
    shape = huggingface.shape_of(config, shape or Shape())
    pixels = pixels or huggingface.pixels_of(config) or names.pixels
    if names.modality == "video" and pixels is None:
        raise ConvertError(
            f"pixels is not set: {source} weights do not tell what pixels they expect; it must be "
            f"one of {', '.join(PIXELS)} (DeiT, DINO and MAE: imagenet; most of Google's: signed)"
        )
    own, left_out = set_aside(respell(tensors, names), names.left_out)
    own, shape = _join(own, names, shape)
    effective = _with_joined_tables(names)
    has_decoder = names.decoder is not None and f"{names.decoder.embed}.weight" in own
    if encoder_only and names.decoder is not None:
        own, of_decoder = set_aside(own, _decoder_patterns(names))
        left_out |= of_decoder
        has_decoder = False
    model = config_of(own, effective, shape)
    try:
        state = to_ours(entries_of(effective, model, has_decoder), own, f"{source} weights")
    except ConvertError as error:
        hint = "; encoder_only would leave the decoder out" if has_decoder else ""
        raise ConvertError(f"{error}{hint}") from error
    notes = _assumptions(effective, model)
    return _finish(model, state, has_decoder, source, pixels, notes, left_out, resize_to)


def export_weights(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    target: str,
    *,
    pixels: str | None = None,
    left_out: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a model of ours under the names, and in the layouts, of another code base.

    Args:
        state: the state dict of an `Encoder` or an `AudiovisualMAE`.
        pixels: the input normalisation their code applies; None: the format's own.
        left_out: tensors that an import set aside, which are put back.

    Returns:
        The tensors, and what their code must be told, a line each.

    Raises:
        ConvertError: the format has no such model.
    """
    decoder = any(name.startswith("decoder.") for name in state)
    if target == "cav-mae":
        full, learned = write_out(state, config, decoder)
        full = _map_pixels(full, pixels or "imagenet", unfold_pixels)
        theirs = to_theirs(cav_mae.entries_of(learned, decoder), full)
        return {**theirs, **(left_out or {})}, _told(config, 1e-5)
    names = _with_joined_tables(_names(target))
    pixels = pixels or names.pixels or ("signed" if names.modality == "video" else None)
    if config.modalities != (names.modality,):
        has = " and ".join(config.modalities)
        raise ConvertError(f"{names.label} holds {names.modality} alone, this model has {has}")
    if decoder and names.decoder is None:
        raise ConvertError(f"{names.label} holds no decoder: give the encoder's weights alone")
    full, learned = _as_separate(state, config)
    if names.positions is not None:
        stored = names.decoder is not None and names.decoder.positions is not None
        full, learned = _stored_tables(full, learned, decoder, stored, names)
    elif config.positions != names.computed:
        raise ConvertError(
            f"{names.label} computes its positions as {names.computed}, this model's are "
            f"{config.positions}"
        )
    if pixels is not None:
        full = _map_pixels(full, pixels, unfold_pixels)
    theirs = to_theirs(entries_of(names, learned, decoder), full)
    theirs = _split(theirs, _names(target), config)
    notes = [] if target.startswith("hf-") else _told(config, names.layer_norm_eps)
    return {**theirs, **(left_out or {})}, notes


def _import_cav_mae(
    tensors: Mapping[str, Tensor], shape: Shape, pixels: str | None, encoder_only: bool
) -> Imported:
    own, left_out = set_aside(tensors, cav_mae.LEFT_OUT)
    if encoder_only:
        own, of_decoder = set_aside(own, ("decoder*", "mask_token"))
        left_out |= of_decoder
    decoder = "decoder_embed.weight" in own
    model = cav_mae.config_of(own, shape.heads, shape.decoder_heads, decoder)
    state = to_ours(cav_mae.entries_of(model, decoder), own, "cav-mae weights")
    return _finish(model, state, decoder, "cav-mae", pixels or "imagenet", [], left_out, None)


def _finish(
    config: ModelConfig,
    state: dict[str, Tensor],
    decoder: bool,
    source: str,
    pixels: str | None,
    notes: list[str],
    left_out: dict[str, Tensor],
    resize_to: tuple[int, ...] | None,
) -> Imported:
    """Positions and pixels, and what to say about them."""
    state, config, found = recognise(state, config)
    notes = notes + found
    if resize_to is not None:
        spec = _resized(config, resize_to)
        state = resize(state, config, spec)
        config = replace(config, **{_modality(config): spec})  # type: ignore[arg-type]
        notes.append(f"resized to {'x'.join(map(str, resize_to))}")
    record = {"format": source}
    if pixels is not None and config.video is not None:
        state, record["pixels"] = _map_pixels(state, pixels, fold_pixels), pixels
        if pixels != "signed":
            notes.append(f"pixels: {pixels} normalisation is now part of the patch embedding")
        if pixels != "signed" and decoder and config.target_norm in ("none", "patch_unbiased"):
            notes.append("the decoder predicts their pixels: on ours its loss is another")
    if source == "hf-videomae" and decoder and config.layer_norm_eps != 1e-5:
        notes.append("their decoder's last LayerNorm has epsilon 1e-5, here it is as the others'")
    if left_out:
        notes.append(f"left out: {listed(sorted(left_out))}")
    return Imported(config, state, decoder, record, notes, left_out)


def _assumptions(names: Names, config: ModelConfig) -> list[str]:
    """What was taken as published, since no tensor says it."""
    notes = [f"{config.encoder.heads} heads, LayerNorm epsilon {config.layer_norm_eps:g}, "
             f"GELU {config.gelu}"]  # fmt: skip
    if config.video is not None:
        v = config.video
        notes.append(f"{v.frames} frames of {v.height} x {v.width} in patches of {v.tubelet}")
    if config.audio is not None:
        a = config.audio
        notes.append(f"{a.frames} rows of {a.mel_bins} mel bins, mean {a.mean:g}, std {a.std:g}")
    return notes


def _told(config: ModelConfig, eps: float) -> list[str]:
    """What their code must be told, because its names do not say it."""
    told = []
    if config.gelu != "erf":
        told.append("GELU is the tanh approximation: their code must be told")
    if config.layer_norm_eps != eps:
        told.append(f"LayerNorm epsilon is {config.layer_norm_eps:g}, theirs is {eps:g}")
    return told


def _names(source: str) -> Names:
    if source not in NAMES:
        raise ConvertError(f"format {source!r} is not one of {', '.join(FORMATS)}")
    return NAMES[source]


def _decoder_patterns(names: Names) -> tuple[str, ...]:
    parts = names.decoder
    if parts is None:
        return ()
    starts = (parts.embed, parts.norm, parts.head, parts.block.partition("{}")[0], "decoder")
    return (parts.mask_token, *(f"{start}*" for start in starts))


def _with_joined_tables(names: Names) -> Names:
    """The same names with one position table for three."""
    return replace(names, positions="pos_embed") if names.split_positions else names


def _join(
    tensors: dict[str, Tensor], names: Names, shape: Shape
) -> tuple[dict[str, Tensor], Shape]:
    """Tables of space, time and class token as one of all tokens."""
    if names.split_positions is None:
        return tensors, shape
    joined = dict(tensors)
    for start in ("", "decoder_"):
        parts = [f"{start}{name}" for name in names.split_positions]
        if any(name in joined for name in parts):
            if missing := [name for name in parts if name not in joined]:
                raise ConvertError(f"missing {listed(missing)}")
            space, time, first = (joined.pop(name) for name in parts)
            joined[f"{start}pos_embed"] = join_tables(space, time, first)
            kernel = tensors.get(f"{names.patch_embed}.weight")
            if not start and kernel is not None and kernel.ndim == 5:
                shape = replace(shape, frames=shape.frames or time.shape[1] * kernel.shape[2])
    return joined, shape


def _split(tensors: dict[str, Tensor], names: Names, config: ModelConfig) -> dict[str, Tensor]:
    """Undo `_join`."""
    if names.split_positions is None or config.video is None:
        return tensors
    apart = dict(tensors)
    for start in ("", "decoder_"):
        if f"{start}pos_embed" in apart:
            table = apart.pop(f"{start}pos_embed")
            parts = split_table(table, config.video.grid[0], config.prefix_tokens)
            named = zip(names.split_positions, parts, strict=True)
            apart |= {f"{start}{name}": part for name, part in named}
    return apart


def _stored_tables(
    state: dict[str, Tensor], config: ModelConfig, decoder: bool, stored: bool, names: Names
) -> tuple[dict[str, Tensor], ModelConfig]:
    """Fixed positions as the tables that a format keeps, unless it computes the same itself."""
    if config.positions == names.computed == "sincos1d":
        return state, config
    full, learned = write_out(state, config, decoder and stored)
    if decoder and not stored and config.positions != names.computed:
        raise ConvertError(
            f"{names.label} computes its decoder's positions as {names.computed}, this model's "
            f"are others"
        )
    return full, learned


def _as_separate(
    state: Mapping[str, Tensor], config: ModelConfig
) -> tuple[dict[str, Tensor], ModelConfig]:
    """A model of one modality with its one stack under the modality's name."""
    m = _modality(config)
    if config.fusion == "mid":
        raise ConvertError("a model of mid fusion has two stacks, this format has one")
    renamed = {}
    for name, x in state.items():
        name = re.sub(r"^encoder\.both\.", f"encoder.{m}.", name)
        renamed[re.sub(rf"^decoder\.{m}\.", "decoder.both.", name)] = x
    return renamed, replace(config, fusion="separate", decoding="shared")


def _modality(config: ModelConfig) -> str:
    return config.modalities[0]


def _map_pixels(state: Mapping[str, Tensor], pixels: str, change: Any) -> dict[str, Tensor]:
    """The state with its patch embedding for other pixels."""
    if pixels == "signed" or "patch_embed.video.weight" not in state:
        return dict(state)
    names = ("patch_embed.video.weight", "patch_embed.video.bias")
    with torch.no_grad():
        weight, bias = change(*(state[name].cpu() for name in names), pixels)
    return {**state, names[0]: weight, names[1]: bias}


def _resized(config: ModelConfig, size: tuple[int, ...]) -> VideoConfig | AudioConfig:
    if len(config.modalities) == 1 and config.video is not None and len(size) == 3:
        return replace(config.video, frames=size[0], height=size[1], width=size[2])
    if len(config.modalities) == 1 and config.audio is not None and len(size) == 1:
        return replace(config.audio, frames=size[0])
    raise ConvertError(
        f"resize_to = {size} is not valid: it must be frames, height and width of a video model, "
        "or the rows of an audio model"
    )
