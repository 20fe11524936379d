"""The released fine-tuning optimiser; the golden arrays hold its numbers."""

import pytest
import torch

from avmae_fast.config import AudioConfig, StackConfig, VideoConfig
from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.models import Classifier
from avmae_fast.train.optim import set_learning_rate
from avmae_fast.train.sgd import (
    ReleasedSGD,
    clip_to_norm,
    layer_id,
    layerwise_groups,
)

CONFIG = ClassifierConfig(
    encoder=StackConfig(width=8, layers=2, heads=2, mlp=12),
    classes=3,
    video=VideoConfig(frames=2, height=4, width=4, tubelet=(2, 2, 2)),
    audio=AudioConfig(frames=4, mel_bins=4, patch=(2, 2)),
    modality_tokens=True,
    positions="learned",
    pool="cls",
)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("patch_embed.video.weight", 0),
        ("pos_embed.audio", 0),
        ("modality_token.video", 0),
        ("cls.audio", 0),
        ("encoder.video.blocks.0.attn.qkv.weight", 1),
        ("encoder.both.blocks.11.mlp.fc2.bias", 12),
        ("norm.both.weight", 25),
        ("middle_norm.audio.bias", 25),
        ("bottleneck", 25),
        ("head.weight", 25),
    ],
)
def test_layers(name: str, layer: int) -> None:
    assert layer_id(name, layers=24) == layer


def test_groups_hold_every_parameter_once() -> None:
    model = Classifier(CONFIG)
    groups = layerwise_groups(model, layers=2, decay=0.75)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert [group["lr_scale"] for group in groups] == [0.75**3, 0.75**2, 0.75, 1.0]


def test_frozen_parameters_are_in_no_group() -> None:
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = layerwise_groups(model, layers=2)
    assert group["params"] == [model.weight] and group["lr_scale"] == 1.0


def test_two_steps_by_hand() -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = ReleasedSGD([{"params": [weight], "lr_scale": 0.5}], momentum=0.9)
    for gradient in (1.0, 3.0):
        weight.grad = torch.tensor([gradient])
        set_learning_rate(optimizer, 0.1)
        optimizer.step()
    # The buffer is 1, then 0.9 * 1 + 3.
    torch.testing.assert_close(weight.detach(), torch.tensor([2.0 - 0.05 * 1.0 - 0.05 * 3.9]))


@pytest.mark.parametrize("max_norm", [2.5, 5.0, 10.0])
def test_clipping(max_norm: float) -> None:
    leaves = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    leaves[0].grad, leaves[1].grad = torch.tensor([3.0]), torch.tensor([-4.0])
    assert clip_to_norm(leaves, max_norm) == 5.0
    factor = min(1.0, max_norm / 5.0)
    torch.testing.assert_close(leaves[0].grad, torch.tensor([3.0 * factor]))
    torch.testing.assert_close(leaves[1].grad, torch.tensor([-4.0 * factor]))


def test_clipping_nothing_divides_nothing() -> None:
    leaf = torch.nn.Parameter(torch.zeros(2))
    leaf.grad = torch.zeros(2)
    assert clip_to_norm([leaf], 1.0) == 0.0
    assert not leaf.grad.any()


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_decay_outside_its_range_is_named(decay: float) -> None:
    with pytest.raises(ValueError, match=f"layer-wise decay = {decay} is not valid"):
        layerwise_groups(torch.nn.Linear(1, 1), layers=1, decay=decay)
