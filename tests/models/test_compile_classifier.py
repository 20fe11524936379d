"""The classifier is one graph: torch.compile takes it whole, and the result is the same."""

import pytest
import torch
from tiny_classifier import (
    clips,
    engine_drop,
    engine_loss,
    make_classifiers,
    tiny_classifier_config,
)


@pytest.mark.parametrize(
    "fields",
    [
        {"fusion": "bottleneck"},
        {"fusion": "bottleneck", "drop_path": 0.6},
        {"fusion": "cross"},
        {"fusion": "early", "pool": "cls_positioned"},
        {"head": "attentive_probe"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_full_graph(fields: dict) -> None:
    torch._dynamo.reset()
    config = tiny_classifier_config(**fields)
    model, _ = make_classifiers(config)
    batch = {**clips(config), "drop": engine_drop(config)}
    # aot_eager traces forward and backward as inductor would, without generating code.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, got = model(**batch), compiled(**batch)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-12, atol=1e-14)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    leaves = list(trained.values())
    wanted = torch.autograd.grad(engine_loss(expected, config), leaves)
    gradients = torch.autograd.grad(engine_loss(got, config), leaves)
    for name, a, b in zip(trained, gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)
