"""CAV-MAE: the joint path of its reconstruction, a mid fusion without the middle LayerNorm.

Its audio convolution sees (frequency, time), and its audio tokens run along time first: both are
turned to ours. Encoder blocks keep a LayerNorm for each of their uses; those of the contrastive
path, which this model has not, are left out.
Source: the released code's names; its LayerNorms have PyTorch's own epsilon.
"""

from collections.abc import Mapping

from torch import Tensor

from avmae_fast.config import (
    AudioConfig,
    ConfigError,
    Modality,
    ModelConfig,
    StackConfig,
    VideoConfig,
)
from avmae_fast.interop.entries import ConvertError, Entry
from avmae_fast.interop.names import ENCODER_HEADS
from avmae_fast.interop.vit import block_entries

LABEL = "CAV-MAE in its authors' naming"
LEFT_OUT = (
    "blocks_a.*.norm?.*",
    "blocks_a.*.norm?_v.*",
    "blocks_v.*.norm?.*",
    "blocks_v.*.norm?_a.*",
    "blocks_u.*.norm?_[av].*",
    "norm_[av].*",
    "decoder_blocks.*.norm?_[av].*",
)
_LETTER: dict[Modality, str] = {"video": "v", "audio": "a"}
_SAME = {name: name for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
_ROWS: dict[str, dict[str, str]] = {
    letter: {**_SAME, "norm1": f"norm1_{letter}", "norm2": f"norm2_{letter}"} for letter in "av"
}
_JOINT_ROWS = {**_SAME, "norm1": "norm1", "norm2": "norm2"}
_DECODER_HEADS = 16
_MEL_BINS = 128


def config_of(
    tensors: Mapping[str, Tensor], heads: int | None, decoder_heads: int | None, decoder: bool
) -> ModelConfig:
    """The configuration of a model from the shapes of its tensors; all its tables are learned."""
    try:
        width, _, *patch = tensors["patch_embed_a.proj.weight"].shape
        tokens = {m: tensors[f"pos_embed_{letter}"].shape[1] for m, letter in _LETTER.items()}
        own, joint = (_count(tensors, f"blocks_{kind}.") for kind in "au")
        heads = heads or ENCODER_HEADS.get(width)
        if heads is None:
            raise ConvertError(f"heads is not set: no published model is {width} wide")
        narrow = tensors["decoder_embed.weight"].shape[0] if decoder else 384
        side = round(tokens["video"] ** 0.5) * patch[0]
        return ModelConfig(
            encoder=StackConfig(
                width=width,
                layers=own + joint,
                heads=heads,
                mlp=tensors["blocks_a.0.mlp.fc1.bias"].shape[0],
            ),
            decoder=StackConfig(
                width=narrow,
                layers=_count(tensors, "decoder_blocks.") or 1,
                heads=(decoder_heads or _DECODER_HEADS) if decoder else 6,
                mlp=tensors["decoder_blocks.0.mlp.fc1.bias"].shape[0] if decoder else 4 * narrow,
            ),
            video=VideoConfig(
                frames=1,
                height=side,
                width=side,
                tubelet=(1, patch[0], patch[1]),
                mask_ratio=0.75,
                loss_weight=1.0,
            ),
            audio=AudioConfig(
                frames=tokens["audio"] // (_MEL_BINS // patch[0]) * patch[1],
                mel_bins=_MEL_BINS,
                patch=(patch[1], patch[0]),
                mask_ratio=0.75,
                loss_weight=1.0,
                mean=-5.081,
                std=4.4849,
            ),
            fusion="mid",
            fusion_layers=joint,
            decoding="joint",
            positions="learned",
            decoder_positions="learned",
            modality_tokens=True,
            middle_norm=False,
            gelu="erf",
            layer_norm_eps=1e-5,
            target_norm="patch_unbiased",
        )
    except KeyError as error:
        raise ConvertError(f"missing {error.args[0]}") from error
    except ConfigError as error:
        raise ConvertError(f"these tensors make no model of ours: {error}") from error


def entries_of(config: ModelConfig, decoder: bool) -> list[Entry]:
    """The whole table of a model, with the decoder or without.

    Raises:
        ConvertError: the model is of another kind than CAV-MAE.
    """
    _check(config)
    width, own = config.encoder.width, config.encoder.layers - config.fusion_layers
    entries = []
    for m, letter in _LETTER.items():
        entries += _inputs(config, m, letter)
        for i in range(own):
            names = f"encoder.{m}.blocks.{i}", f"blocks_{letter}.{i}"
            entries += block_entries(*names, _ROWS[letter], config.encoder)
    for i in range(config.fusion_layers):
        names = f"encoder.both.blocks.{i}", f"blocks_u.{i}"
        entries += block_entries(*names, _JOINT_ROWS, config.encoder)
    entries += _linear("encoder.both.norm", "norm", (width,))
    return entries + (_decoder_entries(config) if decoder else [])


def _inputs(config: ModelConfig, m: Modality, letter: str) -> list[Entry]:
    width, spec = config.encoder.width, config.input(m)
    axes: tuple[int, ...]
    if isinstance(spec, AudioConfig):
        kernel, axes = (width, 1, spec.patch[1], spec.patch[0]), (0, 3, 2, 1)
    else:
        kernel, axes = (width, 3, *spec.tubelet[1:]), (0, 2, 3, 1)
    conv = f"patch_embed_{letter}.proj"
    matrix = width, spec.patch_dim
    return [
        Entry(f"patch_embed.{m}.weight", (f"{conv}.weight",), kernel, matrix, axes=axes),
        Entry(f"patch_embed.{m}.bias", (f"{conv}.bias",), (width,), (width,)),
        Entry(f"modality_token.{m}", (f"modality_{letter}",), (1, 1, width), (width,)),
        _table(f"pos_embed.{m}", f"pos_embed_{letter}", spec, width),
    ]


def _decoder_entries(config: ModelConfig) -> list[Entry]:
    width, narrow = config.encoder.width, config.decoder.width
    entries = []
    for m, letter in _LETTER.items():
        spec, vector = config.input(m), ((1, 1, narrow), (narrow,))
        # One projection and one mask token serve both modalities.
        entries += _linear(f"decoder_embed.{m}", "decoder_embed", (narrow, width))
        entries.append(Entry(f"mask_token.{m}", ("mask_token",), *vector))
        token = f"decoder_modality_{letter}"
        entries.append(Entry(f"decoder_modality_token.{m}", (token,), *vector))
        name = f"decoder_pos_embed_{letter}"
        entries.append(_table(f"decoder_pos_embed.{m}", name, spec, narrow))
        entries += _head(m, letter, spec, narrow)
    for i in range(config.decoder.layers):
        names = f"decoder.both.blocks.{i}", f"decoder_blocks.{i}"
        entries += block_entries(*names, _JOINT_ROWS, config.decoder)
    return entries + _linear("decoder.both.norm", "decoder_norm", (narrow,))


def _table(ours: str, theirs: str, spec: VideoConfig | AudioConfig, width: int) -> Entry:
    shape = spec.tokens, width
    if isinstance(spec, VideoConfig):
        return Entry(ours, (theirs,), (1, *shape), shape)
    time, frequency = spec.grid
    view = frequency, time, width
    return Entry(ours, (theirs,), (1, *shape), shape, view=view, axes=(1, 0, 2))


def _head(m: Modality, letter: str, spec: VideoConfig | AudioConfig, narrow: int) -> list[Entry]:
    name, matrix = f"decoder_pred_{letter}", (spec.patch_dim, narrow)
    if isinstance(spec, VideoConfig):
        return _linear(f"head.{m}", name, matrix)
    patch = spec.patch[1], spec.patch[0]
    weight = Entry(
        f"head.{m}.weight", (f"{name}.weight",), matrix, matrix, (*patch, narrow), (1, 0, 2)
    )
    values = (spec.patch_dim,)
    return [weight, Entry(f"head.{m}.bias", (f"{name}.bias",), values, values, patch, (1, 0))]


def _linear(ours: str, theirs: str, shape: tuple[int, ...]) -> list[Entry]:
    return [
        Entry(f"{ours}.weight", (f"{theirs}.weight",), shape, shape),
        Entry(f"{ours}.bias", (f"{theirs}.bias",), shape[:1], shape[:1]),
    ]


def _check(config: ModelConfig) -> None:
    wanted = {
        "modalities": ("video", "audio"),
        "fusion": "mid",
        "decoding": "joint",
        "middle_norm": False,
        "encoder_norm": True,
        "modality_tokens": True,
        "prefix_tokens": 0,
        "projection_bias": True,
    }
    for field, value in wanted.items():
        if getattr(config, field) != value:
            got = getattr(config, field)
            raise ConvertError(f"CAV-MAE has {field} = {value!r}, this model {got!r}")
    if config.video is None or config.video.frames != 1 or config.video.tubelet[0] != 1:
        raise ConvertError("CAV-MAE sees one frame, this model a clip")


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    numbers = {
        name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)
    }
    return len(numbers)
