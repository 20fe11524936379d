"""A swapped block runs the kernels, and is as near to float64 as the block was."""

import copy

import pytest
import torch
from budgets import assert_within_budget
from others import make
from torch import Tensor, nn

from avmae_fast import accelerate
from avmae_kernels import attention, gelu, norm_kernels

LAUNCHES = {
    "attention": (attention, "launch_forward"),
    "attention gradient": (attention, "launch_backward"),
    "LayerNorm": (norm_kernels, "launch_forward"),
    "LayerNorm gradient": (norm_kernels, "launch_backward"),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched, in order."""
    names: list[str] = []

    def count(what: str, module: object, function: str) -> None:
        launch = getattr(module, function)

        def counted(*args: object) -> object:
            names.append(what)
            return launch(*args)

        monkeypatch.setattr(module, function, counted)

    for what, (module, function) in LAUNCHES.items():
        count(what, module, function)
    for what, kernel in (("GELU", "_forward_kernel"), ("GELU gradient", "_backward_kernel")):
        monkeypatch.setattr(gelu, kernel, _Noted(what, getattr(gelu, kernel), names))
    return names


class _Noted:
    """A kernel whose launches are noted."""

    def __init__(self, what: str, kernel: object, names: list[str]) -> None:
        self.what, self.kernel, self.names = what, kernel, names

    def __getitem__(self, grid: object) -> object:
        self.names.append(self.what)
        return self.kernel[grid]


@pytest.mark.parametrize("name", ["timm", "torch, norm last"])
def test_block_runs_the_kernels(name: str, launched: list[str]) -> None:
    model = make(name)
    block = model.blocks[0] if name == "timm" else model.layers[0]
    plain = copy.deepcopy(block)
    # The original of a torch layer may take a path of its own where no gradient is wanted.
    exact = copy.deepcopy(block).double()
    accelerate(block)
    x = torch.randn(2, 5, 48)
    ours = _results(block, x)
    assert set(launched) == {*LAUNCHES, "GELU", "GELU gradient"}
    launched.clear()
    low, want = _results(plain, x), _results(exact, x.double())
    assert launched == []
    for number, (got, near, right) in enumerate(zip(ours, low, want, strict=True)):
        assert_within_budget(got, near, right, f"result {number}")


def _results(block: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = block(x)
    grads = torch.autograd.grad(out.square().sum(), [x, *block.parameters()])
    return [out.detach(), *grads]
