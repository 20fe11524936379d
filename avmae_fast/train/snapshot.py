"""Weights and optimiser state as whole tensors on the host, whatever processes hold them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from avmae_fast.train.distributed import whole


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint keeps of a model and its optimiser.

    weights: by state-dict name. moments: optimiser state by "<parameter>/<key>".
    scalars: the rest of that state, numbers by parameter and key.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    scalars: dict[str, dict[str, Any]]

    @classmethod
    def of(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True
    ) -> "Snapshot":
        """Gather it; with several processes all must ask, and those that do not `keep` get none."""
        moments, scalars = flat_moments(model, optimizer)
        return cls(whole_weights(model, keep), _on_host(moments, keep), scalars)

    def misfit(self, model: nn.Module) -> str | None:
        """Why this is not of such a model and an optimiser of it; None if it may be."""
        wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        found = {name: tuple(x.shape) for name, x in self.weights.items()}
        for name in [*wanted, *found]:
            if wanted.get(name) != found.get(name):
                return f"{name} has shape {found.get(name)}, wanted is {wanted.get(name)}"
        shapes = {name: tuple(x.shape) for name, x in model.named_parameters()}
        fields: dict[str, set[str]] = {}
        for key, tensor in self.moments.items():
            name, _, field = key.rpartition("/")
            # A step count is one number, all else is of the parameter's shape.
            shape = () if field == "step" else shapes.get(name)
            if name not in shapes or tuple(tensor.shape) != shape or not tensor.is_floating_point():
                return f"{key} is no optimiser state of a parameter"
            fields.setdefault(name, set()).add(field)
        if len({frozenset(x) for x in fields.values()}) > 1:
            return "some parameters have other optimiser state than others"
        for name, scalars in self.scalars.items():
            numbers = isinstance(scalars, dict) and all(
                isinstance(x, int | float) for x in scalars.values()
            )
            if name not in shapes or not numbers:
                return f"optimizer.{name} is no optimiser state of a parameter"
        return None

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put it in place; each process takes its part of what is sharded."""
        restore_weights(self.weights, model)
        parameters = dict(model.named_parameters())
        parts = {
            key: _part_of(tensor, parameters[key.rpartition("/")[0]])
            for key, tensor in self.moments.items()
        }
        put_moments(parts, self.scalars, model, optimizer)


def flat_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Optimiser state: tensors by "<parameter>/<key>", and numbers by parameter and key."""
    names = _parameter_names(model, optimizer)
    moments: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, fields in optimizer.state_dict()["state"].items():
        for key, value in fields.items():
            if isinstance(value, Tensor):
                moments[f"{names[index]}/{key}"] = value
            else:
                scalars.setdefault(names[index], {})[key] = value
    return moments, scalars


def put_moments(
    moments: Mapping[str, Tensor],
    scalars: Mapping[str, Mapping[str, Any]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Undo `flat_moments`; sharded parameters want sharded tensors."""
    names = _parameter_names(model, optimizer)
    index = {name: i for i, name in names.items()}
    state: dict[int, dict[str, Any]] = {i: dict(scalars.get(n, {})) for i, n in names.items()}
    for key, tensor in moments.items():
        name, _, field = key.rpartition("/")
        state[index[name]][field] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def whole_weights(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Weights by state-dict name; all processes must ask, those that do not `keep` get none."""
    return _on_host(model.state_dict(), keep)


def restore_weights(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Put whole weights in place; each process takes its part of what is sharded."""
    current = model.state_dict()
    parts = {n: _part_of(x, current[n]) if n in current else x for n, x in weights.items()}
    model.load_state_dict(parts)


def _part_of(tensor: Tensor, like: Tensor) -> Tensor:
    # A step count belongs to a sharded parameter too, and is whole.
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    on_device = tensor.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def _on_host(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    host = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor.detach())
        if keep:
            host[name] = gathered.cpu().contiguous()
    return host


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Name of each parameter by the number an optimiser's state_dict gives it."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    return {i: name_of[p] for i, p in enumerate(ordered)}
