"""Tiny classifiers, their batches and labels, shared by the classifier's tests."""

import torch
from tiny import AUDIO, VIDEO, randomise, tiny_batch, tiny_config

from avmae_fast.config import StackConfig
from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.models import Classifier, DropPath, draw_dropped
from avmae_fast.models.classification_loss import classification_loss
from avmae_fast.reference import ReferenceClassifier
from avmae_fast.reference.classification import mean_loss

SMOOTHING = 0.3


def tiny_classifier_config(**fields: object) -> ClassifierConfig:
    """Three layers of a width that is no power of two, fused from the second on."""
    base = {
        "encoder": StackConfig(width=24, layers=3, heads=3, mlp=40),
        "classes": 5,
        "video": VIDEO,
        "audio": AUDIO,
        "fusion_layer": 1,
        "bottleneck_tokens": 2,
    }
    return ClassifierConfig(**{**base, **fields})


def clips(config: ClassifierConfig, batch: int = 4, seed: int = 0) -> dict:
    """Random inputs: uint8 video, float64 audio."""
    every = tiny_batch(tiny_config(), batch=batch, seed=seed)
    return {m: every[m] for m in config.modalities}


def labels_of(config: ClassifierConfig, batch: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    """Labels of each modality, mixed as mixup would."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, sum(config.heads.values()))
    names = ("both",) if config.merge == "features" else config.modalities
    return {
        m: torch.rand(shape, dtype=torch.float64, generator=generator).softmax(-1) for m in names
    }


def make_classifiers(config: ClassifierConfig) -> tuple[Classifier, ReferenceClassifier]:
    """Engine and reference with the same weights, in float64."""
    torch.manual_seed(0)
    engine, reference = Classifier(config).double(), ReferenceClassifier(config).double()
    randomise(engine)
    reference.load_state_dict(engine.state_dict())
    return engine, reference


def dropped_of(config: ClassifierConfig, batch: int = 4) -> dict[str, torch.Tensor] | None:
    if not config.drop_path:
        return None
    drawn = draw_dropped(config, batch, seed=3, step=5)
    return {name: torch.from_numpy(mask) for name, mask in drawn.items()}


def engine_drop(config: ClassifierConfig, batch: int = 4) -> DropPath | None:
    dropped = dropped_of(config, batch)
    return None if dropped is None else DropPath.of(config, dropped)


def engine_loss(out, config: ClassifierConfig, kind: str = "softmax") -> torch.Tensor:
    batch = len(out.logits)
    labels = labels_of(config, batch)
    arguments = {"heads": config.heads, "smoothing": SMOOTHING}
    return classification_loss(out.by_modality, labels, kind, **arguments)


def reference_loss(out, config: ClassifierConfig, kind: str = "softmax") -> torch.Tensor:
    """The mean over the heads of the authors' loss."""
    labels, losses, start = labels_of(config, len(out.logits)), [], 0
    for count in config.heads.values():
        here = slice(start, start + count)
        parts = {m: x[:, here] for m, x in out.by_modality.items()}
        losses.append(mean_loss(parts, {m: y[:, here] for m, y in labels.items()}, kind, SMOOTHING))
        start += count
    return torch.stack(losses).mean()
