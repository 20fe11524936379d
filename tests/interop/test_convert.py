"""`avmae convert` on files: every container, what it prints, and what it refuses."""

import argparse
import json
import pickle
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import FIELDS, SHAPE, config_for, state_for

from avmae_fast.cli import main
from avmae_fast.config import AudioConfig, StackConfig, VideoConfig
from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.interop.convert import Wishes, convert, import_scenic
from avmae_fast.interop.entries import ConvertError
from avmae_fast.interop.exchange import export_weights, import_weights
from avmae_fast.interop.flax_msgpack import nest, pack_tree, unpack_tree
from avmae_fast.interop.scenic_classifier import classifier_from_scenic, classifier_to_scenic
from avmae_fast.interop.scenic_files import ScenicShape, parameters
from avmae_fast.models import AudiovisualMAE, Classifier, Encoder

GOLDEN = Path(__file__).parents[1] / "golden"
SCENIC_SHAPE = ScenicShape(frames=6, size=(16, 24), audio_frames=40, mel_bins=24)


def _timm_file(path: Path) -> Path:
    tensors, _ = export_weights(config_for("timm"), state_for("timm"), "timm", pixels="signed")
    tensors["head.weight"] = torch.randn(3, 24)
    save_file(tensors, path)
    return path


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _timm_file(tmp_path / "timm.safetensors")
    out = str(tmp_path / "ours")
    told = ["--heads", "3", "--pixels", "signed"]
    assert main(["convert", str(source), out, *told]) == 0
    printed = capsys.readouterr().out
    assert "is timm, told by its names" in printed
    assert "left out: ['head.weight']" in printed
    assert "1 frames of 16 x 16 in patches of (1, 8, 8)" in printed
    encoder = Encoder.from_pretrained(out)
    assert all(torch.equal(x, state_for("timm")[n]) for n, x in encoder.state_dict().items())
    back = tmp_path / "back.safetensors"
    assert main(["convert", out, str(back), "--to", "timm"]) == 0
    wanted, got = load_file(source), load_file(back)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(got[n], x) for n, x in wanted.items())


def test_command_refuses_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _timm_file(tmp_path / "timm.safetensors")
    before = sorted(tmp_path.iterdir())
    cases = [
        ([str(source), str(tmp_path / "out")], "heads is not set"),
        ([str(tmp_path / "absent"), str(tmp_path / "out")], "does not exist"),
        ([str(source), str(source)], "is not overwritten"),
        ([str(source), str(tmp_path / "out"), "--to", "jepa"], "--to 'jepa' is not one of"),
        ([str(source), str(tmp_path / "out"), "--from", "mae", "--heads", "5"], "stack.heads = 5"),
    ]
    for words, match in cases:
        assert main(["convert", *words, "--pixels", "imagenet"]) == 2
        assert match in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before


class _Bomb:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was executed",))


