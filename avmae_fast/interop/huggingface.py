"""config.json of Hugging Face's vision transformers: read for what tensors do not say, written."""

from collections.abc import Mapping
from typing import Any, Literal

from avmae_fast.config import ModelConfig, VideoConfig
from avmae_fast.interop.entries import ConvertError
from avmae_fast.interop.pixels import PIXELS
from avmae_fast.interop.vit import Shape

MODEL_TYPES = {"vit": "hf-vit", "deit": "hf-vit", "vit_mae": "hf-vitmae", "videomae": "hf-videomae"}
_ARCHITECTURES = {
    "hf-vit": ("vit", "ViTModel", "ViTModel"),
    "deit": ("deit", "DeiTModel", "DeiTModel"),
    "hf-vitmae": ("vit_mae", "ViTMAEForPreTraining", "ViTMAEModel"),
    "hf-videomae": ("videomae", "VideoMAEForPreTraining", "VideoMAEModel"),
}
_GELU: dict[str, Literal["tanh", "erf"]] = {
    "gelu": "erf",
    "gelu_python": "erf",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
}


def format_of(config: Mapping[str, Any]) -> str | None:
    """The format that a config.json names; None where there is no config.json.

    Raises:
        ConvertError: it is of another architecture.
    """
    kind = config.get("model_type")
    if kind is not None and kind not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ConvertError(f"model_type {kind!r} is not one that is known: {known}")
    return None if kind is None else MODEL_TYPES[kind]


def shape_of(config: Mapping[str, Any], shape: Shape) -> Shape:
    """`shape`, with what it leaves open taken from a config.json.

    Raises:
        ConvertError: the model has an activation, or pixels as targets, that ours has not.
    """
    if "model_type" not in config:
        return shape
    size = config.get("image_size", 224)
    activation = str(config.get("hidden_act", "gelu"))
    if activation not in _GELU:
        raise ConvertError(f"hidden_act {activation!r} is not one that is known: {list(_GELU)}")
    video = config["model_type"] == "videomae"
    raw = not config.get("norm_pix_loss", video)
    if video and raw:
        raise ConvertError("norm_pix_loss false: VideoMAE then predicts pixels in [0, 1], not ours")
    return Shape(
        heads=shape.heads or config.get("num_attention_heads"),
        decoder_heads=shape.decoder_heads or config.get("decoder_num_attention_heads"),
        frames=shape.frames or (config.get("num_frames", 16) if video else 1),
        size=shape.size or ((size, size) if isinstance(size, int) else tuple(size)),
        layer_norm_eps=shape.layer_norm_eps or config.get("layer_norm_eps", 1e-12),
        gelu=_GELU[activation],
        target_norm=shape.target_norm or ("none" if raw else None),
    )


def pixels_of(config: Mapping[str, Any]) -> str | None:
    """The input normalisation in a preprocessor_config.json, None where it is silent.

    Raises:
        ConvertError: it is none of those that are known.
    """
    if "image_mean" not in config or "image_std" not in config:
        return None
    given = (tuple(config["image_mean"]), tuple(config["image_std"]))
    for name, known in PIXELS.items():
        near = [
            abs(a - b) < 1e-6
            for x, y in zip(given, known, strict=True)
            for a, b in zip(x, y, strict=True)
        ]
        if all(near):
            return name
    raise ConvertError(f"image_mean and image_std {given} are none of {PIXELS}")


def config_json(target: str, config: ModelConfig, decoder: bool) -> dict[str, Any]:
    """The config.json of a model in one of the Hugging Face formats."""
    # Two prefix tokens make a DeiT, whose other names are ViT's.
    distilled = target == "hf-vit" and config.prefix_tokens == 2
    kind, whole, bare = _ARCHITECTURES["deit" if distilled else target]
    video = config.video
    if not isinstance(video, VideoConfig) or video.tubelet[1] != video.tubelet[2]:
        raise ConvertError(f"{target} has square patches of video, this model {video}")
    record: dict[str, Any] = {
        "architectures": [whole if decoder else bare],
        "model_type": kind,
        "hidden_size": config.encoder.width,
        "num_hidden_layers": config.encoder.layers,
        "num_attention_heads": config.encoder.heads,
        "intermediate_size": config.encoder.mlp,
        "hidden_act": "gelu" if config.gelu == "erf" else "gelu_pytorch_tanh",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.layer_norm_eps,
        "image_size": video.height if video.height == video.width else [video.height, video.width],
        "patch_size": video.tubelet[1],
        "num_channels": 3,
    }
    if target != "hf-videomae":
        record["qkv_bias"] = True
    else:
        record |= {
            "num_frames": video.frames,
            "tubelet_size": video.tubelet[0],
            "qv_bias": True,
            "use_mean_pooling": not config.encoder_norm,
        }
    if target != "hf-vit":
        record |= {
            "decoder_hidden_size": config.decoder.width,
            "decoder_num_hidden_layers": config.decoder.layers,
            "decoder_num_attention_heads": config.decoder.heads,
            "decoder_intermediate_size": config.decoder.mlp,
            "norm_pix_loss": config.target_norm != "none",
        }
    return record
