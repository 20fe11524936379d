"""The released optimiser and schedule; the golden arrays hold their numbers."""

import copy
import math

import pytest
import torch

from avmae_fast.config import AudioConfig, ModelConfig, StackConfig, VideoConfig
from avmae_fast.interop.scenic import entries_of
from avmae_fast.reference import ReferenceMAE
from avmae_fast.train.optim import ReleasedAdamW, learning_rate, parameter_groups

CONFIG = ModelConfig(
    encoder=StackConfig(width=8, layers=2, heads=2, mlp=12),
    decoder=StackConfig(width=6, layers=1, heads=1, mlp=8),
    video=VideoConfig(frames=2, height=4, width=4, tubelet=(2, 2, 2)),
    audio=AudioConfig(frames=4, mel_bins=4, patch=(2, 2)),
    fusion_layers=1,
    positions="learned",
    modality_tokens=True,
)


def _optimizer(model: torch.nn.Module, weight_decay: float = 0.1) -> ReleasedAdamW:
    return ReleasedAdamW(parameter_groups(model), lr=0.01, weight_decay=weight_decay)


def _step(model: torch.nn.Module, optimizer: ReleasedAdamW, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_kernels_and_nothing_else_decay() -> None:
    """Exactly the parameters whose path in the authors' tree contains `kernel`."""
    model = ReferenceMAE(CONFIG)
    kernels, others = parameter_groups(model)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    expected = {e.name for e in entries_of(CONFIG) if "kernel" in e.leaves[0]}
    assert {name_of[p] for p in kernels["params"]} == expected
    assert {name_of[p] for p in others["params"]} == set(name_of.values()) - expected
    assert others["explicit_weight_decay"] == 0.0


def test_frozen_parameters_are_in_no_group() -> None:
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(model)] == [1, 0]


def test_one_step_by_hand() -> None:
    weight, gradient = torch.tensor([[2.0]]), torch.tensor([[0.5]])
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.copy_(weight)
    layer.weight.grad = gradient
    _optimizer(layer, weight_decay=0.1).step()
    # The first step of Adam is lr * sign of the gradient; then the new weight decays.
    expected = (2.0 - 0.01 * 0.5 / (0.5 + 1e-8)) * (1 - 0.01 * 0.1)
    torch.testing.assert_close(layer.weight.item(), expected, rtol=1e-6, atol=0)


def test_a_rate_of_zero_changes_the_moments_only() -> None:
    model = torch.nn.Linear(3, 3)
    before = copy.deepcopy(model.state_dict())
    optimizer = _optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _step(model, optimizer, seed=0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert optimizer.state[model.weight]["exp_avg"].any()


def test_parameters_without_a_gradient_stay() -> None:
    model = torch.nn.Linear(3, 3)
    before = copy.deepcopy(model.state_dict())
    _optimizer(model).step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_found_inf_leaves_weights_and_moments() -> None:
    model, plain = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    plain.load_state_dict(model.state_dict())
    optimizer, expected = _optimizer(model), _optimizer(plain)
    for found in (0.0, 1.0, 0.0):
        model.weight.grad = plain.weight.grad = torch.full((3, 3), 0.5)
        optimizer.step(found_inf=torch.tensor(found))
        if not found:
            expected.step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    state, wanted = optimizer.state[model.weight], expected.state[plain.weight]
    torch.testing.assert_close(state, wanted, rtol=0, atol=0)


def test_state_dict_round_trip() -> None:
    """A run that is saved and loaded goes on to the same weights, bit for bit."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LayerNorm(4))
    optimizer = _optimizer(model)
    for seed in range(3):
        _step(model, optimizer, seed)
    twin = copy.deepcopy(model)
    restored = _optimizer(twin, weight_decay=0.0)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (3, 4):
        _step(model, optimizer, seed)
        _step(twin, restored, seed)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_negative_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_decay = -1.0"):
        _optimizer(torch.nn.Linear(1, 1), weight_decay=-1.0)


def test_learning_rate_shape() -> None:
    rates = [learning_rate(step, 1.0, 20, 5) for step in range(20)]
    assert rates[0] == 0.0 and rates[5] == 1.0
    assert rates[1:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[12] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 15)))
    assert all(a > b for a, b in zip(rates[5:], rates[6:], strict=False))
    assert learning_rate(0, 1.0, 20) == 1.0


def test_learning_rate_with_a_fraction_of_a_step() -> None:
    """The rise of 2.5 steps uses the fraction, the length of the cosine its integer part."""
    assert learning_rate(2, 1.0, 10, 2.5) == pytest.approx(0.8)
    expected = 0.5 * (1 + math.cos(math.pi * 2.5 / 8))
    assert learning_rate(5, 1.0, 10, 2.5) == pytest.approx(expected)


@pytest.mark.parametrize("arguments", [(-1, 1.0, 10, 2), (0, 1.0, 10, 10), (0, 1.0, 10, -1)])
def test_learning_rate_refuses(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="learning_rate wants"):
        learning_rate(*arguments)