def _broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    bomb = folder / "bomb.pth"
    torch.save({"model": {"norm.weight": torch.ones(2)}, "args": _Bomb()}, bomb)
    raw = folder / "raw.pth"
    raw.write_bytes(pickle.dumps(_Bomb()))
    numbers = folder / "numbers.pt"
    torch.save({"epoch": 3, "loss": 0.5}, numbers)
    a_list = folder / "list.pt"
    torch.save([torch.ones(2)], a_list)
    half = folder / "half.safetensors"
    half.write_bytes(_timm_file(folder / "whole.safetensors").read_bytes()[:500])
    text = folder / "text.pt"
    text.write_text("version https://git-lfs.github.com/spec/v1\n")
    return {
        "code": (bomb, "no file of tensors alone: it refers to .*Fail"),
        "a bare pickle": (raw, "no file of tensors alone"),
        "numbers": (numbers, r"holds \['epoch', 'loss'\], want tensors by name"),
        "a list": (a_list, "holds list, want tensors by name"),
        "half": (half, "not a whole safetensors file"),
        "a pointer": (text, "whole file|tensors alone"),
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_broken_and_hostile_files(tmp_path: Path) -> None:
    files = _broken_files(tmp_path)
    before = sorted(tmp_path.iterdir())
    for path, match in files.values():
        with pytest.raises(ConvertError, match=match):
            convert(path, tmp_path / "out", None, "avmae")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("outer", ["model", "module", "model_state", "state_dict", None])
def test_pytorch_files_and_wrappers(tmp_path: Path, outer: str | None) -> None:
    tensors, _ = export_weights(config_for("mae"), state_for("mae"), "mae", pixels="signed")
    wrapped = {f"module._orig_mod.{n}": x for n, x in tensors.items()}
    beside = {"epoch": 7, "args": argparse.Namespace(model="mae_vit_base_patch16", lr=1e-3)}
    torch.save({outer: wrapped, **beside} if outer else wrapped, tmp_path / "mae.pth")
    wishes = Wishes(shape=SHAPE, pixels="signed")
    notes = convert(tmp_path / "mae.pth", tmp_path / "ours", None, "avmae", wishes)
    assert "mae.pth is mae, told by its names" in notes[0]
    model = AudiovisualMAE.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(x, state_for("mae")[n]) for n, x in model.state_dict().items())
    only = Wishes(encoder_only=True)
    assert "left out: the decoder" in convert(
        tmp_path / "ours", tmp_path / "encoder", None, "avmae", only
    )
    encoder = Encoder.from_pretrained(tmp_path / "encoder")
    assert all(torch.equal(x, state_for("mae")[n]) for n, x in encoder.state_dict().items())
    convert(tmp_path / "ours", tmp_path / "back.pth", None, "mae")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert all(torch.equal(back[n], x) for n, x in tensors.items())


@pytest.mark.parametrize(
    ("name", "prefix"), [("hf-vit", 1), ("hf-vit", 2), ("hf-vitmae", 1), ("hf-videomae", 0)]
)
def test_folders_that_transformers_loads(
    name: str, prefix: int, tmp_path: Path, transformers: ModuleType
) -> None:
    """Our file, their from_pretrained, nothing missing; what they save comes back the same."""
    fields, decoder, _ = FIELDS[name]
    state, config = state_for(name), config_for(name)
    if prefix == 1 and name == "hf-vit":
        # With two it is a DeiT.
        config = type(config)(**{**fields, "prefix_tokens": 1})
        state["prefix_token.video"] = state["prefix_token.video"][:1]
        state["pos_embed.video"] = state["pos_embed.video"][1:]
    architecture = AudiovisualMAE if decoder else Encoder
    model = architecture(config)
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", None, name, Wishes(pixels="signed"))
    kind = json.loads((tmp_path / "theirs/config.json").read_text())["architectures"][0]
    cls = getattr(transformers, kind)
    options = {"add_pooling_layer": False} if name == "hf-vit" else {}
    loaded, info = cls.from_pretrained(tmp_path / "theirs", output_loading_info=True, **options)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "back", None, "avmae", Wishes(pixels="signed"))
    back = architecture.from_pretrained(tmp_path / "back")
    assert all(torch.equal(x, state[n]) for n, x in back.state_dict().items())
    assert back.config.encoder == config.encoder and back.config.gelu == "erf"


def _golden(name: str) -> tuple[dict[str, np.ndarray], dict]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        params = {n.removeprefix("param/"): arrays[n] for n in arrays if n.startswith("param/")}
        return params, json.loads(str(arrays["meta"]))


GOLDEN_TREES = ["pre_sepcat_cat", "pre_same_sep", "pre_opt_modtok", "pre_opt_rgb_only"]


