"""Every format: there and back, detected by its names, its errors by name."""

import re

import pytest
import torch
from small import FIELDS, SHAPE, config_for, state_for

from avmae_fast.config import ModelConfig
from avmae_fast.interop.detect import detect
from avmae_fast.interop.entries import ConvertError
from avmae_fast.interop.exchange import Imported, export_weights, import_weights
from avmae_fast.interop.pixels import PIXELS
from avmae_fast.interop.tables import join_tables

Tensors = dict[str, torch.Tensor]


def _theirs(name: str, pixels: str = "signed") -> Tensors:
    return export_weights(config_for(name), state_for(name), name, pixels=pixels)[0]


def _back(tensors: Tensors, name: str, **wishes: object) -> Imported:
    wishes = {"shape": FIELDS[name][2], "pixels": "signed", **wishes}
    return import_weights(tensors, name, **wishes)


def _assert_same(got: Tensors, wanted: Tensors, rounding: bool) -> None:
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        if rounding:
            torch.testing.assert_close(got[name], x, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(got[name], x), name


@pytest.mark.parametrize("name", FIELDS)
def test_ours_to_theirs_and_back(name: str) -> None:
    imported = _back(_theirs(name), name)
    wanted = config_for(name)
    differing = {
        field for field in vars(wanted) if getattr(imported.config, field) != getattr(wanted, field)
    } - {"decoder", "video", "audio", "decoding"}
    if not FIELDS[name][1]:
        differing -= {"decoder_positions"}
    assert not differing
    assert imported.config.encoder == wanted.encoder
    if FIELDS[name][1]:
        assert imported.config.decoder == wanted.decoder
    for m in wanted.modalities:
        assert imported.config.input(m).grid == wanted.input(m).grid
    # The sum of two tables is split and added up again.
    _assert_same(imported.state, state_for(name), rounding=name == "mae-st")


@pytest.mark.parametrize("name", FIELDS)
def test_theirs_to_ours_and_back(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    theirs = {n: torch.randn(x.shape, generator=generator) for n, x in _theirs(name).items()}
    theirs["head.weight"] = torch.randn(3, 24)
    extra = "classifier.weight" if name.startswith("hf-") else "head.weight"
    theirs[extra] = theirs.pop("head.weight")
    if name == "cav-mae":
        theirs.pop(extra)
        theirs["blocks_a.0.norm1.weight"] = torch.randn(24)
        extra = "blocks_a.0.norm1.weight"
    if name == "hf-vitmae":
        theirs.pop(extra)
    imported = _back(theirs, name)
    back, _ = export_weights(
        imported.config, imported.state, name, pixels="signed", left_out=imported.left_out
    )
    if name == "mae-st":
        # What belongs to every time may be in either table: it is their sum that comes back.
        back, theirs = _summed(back), _summed(theirs)
    _assert_same(back, theirs, rounding=name == "mae-st")


def _summed(tensors: Tensors) -> Tensors:
    tensors = dict(tensors)
    for start in ("", "decoder_"):
        parts = ("spatial", "temporal", "class")
        tables = [tensors.pop(f"{start}pos_embed_{part}") for part in parts]
        tensors[f"{start}pos_embed"] = join_tables(*tables)
    return tensors


@pytest.mark.parametrize("name", FIELDS)
def test_detected_by_names(name: str) -> None:
    assert detect(_theirs(name)) == name
    # A stripped encoder of MAE is a timm model, and is called one.
    encoder = {n: x for n, x in state_for(name).items() if n.split(".")[0] in _ENCODER}
    theirs, _ = export_weights(config_for(name), encoder, name)
    alone = {"mae": "timm", "hf-vitmae": "hf-vit"}.get(name, name)
    assert detect(theirs) == alone


_ENCODER = ("patch_embed", "encoder", "modality_token", "prefix_token", "pos_embed")


@pytest.mark.parametrize("name", FIELDS)
def test_encoder_only(name: str) -> None:
    imported = _back(_theirs(name), name, encoder_only=True)
    assert not imported.decoder
    assert all(n.split(".")[0] in _ENCODER for n in imported.state)
    imported.model()
    assert bool(imported.left_out) == FIELDS[name][1]


@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("name", ["timm", "mae-st", "videomae", "cav-mae"])
def test_pixels_there_and_back(name: str, pixels: str) -> None:
    tensors = _theirs(name, pixels)
    imported = _back(tensors, name, pixels=pixels)
    _assert_same(imported.state, state_for(name), rounding=pixels != "signed" or name == "mae-st")
    if pixels != "signed":
        plain = _back(tensors, name, pixels="signed").state["patch_embed.video.weight"]
        assert not torch.allclose(plain, imported.state["patch_embed.video.weight"])


def test_timm_must_be_told_its_pixels() -> None:
    with pytest.raises(ConvertError, match="pixels is not set.*imagenet"):
        import_weights(_theirs("timm"), shape=SHAPE)
    with pytest.raises(ConvertError, match="pixels = 'caffe' is not valid"):
        import_weights(_theirs("timm"), shape=SHAPE, pixels="caffe")


def test_sines_are_recognised_and_written_out() -> None:
    fields = {**FIELDS["mae"][0], "positions": "sincos_grid", "decoder_positions": "fixed"}
    config = ModelConfig(**fields)
    state = {n: x for n, x in state_for("mae").items() if "pos_embed" not in n}
    theirs, _ = export_weights(config, state, "mae", pixels="signed")
    assert theirs["pos_embed"].shape == (1, 5, 24) and not theirs["pos_embed"][0, 0].any()
    imported = _back(theirs, "mae")
    assert imported.config.positions == "sincos_grid"
    assert imported.config.decoder_positions == "fixed"
    _assert_same(imported.state, state, rounding=False)
    theirs["pos_embed"][0, 3, 5] += 1e-3
    assert _back(theirs, "mae").config.positions == "learned"


def test_resize_interpolates_learned_positions_only_on_request() -> None:
    theirs = _theirs("mae")
    with pytest.raises(ConvertError, match="is for 4 tokens.*make 9: say frames and size"):
        _back(theirs, "mae", shape=SHAPE.__class__(heads=3, decoder_heads=2, size=(24, 24)))
    # A plane stays one when it is interpolated, away from the border.
    y, x = torch.meshgrid(torch.arange(2.0), torch.arange(2.0), indexing="ij")
    theirs["pos_embed"][0, 1:] = (y + x).reshape(-1, 1)
    bigger = _back(theirs, "mae", resize_to=(1, 24, 32))
    assert bigger.config.video.grid == (1, 3, 4)
    table = bigger.state["pos_embed.video"]
    assert torch.equal(table[0], theirs["pos_embed"][0, 0])
    assert table[1:].reshape(3, 4, 24)[1, :, 0].diff().min() > 0
    torch.testing.assert_close(table[1:].mean(0), torch.ones(24))
    bigger.model()
    with pytest.raises(ConvertError, match="resize_to"):
        _back(theirs, "mae", resize_to=(24, 24))


BREAKS = {
    "missing": (lambda t: t.pop("norm.bias"), r"missing \['norm.bias'\]"),
    "unknown": (lambda t: t.update({"blocks.0.ls1.gamma": torch.ones(24)}), r"unknown.*ls1.gamma"),
    "shape": (lambda t: t.update({"cls_token": torch.ones(1, 24)}), r"has shape \(1, 24\)"),
    "no positions": (lambda t: t.pop("pos_embed"), "missing pos_embed"),
    "a hole": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith("blocks.0.")],
        r"numbered \[1\], want 0 and on",
    ),
    "a gated MLP": (
        lambda t: [t.pop(n) for n in list(t) if ".mlp.fc1." in n],
        "has no hidden layer",
    ),
    "a flat kernel": (
        lambda t: t.update({"patch_embed.proj.weight": torch.ones(24, 192)}),
        "want 4 axes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_what_does_not_fit_is_named(name: str) -> None:
    breaks, match = BREAKS[name]
    theirs = _theirs("timm")
    breaks(theirs)
    with pytest.raises(ConvertError, match=match):
        _back(theirs, "timm")


def test_a_decoder_that_does_not_fit_can_be_left_out() -> None:
    """As those of Audio-MAE, whose blocks are Swin's, and of MAE-ST, which skips frames."""
    theirs = _theirs("audiomae")
    theirs["decoder_blocks.0.attn.tau"] = torch.ones(2)
    with pytest.raises(ConvertError, match=r"unknown.*attn.tau.*encoder_only would leave"):
        _back(theirs, "audiomae")
    assert not _back(theirs, "audiomae", encoder_only=True).decoder


def test_heads_are_not_guessed() -> None:
    with pytest.raises(ConvertError, match="heads is not set: no tensor says it"):
        import_weights(_theirs("timm"), "timm", pixels="signed")
    with pytest.raises(ConvertError, match="stack.heads = 5"):
        import_weights(_theirs("timm"), pixels="signed", shape=SHAPE.__class__(heads=5))


def test_unknown_architecture() -> None:
    with pytest.raises(ConvertError, match=r"unknown architecture: \['layer1.0.conv1.weight'\]"):
        detect({"layer1.0.conv1.weight": torch.ones(1)})
    with pytest.raises(ConvertError, match="model_type 'bert' is not one that is known"):
        detect({}, {"model_type": "bert"})
    with pytest.raises(ConvertError, match="'resnet' is not one of timm"):
        import_weights({}, "resnet")


@pytest.mark.parametrize(
    ("name", "target", "match"),
    [
        ("mae", "audiomae", "holds audio alone, this model has video"),
        ("cav-mae", "mae", "holds video alone, this model has video and audio"),
        ("mae-st", "mae", "patches of one frame"),
        ("mae", "timm", "holds no decoder"),
        ("hf-vit", "mae", "has 1 to 1 prefix tokens, this model has 2"),
        ("videomae", "mae-st", "has 1 to 1 prefix tokens, this model has 0"),
        ("mae", "cav-mae", "CAV-MAE has modalities"),
        ("mae", "hf-videomae", "computes its positions as sincos1d"),
    ],
)
def test_what_a_format_cannot_hold(name: str, target: str, match: str) -> None:
    with pytest.raises(ConvertError, match=match):
        export_weights(config_for(name), state_for(name), target)


def test_cav_mae_keeps_one_mask_token() -> None:
    state = state_for("cav-mae")
    state["mask_token.audio"] = state["mask_token.audio"] + 1
    with pytest.raises(ConvertError, match="mask_token.audio differs from another parameter"):
        export_weights(config_for("cav-mae"), state, "cav-mae")


def test_export_says_what_names_do_not() -> None:
    config = ModelConfig(**{**FIELDS["timm"][0], "gelu": "tanh", "layer_norm_eps": 1e-5})
    _, notes = export_weights(config, state_for("timm"), "timm", pixels="signed")
    assert any("tanh" in note for note in notes) and any("1e-05" in note for note in notes)


@pytest.mark.parametrize("fusion", ["early", "shared", "separate"])
def test_one_stack_under_any_name(fusion: str) -> None:
    """A model of one modality is the same with every fusion but mid, and goes out as such."""
    fields = {**FIELDS["mae"][0], "fusion": fusion, "decoding": "separate"}
    state = {}
    for name, x in state_for("mae").items():
        name = name.replace("decoder.both.", "decoder.video.")
        if fusion != "separate":
            name = re.sub(r"^encoder\.video\.", "encoder.both.", name)
        state[name] = x
    theirs, _ = export_weights(ModelConfig(**fields), state, "mae", pixels="signed")
    _assert_same(theirs, _theirs("mae"), rounding=False)
    with pytest.raises(ConvertError, match="mid fusion has two stacks"):
        export_weights(ModelConfig(**{**fields, "fusion": "mid", "fusion_layers": 1}), state, "mae")
