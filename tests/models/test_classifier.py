"""What users of the classifier meet: shapes, sizes, frozen encoders, stochastic depth, errors."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_classifier import (
    clips,
    dropped_of,
    engine_drop,
    engine_loss,
    labels_of,
    make_classifiers,
    tiny_classifier_config,
)

from avmae_fast.config import ConfigError, StackConfig
from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.models import Classifier, DropPath, draw_dropped
from avmae_fast.models.classification_loss import classification_loss
from avmae_fast.models.streams import Stream, share_bottleneck, with_bottleneck
from avmae_fast.reference import ReferenceClassifier


def _parameters(**fields: object) -> float:
    size, classes = str(fields.pop("size")), int(fields.pop("classes"))  # type: ignore[call-overload]
    with torch.device("meta"):
        model = Classifier(ClassifierConfig.of_size(size, classes, **fields))
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize(
    ("fields", "millions"),
    [
        ({"size": "B", "classes": 527}, 171.9),
        ({"size": "B", "classes": 527, "audio": None}, 86.6),
        ({"size": "B", "classes": 527, "video": None}, 85.7),
        ({"size": "L", "classes": 527}, 607.0),
        ({"size": "L", "classes": 527, "audio": None}, 304.4),
        ({"size": "L", "classes": 527, "video": None}, 303.1),
    ],
    ids=str,
)
def test_sizes_are_the_authors(fields: dict, millions: float) -> None:
    assert _parameters(**fields) == pytest.approx(millions, abs=0.05)


def test_first_logits_are_zero_as_released() -> None:
    config = tiny_classifier_config(classes={"verb": 4, "noun": 3})
    model = Classifier(config).double().eval()
    out = model(**clips(config))
    assert out.logits.shape == (4, 7) and not out.logits.any()
    assert {head: x.shape for head, x in model.split(out.logits).items()} == {
        "verb": (4, 4),
        "noun": (4, 3),
    }


@pytest.mark.parametrize("head", ["linear_probe", "attentive_probe"])
def test_a_probe_trains_its_head_alone(head: str) -> None:
    config = tiny_classifier_config(head=head)
    model, _ = make_classifiers(config)
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == ({"head"} if head == "linear_probe" else {"head", "pool"})
    loss = engine_loss(model(**clips(config)), config)
    loss.backward()
    assert model.patch_embed["video"].weight.grad is None


def test_engine_and_reference_start_alike() -> None:
    """Every parameter is drawn from one distribution in both: its mean and deviation agree."""
    config = tiny_classifier_config(
        encoder=StackConfig(width=96, layers=3, heads=3, mlp=128),
        head="attentive_probe",
        representation=64,
        modality_tokens=True,
    )
    torch.manual_seed(0)
    engine, reference = Classifier(config), ReferenceClassifier(config)
    for (name, a), (other, b) in zip(
        sorted(engine.named_parameters()), sorted(reference.named_parameters()), strict=True
    ):
        assert name == other
        spread = float(b.detach().std(correction=0))
        # Six standard deviations of the deviation of n numbers, of their mean likewise.
        limit = 6 * spread / a.numel() ** 0.5
        assert abs(float(a.detach().std(correction=0)) - spread) <= limit, name
        assert abs(float(a.detach().mean() - b.detach().mean())) <= 2 * limit, name


def test_a_probe_normalises_its_features() -> None:
    config = tiny_classifier_config(head="linear_probe")
    model, _ = make_classifiers(config)
    feature = model(**clips(config, batch=6)).features["audio"]
    torch.testing.assert_close(feature.mean(0), torch.zeros_like(feature[0]), atol=1e-9, rtol=0)
    assert (feature.var(0, correction=0) > 0.9).all()


def test_dropped_clips_are_not_computed() -> None:
    config = tiny_classifier_config(drop_path=0.6)
    model, _ = make_classifiers(config)
    drop = engine_drop(config)
    calls: list[tuple[int, int]] = []
    right = torch.nn.functional.linear

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None):
        calls.append((id(weight), x.shape[0]))
        return right(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("avmae_fast.models.memory.F.linear", counted)
        model(**clips(config), drop=drop)
    seen = dict(calls)
    for m in config.modalities:
        for i, layer in enumerate(drop.layers[m]):
            block = model.encoder[m].blocks[i]
            length = config.input(m).tokens + (config.bottleneck_tokens if i >= 1 else 0)
            attention, mlp = (~dropped_of(config)[m][i]).sum(-1).clamp(min=1).tolist()
            assert (attention, mlp) == (4, 4) or layer is not None
            assert seen[id(block.attn.qkv.weight)] == attention * length
            assert seen[id(block.mlp.fc1.weight)] == mlp * length


def test_a_layer_that_nobody_takes_part_in() -> None:
    config = tiny_classifier_config(drop_path=0.5)
    model, reference = make_classifiers(config)
    mask = np.ones((config.encoder.layers, 2, 4), dtype=bool)
    mask[0] = False
    everyone = dict.fromkeys(config.modalities, mask)
    out = model(**clips(config), drop=DropPath.of(config, everyone))
    dense = reference(
        **clips(config), dropped={m: torch.from_numpy(x) for m, x in everyone.items()}
    )
    torch.testing.assert_close(out.logits, dense.logits, rtol=1e-9, atol=1e-9)
    engine_loss(out, config).backward()
    # The two layers that drop have nothing to learn from, and say so with a gradient.
    for i, learns in enumerate((True, False, False)):
        gradient = model.encoder["video"].blocks[i].mlp.fc1.weight.grad
        assert gradient is not None and bool(gradient.any()) == learns


def test_draws_do_not_depend_on_how_the_batch_is_shared() -> None:
    config = tiny_classifier_config(drop_path=0.5, fusion="early")
    whole = draw_dropped(config, 8, seed=1, step=2)
    assert set(whole) == {"video", "audio", "both"}
    first = draw_dropped(config, 3, seed=1, step=2)
    rest = draw_dropped(config, 5, seed=1, step=2, first=3)
    for name, mask in whole.items():
        np.testing.assert_array_equal(mask, np.concatenate([first[name], rest[name]], axis=2))
    other = draw_dropped(config, 8, seed=1, step=3)
    assert any((mask != other[name]).any() for name, mask in whole.items())
    assert (whole["video"] != whole["audio"]).any()


def test_draws_have_the_rate_of_their_layer() -> None:
    config = tiny_classifier_config(drop_path=0.6)
    mask = draw_dropped(config, 20_000, seed=9, step=0)["audio"]
    # Five standard deviations of a mean of 20 000.
    limit = 5 * 0.5 / 20_000**0.5
    for layer, rate in enumerate((0.0, 0.3, 0.6)):
        assert abs(mask[layer].mean(axis=1) - rate).max() <= limit


def test_the_bottleneck_is_averaged_in_place() -> None:
    generator = torch.Generator().manual_seed(0)
    bottleneck = torch.randn(2, 6, generator=generator)
    tokens = {m: torch.randn(3, n, 6, generator=generator) for m, n in (("a", 4), ("b", 5))}
    streams = {m: with_bottleneck(Stream.of(x), bottleneck) for m, x in tokens.items()}
    update = {m: torch.randn(s.x.shape, generator=generator) for m, s in streams.items()}
    moved = {m: dataclasses.replace(s, update=update[m].clone()) for m, s in streams.items()}
    before = {m: stream.tokens() for m, stream in moved.items()}
    addresses = {m: stream.update.data_ptr() for m, stream in moved.items()}
    after = share_bottleneck(moved)
    mean = (before["a"][:, -2:] + before["b"][:, -2:]) / 2
    for m, stream in after.items():
        assert stream.update.data_ptr() == addresses[m]
        torch.testing.assert_close(stream.tokens()[:, -2:], mean)
        assert torch.equal(stream.tokens()[:, :-2], before[m][:, :-2])


def test_autocast_keeps_features_in_fp32() -> None:
    config = tiny_classifier_config()
    model, _ = make_classifiers(config)
    model.float()
    batch = clips(config)
    batch["audio"] = batch["audio"].float()
    exact = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**batch)
    assert all(x.dtype == torch.float32 for x in rough.features.values())
    loss = engine_loss(rough, config)
    assert loss.dtype == torch.float32
    # bf16 keeps 8 bits; some hundred roundings in a chain of three blocks stay within 3 %.
    torch.testing.assert_close(loss, engine_loss(exact, config), rtol=0.03, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": {}}, "classifier.classes = {}"),
        ({"classes": {"verb": 0}}, r"classifier.classes\['verb'\] = 0"),
        ({"fusion": "mid"}, "classifier.fusion = 'mid' is not valid: it must be one of 'bottle"),
        ({"fusion_layer": 3}, "classifier.fusion_layer = 3 .* in 0..2 for 3 layers"),
        ({"bottleneck_tokens": 0}, "classifier.bottleneck_tokens = 0 .* positive"),
        ({"middle_norm_at": 2}, "classifier.middle_norm_at = 2 .* at most fusion_layer 1"),
        ({"drop_path": 1.0}, r"classifier.drop_path = 1.0 .* in \[0, 1\)"),
        ({"drop_path": 0.1, "head": "linear_probe"}, "drop_path = 0.1 .* 0 with linear_probe"),
        ({"head": "attentive_probe", "pool": "cls"}, "classifier.head = 'attentive_probe'"),
        ({"pool": "cls_positioned", "positions": "learned"}, "classifier.pool"),
        ({"fusion": "early", "separate_norms": True}, "classifier.separate_norms = True"),
        ({"video": None, "audio": None}, "classifier.video and classifier.audio"),
    ],
    ids=str,
)
def test_wrong_configurations_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_classifier_config(**fields)


def test_wrong_inputs_are_named() -> None:
    config = tiny_classifier_config()
    model = Classifier(config)
    batch = clips(config)
    with pytest.raises(ValueError, match="audio: this model was configured with audio, got none"):
        model(video=batch["video"])
    with pytest.raises(ValueError, match="video: this model was configured with video, got none"):
        model(partial=True)
    with pytest.raises(ValueError, match=r"drop: training at drop_path = 0.0 .* with a DropPath"):
        model(**batch, drop=DropPath({}))
    deep = Classifier(tiny_classifier_config(drop_path=0.2))
    with pytest.raises(ValueError, match=r"drop: training at drop_path = 0.2 .* without a Drop"):
        deep(**batch)


def test_wrong_labels_are_named() -> None:
    config = tiny_classifier_config()
    logits = {"video": torch.zeros(4, 5), "audio": torch.zeros(4, 5)}
    labels = labels_of(config)
    with pytest.raises(ValueError, match=r"labels of 'audio' .* \[4, 5\], got those of \['video'"):
        classification_loss(logits, {"video": labels["video"]}, "softmax", heads=config.heads)
    with pytest.raises(ValueError, match=r"label smoothing = 1.0 is not valid"):
        classification_loss(logits, labels, "softmax", heads=config.heads, smoothing=1.0)