@pytest.mark.parametrize("container", ["target", "target/params"])
@pytest.mark.parametrize("name", GOLDEN_TREES)
def test_golden_trees_in_files(name: str, container: str, tmp_path: Path) -> None:
    """The authors' own parameters, in their container, to ours and back, byte for byte."""
    params, _ = _golden(name)
    tree = nest(params) if container == "target" else {"params": nest(params)}
    state = {"step": np.int32(7), "param_states": nest(params)}
    whole = {
        "global_step": 7,
        "optimizer": {"target": tree, "state": state},
        "rng": np.array([0, 1], np.uint32),
        "model_state": {},
        "accum_train_time": 12,
    }
    (tmp_path / "checkpoint").write_bytes(pack_tree(whole, chunk_bytes=512))
    shape = ScenicShape(
        frames=6, size=(16, 24), audio_frames=40, mel_bins=24, fusion="shared", decoding="joint"
    )
    notes = convert(tmp_path / "checkpoint", tmp_path / "ours", None, "avmae", Wishes(scenic=shape))
    assert "is scenic, told by its names" in notes[0]
    model = AudiovisualMAE.from_pretrained(tmp_path / "ours")
    assert sum(p.numel() for p in model.parameters()) == sum(x.size for x in params.values())
    convert(tmp_path / "ours", tmp_path / "back", None, "scenic")
    back = parameters(unpack_tree((tmp_path / "back").read_bytes()))
    assert back.keys() == params.keys()
    for leaf, array in params.items():
        assert back[leaf].dtype == array.dtype
        assert back[leaf].tobytes() == array.tobytes(), leaf


def _classifier_tree(params: dict[str, np.ndarray], embedding: str, modality: str) -> dict:
    """A fine-tuned tree of one modality, out of the parts of a pretraining tree."""
    leaves = {}
    for name, array in params.items():
        if name.startswith(f"embedding_{modality}/"):
            leaves[name.replace(f"embedding_{modality}", embedding)] = array
        if name.startswith(f"Transformer_{modality}/"):
            leaves[name.replace(f"Transformer_{modality}", "Transformer")] = array
    leaves["ProjectionHeadAndClassifier_0/output_projection/kernel"] = np.ones((32, 5), np.float32)
    leaves["ProjectionHeadAndClassifier_0/output_projection/bias"] = np.ones(5, np.float32)
    leaves["bottleneck"] = np.ones((1, 4, 32), np.float32)
    return leaves


@pytest.mark.parametrize(
    ("embedding", "modality"),
    [
        ("embedding", "rgb"),
        ("embedding", "spectrogram"),
        ("embedding_spectrogram", "spectrogram"),
        ("embedding_spec", "spectrogram"),
    ],
)
def test_classifiers_of_one_modality(embedding: str, modality: str, tmp_path: Path) -> None:
    params, _ = _golden("pre_sepcat_cat")
    leaves = _classifier_tree(params, embedding, modality)
    tree = {"params": nest(leaves), "opt_state": {"0": {}}, "global_step": 9, "rng": None}
    (tmp_path / "checkpoint").write_bytes(pack_tree(tree))
    wishes = Wishes(scenic=SCENIC_SHAPE)
    notes = convert(tmp_path / "checkpoint", tmp_path / "ours", None, "avmae", wishes)
    assert any("ProjectionHeadAndClassifier_0" in note for note in notes)
    encoder = Encoder.from_pretrained(tmp_path / "ours")
    m = "video" if modality == "rgb" else "audio"
    assert encoder.config.modalities == (m,)
    convert(tmp_path / "ours", tmp_path / "back", None, "scenic")
    back = parameters(unpack_tree((tmp_path / "back").read_bytes()))
    public = {n.replace("embedding_spec/", "embedding_spectrogram/"): x for n, x in leaves.items()}
    assert back.keys() == public.keys()
    assert all(back[n].tobytes() == x.tobytes() for n, x in public.items())


