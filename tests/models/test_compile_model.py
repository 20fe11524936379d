"""The model is one graph: torch.compile takes it whole, and the result is the same."""

import pytest
import torch
from tiny import randomise, tiny_batch, tiny_config

from avmae_fast.models import AudiovisualMAE


@pytest.mark.parametrize("fusion", ["mid", "shared"])
def test_full_graph(fusion: str) -> None:
    torch._dynamo.reset()
    config = tiny_config(fusion=fusion)
    torch.manual_seed(0)
    model = AudiovisualMAE(config).double()
    randomise(model)
    batch = tiny_batch(config)
    # aot_eager traces forward and backward as inductor would, without generating code.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, got = model(**batch), compiled(**batch)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-12, atol=0)
    names = [name for name, _ in model.named_parameters()]
    wanted = torch.autograd.grad(expected.loss, list(model.parameters()))
    for name, a, b in zip(
        names, torch.autograd.grad(got.loss, list(model.parameters())), wanted, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)
