"""How far a model's loss and gradients are from the float64 reference, as shares of their size."""

import math

import torch
from tiny import randomise

from avmae_fast.config import ModelConfig
from avmae_fast.models import AudiovisualMAE
from avmae_fast.reference import ReferenceMAE

Model = AudiovisualMAE | ReferenceMAE


def make_pair(config: ModelConfig, device: str) -> tuple[AudiovisualMAE, ReferenceMAE]:
    """The engine in float32 on `device` and the reference in float64 on the CPU, same weights."""
    torch.manual_seed(0)
    engine, reference = AudiovisualMAE(config), ReferenceMAE(config)
    randomise(engine)
    reference.load_state_dict(engine.state_dict())
    return engine.to(device), reference.double()


def loss_and_gradient(model: Model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and all gradients as one float64 vector, on the CPU."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    flat = [p.grad.double().cpu().flatten() for _, p in sorted(model.named_parameters())]
    return loss.detach().double().cpu(), torch.cat(flat)


def distance(got: torch.Tensor, exact: torch.Tensor) -> float:
    """|got - exact| / |exact|, with the norm over all values."""
    return float((got - exact).norm() / exact.norm())


# Of a value on its way through a block: two LayerNorms, four products, softmax, GELU and four sums;
# and twice as many on the way back.
_ROUNDINGS = 36


def allowed(plain: float, layers: int, dtype: torch.dtype) -> float:
    """Twice the distance of the plain model, one rounding to `dtype`, and what as many independent
    roundings of fp32 as there are on the way through `layers` come to: the plain one may be lucky.
    """
    fp32 = math.sqrt(_ROUNDINGS * layers) * torch.finfo(torch.float32).eps
    return 2 * plain + torch.finfo(dtype).eps + fp32
