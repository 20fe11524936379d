"""Operations under torch.compile, without a graph break, and with another number of tokens."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avmae_kernels.gelu import bias_gelu
from avmae_kernels.norm import add_layer_norm


class Mlp(nn.Module):
    """The seams and the activation as a block uses them, every option of them on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, row_scale: Tensor) -> Tensor:
        x, h = add_layer_norm(x, None, self.norm1.weight, self.norm1.bias, 1e-6)
        h = bias_gelu(F.linear(h, self.fc1.weight), self.fc1.bias, "erf")
        update = F.linear(h, self.fc2.weight)
        _, y = add_layer_norm(
            x,
            update,
            self.norm2.weight,
            self.norm2.bias,
            1e-6,
            update_bias=self.fc2.bias,
            row_scale=row_scale,
        )
        return y


def _run(function: nn.Module, module: nn.Module, tokens: int, autocast: bool) -> list[Tensor]:
    x = torch.linspace(-2, 2, tokens * 16).reshape(tokens, 16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = function(x, torch.linspace(0, 2, tokens))
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    grads = torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])
    return [y, *grads]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_full_graph(autocast: bool) -> None:
    torch._dynamo.reset()
    module = Mlp(16)
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(module, fullgraph=True, backend=count)
    for tokens in (6, 9, 12, 31):
        expected = _run(module, module, tokens, autocast)
        got = _run(compiled, module, tokens, autocast)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    # The second number of tokens makes it a variable; no further one compiles anything.
    assert graphs == 2
