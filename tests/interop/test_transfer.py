"""Pretrained weights into classifiers: values, names, reports, and what is refused.

The golden arrays hold the authors' own table (tests/golden_runner).
"""

import dataclasses
import itertools

import pytest
import torch

from avmae_fast.config import AudioConfig, ModelConfig, StackConfig, VideoConfig
from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.interop.transfer import TransferError, interpolate_table, transfer
from avmae_fast.models import AudiovisualMAE, Classifier, Encoder, TokenMask

STACK = StackConfig(width=12, layers=3, heads=2, mlp=16)
VIDEO = VideoConfig(frames=4, height=6, width=4, tubelet=(2, 3, 2))
LONGER = dataclasses.replace(VIDEO, frames=8)
AUDIO = AudioConfig(frames=8, mel_bins=6, patch=(4, 3))
FUSIONS = ("early", "mid", "separate", "shared")
MODALITIES = ("video", "audio")


def _pretrained(**fields: object) -> AudiovisualMAE:
    base = {
        "encoder": STACK,
        "decoder": StackConfig(width=8, layers=1, heads=2, mlp=12),
        "video": VIDEO,
        "audio": AUDIO,
        "fusion_layers": 1,
    }
    torch.manual_seed(0)
    model = AudiovisualMAE(ModelConfig(**{**base, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape))
    return model


def _classifier(**fields: object) -> Classifier:
    base = {"encoder": STACK, "classes": 3, "video": LONGER, "audio": AUDIO, "fusion_layer": 2}
    torch.manual_seed(1)
    return Classifier(ClassifierConfig(**{**base, **fields}))


def _move(pretrained: AudiovisualMAE, model: Classifier, **options: object):
    return transfer(pretrained.state_dict(), pretrained.config, model, **options)


@pytest.mark.parametrize(
    ("fusion", "kept"), list(itertools.product(FUSIONS, (("video",), ("audio",), MODALITIES)))
)
def test_every_tensor_has_one_fate(fusion: str, kept: tuple[str, ...]) -> None:
    pretrained = _pretrained(fusion=fusion)
    absent = dict.fromkeys(set(MODALITIES) - set(kept))
    model = _classifier(**absent)
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = _move(pretrained, model)
    state = pretrained.state_dict()
    assert set(report.copied) | set(report.fresh) == set(before)
    assert not set(report.copied) & set(report.fresh)
    assert set(report.copied.values()) | set(report.left) == set(state)
    assert not set(report.copied.values()) & set(report.left)
    for name, parameter in model.named_parameters():
        source = report.copied.get(name)
        expected = before[name] if source is None else state[source]
        assert torch.equal(parameter, expected), name
    norm = {"weight", "bias"} if fusion == "separate" else set()
    assert {n.split(".")[-1] for n in report.fresh if n.startswith("norm")} == norm
    shares = fusion != "separate" and len(kept) == 2
    assert bool(report.duplicated) == shares


@pytest.mark.parametrize("fusion", ["early", "shared", "separate", "mid"])
def test_features_of_one_modality_survive(fusion: str) -> None:
    """Kept LayerNorms: the classifier's tokens are those of the pretrained encoder, alone."""
    if fusion == "early":
        fields: dict = {"fusion": "early", "audio": None}
    else:
        fields = {"fusion": fusion}
    pretrained = _pretrained(**fields).double()
    options = {"middle_norm_at": 2} if fusion == "mid" else {}
    model = _classifier(video=VIDEO, audio=None, **options).double().eval()
    _move(pretrained, model, norms="keep")
    video = torch.randn(2, 4, 6, 4, 3, dtype=torch.float64)
    tokens = model.tokens({"video": video})["video"]
    alone = ModelConfig(**{**vars(pretrained.config), "audio": None})
    encoder = Encoder(alone).double()
    state = pretrained.state_dict()
    encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
    torch.testing.assert_close(tokens, encoder(video)["video"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_both_modalities_survive(fusion: str) -> None:
    """With its LayerNorms kept and the same way to fuse, the classifier is the encoder."""
    pretrained = _pretrained(fusion=fusion).double()
    fused: dict = {"fusion": "late", "separate_norms": True}
    if fusion == "early":
        fused = {"fusion": "early", "fusion_layer": 0}
    elif fusion == "shared":
        fused = {"fusion": "late", "share_blocks": True}
    elif fusion == "mid":
        # Cross-attention with duplicated weights is joint attention.
        fused = {"fusion": "cross", "fusion_layer": 2, "middle_norm_at": 2}
    model = _classifier(video=VIDEO, **fused).double().eval()
    _move(pretrained, model, norms="keep")
    video = torch.randn(2, 4, 6, 4, 3, dtype=torch.float64)
    audio = torch.randn(2, 8, 6, dtype=torch.float64)
    tokens = model.tokens({"video": video, "audio": audio})
    masks = {
        m: TokenMask.all_visible(2, pretrained.config.input(m).tokens, "cpu") for m in MODALITIES
    }
    expected = pretrained.encode({"video": video, "audio": audio}, masks)
    for m in MODALITIES:
        torch.testing.assert_close(tokens[m], expected[m], rtol=1e-9, atol=1e-9)


def test_the_report_can_be_read() -> None:
    report = _move(_pretrained(fusion="mid"), _classifier())
    text = str(report)
    for line in (
        "loaded 78 tensors",
        "encoder.video.blocks.0..1 <- encoder.video.blocks.0..1 (24)",
        "encoder.audio.blocks.2 <- encoder.both.blocks.0 (12)",
        "norm.both <- encoder.both.norm (2)",
        "12 of them went to both modalities",
        "encoder.audio.norm (2): LayerNorms of a single modality are not transferred, as released",
        "bottleneck (1): new in the classifier",
        "mask_token.video (1): only pretraining has it",
    ):
        assert line in text, text


def test_an_encoder_alone_is_enough() -> None:
    pretrained = _pretrained()
    state = {n: x for n, x in pretrained.state_dict().items() if n in _encoder_names(pretrained)}
    report = transfer(state, pretrained.config, _classifier())
    assert all("norm" in name for name in report.left)


def _encoder_names(model: AudiovisualMAE) -> set[str]:
    return set(Encoder(model.config).state_dict())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_pretraining_on_sound_alone(fusion: str) -> None:
    pretrained = _pretrained(fusion=fusion, video=None)
    report = _move(pretrained, _classifier(video=None))
    assert set(report.left.values()) <= {
        "only pretraining has it",
        "LayerNorms of a single modality are not transferred, as released",
    }
    model = _classifier()
    with pytest.raises(TransferError, match="pretraining had no video, .* name patch_embed.video"):
        _move(pretrained, model)
    report = _move(pretrained, model, fresh=["patch_embed.video", "encoder.video"])
    assert report.fresh["encoder.video.blocks.0.attn.qkv.weight"] == "asked for"


def test_positions_are_resized_on_request_only() -> None:
    pretrained = _pretrained(positions="learned")
    model = _classifier(positions="learned")
    with pytest.raises(TransferError, match=r"pos_embed.video is for a grid of \[2, 2, 2\]"):
        _move(pretrained, model)
    report = _move(pretrained, model, interpolate_positions=True)
    assert report.resized == {"pos_embed.video": "grid [2, 2, 2] to [4, 2, 2]"}
    assert torch.equal(model.pos_embed["audio"], pretrained.pos_embed["audio"])
    old = pretrained.pos_embed["video"].detach().unflatten(0, (2, 4))
    new = model.pos_embed["video"].detach().unflatten(0, (4, 4))
    torch.testing.assert_close(new[1], 0.75 * old[0] + 0.25 * old[1])


def test_a_linear_table_stays_linear() -> None:
    rows = torch.arange(3.0)[:, None] + 10 * torch.arange(4.0)
    table = rows.reshape(-1, 1)
    middle = interpolate_table(table, (3, 4), (6, 4)).reshape(6, 4)
    torch.testing.assert_close(middle[1:5, 0], torch.tensor([0.25, 0.75, 1.25, 1.75]))
    with pytest.raises(ValueError, match=r"12 rows does not fill a grid of \[3, 5\]"):
        interpolate_table(table, (3, 5), (3, 4))


@pytest.mark.parametrize(
    ("source", "target", "options", "message"),
    [
        ({"audio": None}, {}, {}, "pretraining had no audio, the classifier has"),
        ({"gelu": "erf"}, {}, {}, "gelu was erf in pretraining, the classifier has tanh"),
        ({"positions": "sincos_grid"}, {}, {}, "positions were 'sincos_grid' in pretraining"),
        ({}, {"video": dataclasses.replace(LONGER, tubelet=(2, 2, 2))}, {}, "patches of video"),
        ({}, {"encoder": dataclasses.replace(STACK, layers=4)}, {}, "encoder was StackConfig"),
        ({}, {"modality_tokens": True}, {}, "modality_token.video: pretraining had none"),
        ({"modality_tokens": True}, {}, {}, "modality_token.audio would be lost: name it in"),
        ({"encoder_norm": False}, {}, {}, "norm.both.weight: pretraining had none"),
        ({}, {"fusion": "early"}, {}, "one stack for both cannot take the two of mid fusion"),
        ({}, {"middle_norm_at": 2}, {}, "the released transfer drops it: norms='keep' does not"),
        ({}, {"middle_norm_at": 1}, {"norms": "keep"}, "in front of layer 2: set middle_norm_at"),
        ({}, {}, {"norms": "keep"}, "encoder.audio.norm.bias would be lost"),
        ({"fusion": "separate"}, {}, {"norms": "keep"}, "set separate_norms"),
        ({}, {}, {"fresh": ["haed"]}, "fresh: the classifier has no 'haed'"),
        ({}, {}, {"leave": ["encoder.text"]}, "leave: 'encoder.text' is not among the tensors"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    source: dict, target: dict, options: dict, message: str
) -> None:
    pretrained, model = _pretrained(**source), _classifier(**target)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(TransferError, match=message):
        _move(pretrained, model, **options)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_missing_and_misshapen_weights_are_named() -> None:
    pretrained, model = _pretrained(), _classifier()
    state = pretrained.state_dict()
    lost = {n: x for n, x in state.items() if n != "encoder.video.blocks.1.norm2.bias"}
    with pytest.raises(TransferError, match=r"lack \['encoder.video.blocks.1.norm2.bias'\]"):
        transfer(lost, pretrained.config, model)
    cut = {**state, "patch_embed.audio.bias": torch.zeros(3)}
    with pytest.raises(TransferError, match=r"patch_embed.audio.bias has shape \[3\], .* \[12\]"):
        transfer(cut, pretrained.config, model)
    with pytest.raises(TransferError, match="teacher.weight would be lost"):
        transfer({**state, "teacher.weight": torch.zeros(1)}, pretrained.config, model)


def test_named_losses_are_allowed() -> None:
    pretrained = _pretrained(modality_tokens=True)
    model = _classifier()
    report = _move(pretrained, model, leave=["modality_token"], fresh=["patch_embed.audio"])
    assert report.left["modality_token.video"] == "asked for"
    assert report.left["patch_embed.audio.weight"] == "asked for"
    assert report.fresh["patch_embed.audio.weight"] == "asked for"
