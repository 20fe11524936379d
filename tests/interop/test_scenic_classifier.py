"""Names and layouts of the authors' fine-tuning tree; the golden arrays prove the numbers."""

import numpy as np
import pytest
import torch

from avmae_fast.config import AudioConfig, StackConfig, VideoConfig
from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.interop.scenic_classifier import classifier_from_scenic, classifier_to_scenic
from avmae_fast.models import Classifier


def _config(**fields: object) -> ClassifierConfig:
    base = {
        "encoder": StackConfig(width=12, layers=2, heads=3, mlp=20),
        "classes": 5,
        "video": VideoConfig(frames=4, height=6, width=4, tubelet=(2, 3, 2)),
        "audio": AudioConfig(frames=9, mel_bins=6, patch=(4, 3)),
        "fusion_layer": 1,
    }
    return ClassifierConfig(**{**base, **fields})


def _random_state(config: ClassifierConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = Classifier(config).state_dict()
    return {name: torch.randn(x.shape, generator=generator) for name, x in state.items()}


VARIANTS = [
    ({}, "mbt"),
    ({"fusion": "cross", "modality_tokens": True}, "mbt"),
    ({"fusion": "early"}, "mbt"),
    ({"share_blocks": True, "pool": "cls_positioned", "representation": 7}, "mbt"),
    ({"video": None}, "mbt"),
    ({"video": None, "norm": "pooled"}, "vivit"),
    ({"audio": None, "pool": "cls", "representation": 7}, "vivit"),
]


@pytest.mark.parametrize(("fields", "family"), VARIANTS, ids=str)
def test_there_and_back(fields: dict, family: str) -> None:
    config = _config(**fields)
    state = _random_state(config)
    leaves = classifier_to_scenic(state, config, family)
    back = classifier_from_scenic(leaves, config, family)
    assert back.keys() == state.keys()
    for name, x in state.items():
        assert torch.equal(back[name], x), name


def test_names_as_released() -> None:
    leaves = classifier_to_scenic(_random_state(_config()), _config())
    expected = {
        "embedding/kernel": (2, 3, 2, 3, 12),
        "embedding_spectrogram/kernel": (4, 3, 1, 12),
        "bottleneck": (1, 4, 12),
        "Transformer/encoderblock_1/LayerNorm_0/scale": (12,),
        "Transformer/encoderblock_1_spec/MlpBlock_0/Dense_0/kernel": (12, 20),
        "Transformer/encoder_norm/bias": (12,),
        "ProjectionHeadAndClassifier_0/output_projection/kernel": (12, 5),
    }
    assert {name: leaves[name].shape for name in expected} == expected


def test_the_internal_name_of_the_spectrogram_and_an_idle_bottleneck_are_read() -> None:
    config = _config(video=None)
    leaves = classifier_to_scenic(_random_state(config), config)
    renamed = {n.replace("embedding_spectrogram", "embedding_spec"): x for n, x in leaves.items()}
    state = classifier_from_scenic({**renamed, "bottleneck": np.zeros((1, 4, 12))}, config)
    assert state.keys() == Classifier(config).state_dict().keys()


@pytest.mark.parametrize(
    ("fields", "family", "message"),
    [
        ({}, "vivit", "ViViT classifier has one modality"),
        ({"separate_norms": True}, "mbt", "have separate_norms = False, got True"),
        ({"head": "linear_probe"}, "mbt", "have head = 'linear', got 'linear_probe'"),
        ({"positions": "learned"}, "mbt", "no learned positions"),
    ],
)
def test_what_the_authors_lack_is_named(fields: dict, family: str, message: str) -> None:
    config = _config(**fields)
    with pytest.raises(ValueError, match=message):
        classifier_to_scenic(Classifier(config).state_dict(), config, family)
