"""How other code bases name the parts of a vision transformer: tables, read by `vit`.

A row of a block says `ours: theirs`. A name without .weight or .bias stands for both; several names
are stacked (query, key, value); `-` is a part that they do not have.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from avmae_fast.config import Modality, TargetNorm

TIMM_BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}

# MAE-ST multiplies by three matrices.
SPLIT_BLOCK = {**TIMM_BLOCK, "attn.qkv": "attn.q attn.k attn.v"}

# VideoMAE has no key bias.
VIDEOMAE_BLOCK = {
    "norm1": "norm1",
    "attn.qkv.weight": "attn.qkv.weight",
    "attn.qkv.bias": "attn.q_bias - attn.v_bias",
    "attn.proj": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}

HF_BLOCK = {
    "norm1": "layernorm_before",
    "attn.qkv": "attention.attention.query attention.attention.key attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}

HF_VIDEOMAE_BLOCK = {
    "norm1": "layernorm_before",
    "attn.qkv.weight": "attention.attention.query.weight attention.attention.key.weight"
    " attention.attention.value.weight",
    "attn.qkv.bias": "attention.attention.q_bias - attention.attention.v_bias",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


@dataclass(frozen=True)
class Decoder:
    """Names of the parts of a decoder; {} is the number of a block.

    positions: their table, None where it is computed. heads: by width, where no file says it.
    """

    embed: str
    mask_token: str
    positions: str | None
    block: str
    norm: str
    head: str
    heads: Mapping[int, int]
    embed_bias: bool = True


@dataclass(frozen=True)
class Names:
    """Names of the parts of an encoder of one modality, and what its code fixes.

    patch_embed: a convolution whose kernel is as large as its stride.
    prefix: class and distillation token, [1, 1, D] each; those that are there are taken. Their code
        cannot do without the first `least_prefix` of them.
    positions: their table, [1, tokens, D]. None: computed and not stored. `split_positions`: their
        spatial, temporal and class tables, which are added.
    computed: the positions that are not stored.
    left_out: patterns of tensors that an encoder or decoder does not use, such as class scores.
    renames: other spellings of the same names, as (pattern, replacement) of `re`.
    pixels: the input normalisation of the published weights, where all of them have one.
    audio_scale: mean and standard deviation of their log-mel.
    """

    label: str
    modality: Modality
    conv_axes: str
    patch_embed: str
    block: str
    rows: Mapping[str, str]
    norm: str
    decoder: Decoder | None = None
    prefix: tuple[str, ...] = ()
    least_prefix: int = 0
    positions: str | None = None
    split_positions: tuple[str, str, str] | None = None
    computed: str = "sincos_grid"
    left_out: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    pixels: str | None = None
    audio_scale: tuple[float, float] = (0.0, 1.0)
    target_norm: TargetNorm = "patch_unbiased"
    layer_norm_eps: float = 1e-6


# Heads of the published models, by width: 64 channels each but in the largest.
ENCODER_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16, 1408: 16}
_MAE_HEADS = {512: 16}

_MAE_DECODER = Decoder(
    embed="decoder_embed",
    mask_token="mask_token",
    positions="decoder_pos_embed",
    block="decoder_blocks.{}",
    norm="decoder_norm",
    head="decoder_pred",
    heads=_MAE_HEADS,
)
_VIDEOMAE_DECODER = Decoder(
    embed="encoder_to_decoder",
    mask_token="mask_token",
    positions=None,
    block="decoder.blocks.{}",
    norm="decoder.norm",
    head="decoder.head",
    heads={192: 3, 384: 6, 512: 8, 640: 8},
    embed_bias=False,
)
# What transformers 5 calls the parts of a layer, as it did before.
_HF_RENAMES = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_CLASSIFIER = ("head.*", "head_dist.*", "fc_norm.*", "pre_logits.*")

NAMES: dict[str, Names] = {
    "timm": Names(
        label="a timm vision transformer (also DeiT's and DINO's naming)",
        modality="video",
        conv_axes="D c h w",
        patch_embed="patch_embed.proj",
        block="blocks.{}",
        rows=TIMM_BLOCK,
        norm="norm",
        prefix=("cls_token", "dist_token"),
        positions="pos_embed",
        left_out=_CLASSIFIER,
    ),
    "mae": Names(
        label="MAE in its authors' naming",
        modality="video",
        conv_axes="D c h w",
        patch_embed="patch_embed.proj",
        block="blocks.{}",
        rows=TIMM_BLOCK,
        norm="norm",
        prefix=("cls_token",),
        least_prefix=1,
        positions="pos_embed",
        decoder=_MAE_DECODER,
        left_out=_CLASSIFIER,
        pixels="imagenet",
    ),
    "mae-st": Names(
        label="MAE-ST (space-time) in its authors' naming",
        modality="video",
        conv_axes="D c t h w",
        patch_embed="patch_embed.proj",
        block="blocks.{}",
        rows=SPLIT_BLOCK,
        norm="norm",
        prefix=("cls_token",),
        least_prefix=1,
        split_positions=("pos_embed_spatial", "pos_embed_temporal", "pos_embed_class"),
        decoder=_MAE_DECODER,
        left_out=_CLASSIFIER,
        # The published decoders are spelt as a list of heads with one member.
        renames=((r"^pred_head\.transforms\.0\.", "decoder_blocks."),),
        pixels="kinetics",
    ),
    "audiomae": Names(
        label="Audio-MAE in its authors' naming",
        modality="audio",
        conv_axes="D c t f",
        patch_embed="patch_embed.proj",
        block="blocks.{}",
        rows=TIMM_BLOCK,
        norm="norm",
        prefix=("cls_token",),
        least_prefix=1,
        positions="pos_embed",
        decoder=_MAE_DECODER,
        left_out=_CLASSIFIER,
        audio_scale=(-4.2677393, 2 * 4.5689974),
    ),
    "videomae": Names(
        label="VideoMAE or VideoMAE V2 in its authors' naming",
        modality="video",
        conv_axes="D c t h w",
        patch_embed="encoder.patch_embed.proj",
        block="encoder.blocks.{}",
        rows=VIDEOMAE_BLOCK,
        norm="encoder.norm",
        positions="encoder.pos_embed",
        computed="sincos1d",
        decoder=_VIDEOMAE_DECODER,
        left_out=_CLASSIFIER,
        # Fine-tuned weights do without the prefix.
        renames=((r"^(patch_embed\.|blocks\.|norm\.|pos_embed$)", r"encoder.\1"),),
        pixels="imagenet",
        target_norm="videomae",
    ),
    "hf-vit": Names(
        label="ViT, DeiT or DINO of Hugging Face",
        modality="video",
        conv_axes="D c h w",
        patch_embed="embeddings.patch_embeddings.projection",
        block="encoder.layer.{}",
        rows=HF_BLOCK,
        norm="layernorm",
        prefix=("embeddings.cls_token", "embeddings.distillation_token"),
        least_prefix=1,
        positions="embeddings.position_embeddings",
        left_out=("pooler.*", "classifier.*", "cls_classifier.*", "distillation_classifier.*"),
        renames=(
            (r"^(vit|deit)\.", ""),
            (r"^layers\.", "encoder.layer."),
            *_HF_RENAMES,
        ),
    ),
    "hf-vitmae": Names(
        label="ViTMAE of Hugging Face",
        modality="video",
        conv_axes="D c h w",
        patch_embed="vit.embeddings.patch_embeddings.projection",
        block="vit.encoder.layer.{}",
        rows=HF_BLOCK,
        norm="vit.layernorm",
        prefix=("vit.embeddings.cls_token",),
        least_prefix=1,
        positions="vit.embeddings.position_embeddings",
        decoder=Decoder(
            embed="decoder.decoder_embed",
            mask_token="decoder.mask_token",
            positions="decoder.decoder_pos_embed",
            block="decoder.decoder_layers.{}",
            norm="decoder.decoder_norm",
            head="decoder.decoder_pred",
            heads=_MAE_HEADS,
        ),
        renames=(
            (r"^(embeddings|encoder|layernorm|layers)\.", r"vit.\1."),
            (r"^vit\.layers\.", "vit.encoder.layer."),
            # What save_pretrained of transformers 5 makes of decoder_layers.
            (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
            *_HF_RENAMES,
        ),
        pixels="imagenet",
    ),
    "hf-videomae": Names(
        label="VideoMAE of Hugging Face",
        modality="video",
        conv_axes="D c t h w",
        patch_embed="videomae.embeddings.patch_embeddings.projection",
        block="videomae.encoder.layer.{}",
        rows=HF_VIDEOMAE_BLOCK,
        norm="videomae.layernorm",
        computed="sincos1d",
        decoder=replace(_VIDEOMAE_DECODER, block="decoder.decoder_layers.{}"),
        left_out=("classifier.*", "fc_norm.*"),
        renames=(
            (r"^(embeddings|encoder|layernorm)\.", r"videomae.\1."),
            (r"\.attention\.attention\.query\.bias$", ".attention.attention.q_bias"),
            (r"\.attention\.attention\.value\.bias$", ".attention.attention.v_bias"),
        ),
        pixels="imagenet",
        target_norm="videomae",
    ),
}
