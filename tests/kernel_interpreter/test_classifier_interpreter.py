"""The classifier on its kernels: as near to the float64 reference as plain fp32 PyTorch is."""

import copy

import pytest
import torch
from nearness import allowed, distance
from tiny_classifier import (
    clips,
    dropped_of,
    engine_drop,
    engine_loss,
    make_classifiers,
    reference_loss,
    tiny_classifier_config,
)

from avmae_fast.config import StackConfig

# head_dim 16, the least the attention kernels take.
STACK = StackConfig(width=32, layers=3, heads=2, mlp=48)


def _gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    trained = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    return torch.cat([p.grad.double().flatten() for p in trained])


@pytest.mark.parametrize(
    "fields",
    [
        {"fusion": "bottleneck"},
        {"fusion": "bottleneck", "drop_path": 0.5},
        {"fusion": "cross"},
        {"head": "attentive_probe"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_classifier(fields: dict) -> None:
    config = tiny_classifier_config(encoder=STACK, **fields)
    engine, reference = make_classifiers(config)
    for name, parameter in engine.named_parameters():
        # What a probe freezes, the reference cuts off behind the encoder.
        reference.get_parameter(name).requires_grad_(parameter.requires_grad)
    engine, plain = engine.float(), copy.deepcopy(reference).float()
    batch, dropped = clips(config, batch=2), dropped_of(config, batch=2)
    exact_loss = reference_loss(reference(**batch, dropped=dropped), config)
    exact = _gradient(reference, exact_loss)
    batch["audio"] = batch["audio"].float()
    plain_loss = reference_loss(plain(**batch, dropped=dropped), config)
    rough = _gradient(plain, plain_loss)
    loss = engine_loss(engine(**batch, drop=engine_drop(config, batch=2)), config)
    got = _gradient(engine, loss)
    limit = allowed(distance(rough, exact), STACK.layers, torch.float32)
    assert distance(got, exact) <= limit
    ulp = torch.finfo(torch.float32).eps
    error, plain_error = abs(loss - exact_loss), abs(plain_loss - exact_loss)
    assert error <= 2 * plain_error + 4 * ulp * abs(exact_loss)