def test_scenic_trees_that_are_refused() -> None:
    params, _ = _golden("pre_same_sep")
    tree = {"optimizer": {"target": nest(params)}}
    with pytest.raises(ConvertError, match="fusion = None must be 'early' or 'shared'"):
        import_scenic(tree, SCENIC_SHAPE)
    with pytest.raises(ConvertError, match=r"'optimizer' or 'params' at its top, got \['step'\]"):
        import_scenic({"step": 3}, SCENIC_SHAPE)
    with pytest.raises(ConvertError, match="holds no parameters"):
        import_scenic({"optimizer": {"state": {}}}, SCENIC_SHAPE)
    params, _ = _golden("pre_sepcat_cat")
    both = _classifier_tree(params, "embedding", "rgb")
    both |= _classifier_tree(params, "embedding_spectrogram", "spectrogram")
    with pytest.raises(
        ConvertError, match="by bottleneck tokens, which an encoder of ours has not"
    ):
        import_scenic({"params": nest(both)}, SCENIC_SHAPE)
    short = {n: x for n, x in params.items() if n != "Decoder/encoder_norm/bias"}
    with pytest.raises(ConvertError, match=r"missing \['Decoder/encoder_norm/bias'\]"):
        import_scenic({"optimizer": {"target": nest(short)}}, SCENIC_SHAPE)


@pytest.mark.parametrize("chunk_bytes", [2**30, 512])
def test_classifiers_of_both_modalities_from_files(chunk_bytes: int) -> None:
    """A file's tree goes into a classifier and comes back byte for byte."""
    config = ClassifierConfig(
        encoder=StackConfig(width=12, layers=2, heads=3, mlp=20),
        classes=5,
        video=VideoConfig(frames=4, height=6, width=4, tubelet=(2, 3, 2)),
        audio=AudioConfig(frames=9, mel_bins=6, patch=(4, 3)),
        fusion_layer=1,
    )
    leaves = classifier_to_scenic(Classifier(config).state_dict(), config)
    internal = {
        n.replace("embedding_spectrogram/", "embedding_spec/"): x for n, x in leaves.items()
    }
    file = pack_tree({"params": nest(internal), "opt_state": {}, "global_step": 3}, chunk_bytes)
    read = parameters(unpack_tree(file))
    back = classifier_to_scenic(classifier_from_scenic(read, config), config)
    assert back.keys() == leaves.keys()
    assert all(back[n].tobytes() == x.tobytes() for n, x in leaves.items())


def test_models_of_ours_that_scenic_has_not(tmp_path: Path) -> None:
    model = AudiovisualMAE(config_for("mae"))
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ConvertError, match="Scenic's model has no decoder_positions"):
        convert(tmp_path / "ours", tmp_path / "out", None, "scenic")
    Encoder(config_for("timm")).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ConvertError, match="with the decoder that pretrained it"):
        convert(tmp_path / "encoder", tmp_path / "out", None, "scenic")
    assert not (tmp_path / "out").exists()


def test_videomae_names_of_both_kinds_are_one_model() -> None:
    """What comes out of Hugging Face's names goes into the authors', and back."""
    config, state = config_for("videomae"), state_for("videomae")
    shape = FIELDS["videomae"][2]
    theirs, _ = export_weights(config, state, "hf-videomae")
    imported = import_weights(theirs, shape=shape)
    original, _ = export_weights(imported.config, imported.state, "videomae")
    # Fine-tuned files leave the prefix out; heads of classifiers stand beside.
    tuned = {n.removeprefix("encoder."): x for n, x in original.items() if n[:8] == "encoder."}
    tuned = {n: x for n, x in tuned.items() if not n.startswith("_to_")}
    tuned["fc_norm.weight"] = torch.ones(24)
    encoder = import_weights(tuned, shape=shape)
    assert not encoder.decoder and set(encoder.left_out) == {"fc_norm.weight"}
    for name, x in encoder.state.items():
        torch.testing.assert_close(x, state[name], rtol=1e-6, atol=1e-6)
