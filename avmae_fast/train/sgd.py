"""The optimiser of the released fine-tuning: momentum SGD whose rate falls layer by layer.

Layer 0 is what makes tokens, layer l + 1 is block l, and the last one holds all that comes after
the blocks and the bottleneck tokens. Layer i of 0..n has the rate `lr * decay ** (n - i)`.
Source: the authors' fine-tuning configurations and optimiser (Scenic, AV-MAE); the learning rate
follows `avmae_fast.train.optim.learning_rate`.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_TOKEN_PARTS = ("patch_embed", "pos_embed", "modality_token", "cls")
_BLOCK = re.compile(r"encoder\.\w+\.blocks\.(\d+)\.")


def layer_id(name: str, layers: int) -> int:
    """The layer, 0..layers + 1, of a classifier's parameter by its state-dict name.

    As released, save that the authors' code takes the second modality's class token for a part of
    the head, because of its name.
    """
    if name.split(".")[0] in _TOKEN_PARTS:
        return 0
    block = _BLOCK.match(name)
    return int(block[1]) + 1 if block else layers + 1


def layerwise_groups(model: nn.Module, layers: int, decay: float = 0.75) -> list[dict[str, Any]]:
    """An optimiser group for each layer that has something to train, with its `lr_scale`.

    Raises:
        ValueError: decay is not in (0, 1].
    """
    if not 0.0 < decay <= 1.0:
        raise ValueError(f"layer-wise decay = {decay!r} is not valid: it must be in (0, 1]")
    by_layer: dict[int, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_layer.setdefault(layer_id(name, layers), []).append(parameter)
    return [
        {"params": by_layer[i], "lr_scale": decay ** (layers + 1 - i)} for i in sorted(by_layer)
    ]


def adamw_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same groups for `ReleasedAdamW`: each cut into matrices, which decay, and the rest."""
    cut = []
    for group in groups:
        matrices = [p for p in group["params"] if p.ndim > 1]
        others = [p for p in group["params"] if p.ndim <= 1]
        cut += [{**group, "params": matrices}] * bool(matrices)
        cut += [{**group, "params": others, "explicit_weight_decay": 0.0}] * bool(others)
    return cut


class ReleasedSGD(torch.optim.SGD):
    """Momentum SGD, not Nesterov, without weight decay; `set_learning_rate` sets its rates."""

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float = 0.9) -> None:
        super().__init__(list(groups), lr=0.0, momentum=momentum, fused=True)
        # torch makes them in the first step, and leaves them as they were in memory if it is one
        # that changes nothing. From 0 the first step is the same: 0 * momentum + gradient.
        for group in self.param_groups if momentum else []:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, found_inf: Tensor | None = None
    ) -> float | None:
        """Update every parameter that has a gradient.

        found_inf: a float32 scalar on the parameters' device; where it is 1 nothing changes.
        """
        # The name under which fused SGD looks for it.
        self.found_inf = found_inf
        return super().step(closure)


@torch.no_grad()
def clip_to_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients by `max_norm / norm` where their common norm is at least `max_norm`.

    `torch.nn.utils.clip_grad_norm_` adds 1e-6 to the norm, the authors' code does not.

    Returns:
        The norm before clipping, a scalar; nothing is read on the host.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    # A norm of zero divides nothing: the factor is the smaller of the two.
    factor = (max_norm / norm).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor)
    return norm
