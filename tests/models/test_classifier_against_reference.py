"""Ring 3: the engine's classifier equals the dense reference in logits, loss and gradients.

Both run in float64; 1e-9 is far above what summation order can do and far below any mistake.
"""

import pytest
import torch
from tiny_classifier import (
    clips,
    dropped_of,
    engine_drop,
    engine_loss,
    make_classifiers,
    reference_loss,
    tiny_classifier_config,
)

from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.models.blocks import set_checkpoint

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
FUSIONS = ("bottleneck", "cross", "early", "late")
VARIANTS = [
    {"share_blocks": True},
    {"fusion": "cross", "share_blocks": True},
    {"fusion": "early", "fusion_layer": 0},
    {"fusion": "late", "merge": "features", "separate_norms": True},
    {"fusion_layer": 0},
    {"fuse_at_test": False},
    {"pool": "cls"},
    {"pool": "cls_positioned", "representation": 6},
    {"norm": "pooled"},
    {"norm": "pooled", "pool": "cls", "separate_norms": True},
    {"separate_norms": True, "middle_norm_at": 1},
    {"modality_tokens": True, "positions": "learned"},
    {"modality_tokens": True, "positions": "sincos_grid", "pool": "cls"},
    {"gelu": "erf", "layer_norm_eps": 1e-5},
    {"video": None},
    {"audio": None, "fusion": "early"},
    {"audio": None, "norm": "pooled", "pool": "mean"},
    {"classes": {"verb": 4, "noun": 3}},
    {"head": "linear_probe"},
    {"head": "attentive_probe"},
    {"head": "attentive_probe", "merge": "features", "video": None},
]


def _assert_equal(config: ClassifierConfig, kind: str = "softmax", policy: str = "none") -> None:
    engine, reference = make_classifiers(config)
    set_checkpoint(engine, policy)
    batch = clips(config)
    got = engine(**batch, drop=engine_drop(config))
    expected = reference(**batch, dropped=dropped_of(config))
    _compare_outputs(got, expected)
    loss, exact = engine_loss(got, config, kind), reference_loss(expected, config, kind)
    torch.testing.assert_close(loss, exact, **TOLERANCE)
    loss.backward()
    exact.backward()
    gradients = dict(reference.named_parameters())
    trained = [(n, p) for n, p in engine.named_parameters() if p.requires_grad]
    assert trained
    for name, parameter in trained:
        assert parameter.grad is not None, f"{name} got no gradient"
        torch.testing.assert_close(
            parameter.grad,
            gradients[name].grad,
            **TOLERANCE,
            msg=lambda text, n=name: f"{n}: {text}",
        )
    # Running statistics of a probe's BatchNorm went along.
    _compare_outputs(engine.eval()(**batch), reference.eval()(**batch))


def _compare_outputs(got, expected) -> None:
    torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
    assert got.by_modality.keys() == expected.by_modality.keys()
    for m, logits in got.by_modality.items():
        torch.testing.assert_close(logits, expected.by_modality[m], **TOLERANCE)
    for m, feature in got.features.items():
        torch.testing.assert_close(feature, expected.features[m], **TOLERANCE)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusions(fusion: str, policy: str) -> None:
    _assert_equal(tiny_classifier_config(fusion=fusion), "sigmoid", policy)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_stochastic_depth(fusion: str, scaled: bool, policy: str) -> None:
    config = tiny_classifier_config(fusion=fusion, drop_path=0.6, drop_path_scaled=scaled)
    dropped = dropped_of(config)
    assert dropped is not None and any(mask.any() for mask in dropped.values())
    _assert_equal(config, policy=policy)


@pytest.mark.parametrize(
    "options", VARIANTS, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items())
)
def test_options(options: dict) -> None:
    _assert_equal(tiny_classifier_config(**options))


@pytest.mark.parametrize("absent", ["video", "audio"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_missing_modality(fusion: str, absent: str) -> None:
    config = tiny_classifier_config(fusion=fusion)
    engine, reference = make_classifiers(config)
    batch = clips(config)
    del batch[absent]
    got, expected = engine.eval()(**batch, partial=True), reference.eval()(**batch)
    assert got.by_modality.keys() == batch.keys()
    _compare_outputs(got, expected)
