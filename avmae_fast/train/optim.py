"""The optimiser and learning-rate schedule of the released pretraining.

Adam, then a weight decay that multiplies the weights Adam has just written, on kernels alone.
`torch.optim.AdamW` decays the old weights instead: the two differ by lr^2 * decay a step.
Source: the authors' pretraining configurations and trainer (Scenic, AV-MAE).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_FUSED_DEVICES = ("cpu", "cuda")


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two optimiser groups: kernels, which decay, and everything else, which does not.

    Kernels are the matrices of linear layers and patch embeddings. Biases, LayerNorms, mask and
    modality tokens and learned position tables keep their size.
    """
    kernels: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_kernel = name.split(".")[-1] == "weight" and parameter.ndim > 1
            (kernels if is_kernel else others).append(parameter)
    return [{"params": kernels}, {"params": others, "explicit_weight_decay": 0.0}]


class ReleasedAdamW(torch.optim.Adam):
    """Adam with bias correction, then `p *= 1 - lr * weight_decay` on the updated weights.

    Args:
        groups: what `parameter_groups` returns; a group may set `explicit_weight_decay` itself.
        lr: learning rate; set `group["lr"]` before each step, see `learning_rate`.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: how much of lr is taken off the weights of a group that sets nothing itself.
        capturable: keep the learning rate and the step count on the GPU, so that a CUDA graph of
            `step` reads what they are when it is replayed.

    Raises:
        ValueError: a value is negative or a beta is not in [0, 1).
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        capturable: bool = False,
    ) -> None:
        # Adam's own `weight_decay` is an L2 term in the gradient; this one needs another name.
        groups = [{"explicit_weight_decay": weight_decay, **group} for group in groups]
        for group in groups:
            if not group["explicit_weight_decay"] >= 0:
                decay = group["explicit_weight_decay"]
                raise ValueError(f"weight_decay = {decay!r} is not valid: it must be at least 0")
        parameters = [p for group in groups for p in group["params"]]
        fused = all(p.is_floating_point() and p.device.type in _FUSED_DEVICES for p in parameters)
        super().__init__(
            groups, lr=lr, betas=betas, eps=eps, fused=fused or None, capturable=capturable
        )
        if capturable:
            for group in self.param_groups:
                group["lr"] = torch.tensor(lr, device=parameters[0].device)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, found_inf: Tensor | None = None
    ) -> float | None:
        """Update every parameter that has a gradient, then decay the kernels among them.

        found_inf: a float32 scalar on the parameters' device; where it is 1 nothing changes.
        """
        # The name under which fused Adam looks for it.
        self.found_inf = found_inf
        loss = super().step(closure)
        for group in self.param_groups:
            kernels = [p for p in group["params"] if p.grad is not None]
            if group["explicit_weight_decay"] and kernels:
                torch._foreach_mul_(kernels, _kept(group, found_inf, kernels[0].dtype))
        return loss


def _kept(group: dict[str, Any], found_inf: Tensor | None, dtype: torch.dtype) -> Tensor | float:
    """The share of its weights that a group keeps in a step, rounded once."""
    lost = group["lr"] * group["explicit_weight_decay"]
    if found_inf is None:
        return 1.0 - lost
    return (1.0 - (1.0 - found_inf.double()) * lost).to(dtype)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate `lr` times its `lr_scale` (1 where it has none), in place where
    the rate is a tensor."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(step: int, base_lr: float, total_steps: int, warmup_steps: float = 0.0) -> float:
    """Return the learning rate of update number `step`, counted from 0.

    `base_lr * min(1, step / W) * (1 + cos(pi * max(0, step - W) / (T - int(W)))) / 2`: a linear
    rise over W = `warmup_steps` (a fraction is allowed), then half a cosine down to `total_steps`
    = T. The first update of a run with warm-up has rate 0, as released. Beyond T the cosine
    starts over.

    Raises:
        ValueError: step is negative, or the warm-up does not end before total_steps.
    """
    if step < 0 or warmup_steps < 0 or total_steps <= int(warmup_steps):
        raise ValueError(
            "learning_rate wants step >= 0 and 0 <= warmup_steps < total_steps, "
            f"got step {step}, warmup_steps {warmup_steps} and total_steps {total_steps}"
        )
    rise = min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0
    progress = max(0.0, step - warmup_steps) / (total_steps - int(warmup_steps))
    return base_lr * rise * 0.5 * (1.0 + math.cos(math.pi * (progress % 1.0)))
