"""Random models of timm and transformers, and what they become here, compute the same.

Tolerance: features of unit size in fp32, through a handful of blocks whose sums run in another
order, differ by some 1e-6; 1e-5 is asked for. Gradients are compared by share of their size.
"""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from avmae_fast.interop.detect import detect
from avmae_fast.interop.entries import to_theirs
from avmae_fast.interop.exchange import Imported, import_weights
from avmae_fast.interop.names import NAMES
from avmae_fast.interop.pixels import PIXELS
from avmae_fast.interop.tables import write_out
from avmae_fast.interop.vit import Shape, entries_of, respell
from avmae_fast.models import TokenMask

HF = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "image_size": 32,
    "patch_size": 8,
    "decoder_hidden_size": 36,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 40,
}


def _randomise(model: torch.nn.Module) -> None:
    """Biases and LayerNorms away from their 0 and 1; position tables stay what they are."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def _normalised(video: Tensor, pixels: str) -> Tensor:
    """uint8 [..., 3] as their processor hands it over, channels still last."""
    mean, std = (torch.tensor(values) for values in PIXELS[pixels])
    return (video.float() / 255 - mean) / std


def _assert_near(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def _pixels(frames: int, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (2, frames, size, size, 3), dtype=torch.uint8, generator=generator)


def _config(model: Any) -> dict[str, Any]:
    return model.config.to_dict()


@pytest.mark.parametrize(
    ("variant", "fields", "pixels"),
    [
        ("vit_tiny_patch16_224", {}, "signed"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "imagenet"),
        ("deit_tiny_distilled_patch16_224", {}, "imagenet"),
    ],
)
def test_timm_features(timm: ModuleType, variant: str, fields: dict, pixels: str) -> None:
    torch.manual_seed(0)
    size = {"depth": 3, "embed_dim": 48, "num_heads": 4, "img_size": 32, "patch_size": 8}
    theirs = timm.create_model(variant, **size, num_classes=5, **fields).eval()
    _randomise(theirs)
    state = theirs.state_dict()
    assert detect(state) == "timm"
    imported = import_weights(state, shape=Shape(heads=4), pixels=pixels)
    assert set(imported.left_out) == {n for n in state if n.startswith(("head", "fc_norm"))}
    video = _pixels(1)
    with torch.no_grad():
        wanted = theirs.forward_features(_normalised(video[:, 0], pixels).permute(0, 3, 1, 2))
        got = imported.model()(video)["video"]
    _assert_near(got, wanted)


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_hf_vit_features(transformers: ModuleType, kind: str) -> None:
    torch.manual_seed(0)
    fields = {k: x for k, x in HF.items() if not k.startswith("decoder")}
    theirs = getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(**fields)
    ).eval()
    _randomise(theirs)
    imported = import_weights(theirs.state_dict(), pixels="imagenet", config=_config(theirs))
    video = _pixels(1)
    with torch.no_grad():
        pixels = _normalised(video[:, 0], "imagenet").permute(0, 3, 1, 2)
        wanted = theirs(pixels).last_hidden_state
        got = imported.model()(video)["video"]
    _assert_near(got, wanted)


def _mask(masked: Tensor) -> TokenMask:
    """From their [B, N] bool."""
    count = int(masked[0].sum())
    order = masked.int().argsort(dim=1, stable=True)
    return TokenMask(order[:, : masked.shape[1] - count], order[:, masked.shape[1] - count :])


def _assert_same_step(
    imported: Imported, source: str, theirs: torch.nn.Module, wanted: Tensor, inputs: dict
) -> None:
    """Loss, and every gradient by the names of theirs."""
    model = imported.model()
    got = model(**inputs).loss
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    got.backward()
    wanted.backward()
    names = NAMES[source]
    gradients = {n: p.grad for n, p in model.named_parameters()}
    full, learned = gradients, imported.config
    if names.positions is not None:
        # Their tables are fixed and get no gradient; what stands here for ours is not compared.
        full, learned = write_out(gradients, imported.config, decoder=True)
    ours = to_theirs(entries_of(names, learned, decoder=True), full)
    compared = 0
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            continue
        (respelt,) = respell({name: parameter}, names)
        grad = ours[respelt]
        size = parameter.grad.norm()
        if name.endswith(("key.bias", "k_proj.bias")):
            # Exactly zero in theory: only noise is left.
            assert grad.norm() < 1e-6 and size < 1e-6
        else:
            assert float((grad - parameter.grad).norm() / size) < 1e-5, name
        compared += 1
    assert compared > 60


def _published_tables(theirs: Any) -> None:
    """The tables of published weights; a fresh model of transformers 5 holds zeros."""
    embeddings = theirs.vit.embeddings
    embeddings.patch_embeddings.projection._is_hf_initialized = False
    embeddings.initialize_weights()
    theirs.decoder.initialize_weights(embeddings.patch_embeddings.num_patches)
    assert embeddings.position_embeddings.abs().max() > 0.9


@pytest.mark.parametrize(
    ("norm_pix", "published", "positions", "decoder_positions"),
    [(True, True, "sincos_grid", "fixed"), (False, False, "learned", "learned")],
)
def test_vitmae(
    transformers: ModuleType,
    norm_pix: bool,
    published: bool,
    positions: str,
    decoder_positions: str,
) -> None:
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(**HF, norm_pix_loss=norm_pix)
    theirs = transformers.ViTMAEForPreTraining(config)
    if published:
        _published_tables(theirs)
    else:
        tables = (theirs.vit.embeddings.position_embeddings, theirs.decoder.decoder_pos_embed)
        for table in tables:
            table.data.normal_()
    _randomise(theirs)
    assert detect(theirs.state_dict()) == "hf-vitmae"
    # Fed with their own pixels, so that the targets are theirs too.
    imported = import_weights(theirs.state_dict(), pixels="signed", config=_config(theirs))
    assert imported.decoder and imported.config.prefix_tokens == 1
    assert imported.config.positions == positions
    assert imported.config.decoder_positions == decoder_positions
    video = _normalised(_pixels(1), "imagenet")
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    out = theirs(video[:, 0].permute(0, 3, 1, 2), noise=noise)
    inputs = {"video": video, "masks": {"video": _mask(out.mask.bool())}}
    _assert_same_step(imported, "hf-vitmae", theirs, out.loss, inputs)


def test_vitmae_features_of_bytes(transformers: ModuleType) -> None:
    torch.manual_seed(0)
    theirs = transformers.ViTMAEModel(transformers.ViTMAEConfig(**HF, mask_ratio=0.0)).eval()
    _randomise(theirs)
    imported = import_weights(theirs.state_dict(), config=_config(theirs))
    assert not imported.decoder and imported.source["pixels"] == "imagenet"
    video = _pixels(1)
    with torch.no_grad():
        pixels = _normalised(video[:, 0], "imagenet").permute(0, 3, 1, 2)
        # Their masking without a mask still shuffles, unless the noise rises.
        noise = torch.arange(16.0).expand(2, -1)
        wanted = theirs(pixels, noise=noise).last_hidden_state
        got = imported.model()(video)["video"]
    _assert_near(got, wanted)


def _videomae(transformers: ModuleType, **fields: object) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    # Their decoder's last LayerNorm has 1e-5 whatever the configuration says.
    config = transformers.VideoMAEConfig(**HF, num_frames=4, layer_norm_eps=1e-5, **fields)
    masked = torch.zeros(2, 32, dtype=torch.bool)
    generator = torch.Generator().manual_seed(3)
    for row in masked:
        row[torch.randperm(32, generator=generator)[:24]] = True
    return config, masked


def test_videomae(transformers: ModuleType) -> None:
    """Pixels folded in: their target undoes the normalisation, so even the loss is the same."""
    config, masked = _videomae(transformers, use_mean_pooling=False)
    theirs = transformers.VideoMAEForPreTraining(config)
    _randomise(theirs)
    assert detect(theirs.state_dict()) == "hf-videomae"
    video = _pixels(4)
    pixels = _normalised(video, "imagenet").permute(0, 1, 4, 2, 3)
    wanted = theirs(pixels, bool_masked_pos=masked).loss
    folded = import_weights(theirs.state_dict(), config=_config(theirs))
    inputs = {"video": video, "masks": {"video": _mask(masked)}}
    torch.testing.assert_close(folded.model()(**inputs).loss, wanted, rtol=1e-5, atol=1e-6)

    # On their own pixels, whose mean and spread the target takes off channel by channel: the
    # patch embedding is then theirs, and so is its gradient.
    plain = import_weights(theirs.state_dict(), pixels="signed", config=_config(theirs))
    inputs["video"] = _normalised(video, "imagenet")
    _assert_same_step(plain, "hf-videomae", theirs, wanted, inputs)


def test_videomae_features(transformers: ModuleType) -> None:
    config, _ = _videomae(transformers, num_labels=3)
    theirs = transformers.VideoMAEForVideoClassification(config).eval()
    _randomise(theirs)
    imported = import_weights(theirs.state_dict(), config=_config(theirs))
    assert not imported.config.encoder_norm and "classifier.weight" in imported.left_out
    video = _pixels(4)
    with torch.no_grad():
        pixels = _normalised(video, "imagenet").permute(0, 1, 4, 2, 3)
        wanted = theirs.videomae(pixels).last_hidden_state
        got = imported.model()(video)["video"]
    _assert_near(got, wanted)
    # A bias that is dropped on the way would leave zeros here.
    assert imported.state["encoder.video.blocks.0.attn.qkv.bias"][:48].abs().min() > 0
