"""Checkpoints in parts: each process writes what it holds, for models too large to be gathered.

The format is PyTorch's distributed checkpoint, read with any number of processes. Its `.metadata`
is a pickle, which can run whatever its writer wanted: a run reads only its own, and only where
`train.sharded_checkpoints` says so.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from avmae_fast.train.snapshot import flat_moments, put_moments

FOLDER = "parts"
_WEIGHT, _MOMENT = "weight/", "moment/"


def save_parts(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Write `folder/parts`, with all processes at once; the numbers that are no tensors return."""
    moments, scalars = flat_moments(model, optimizer)
    tensors = {f"{_WEIGHT}{name}": x for name, x in model.state_dict().items()}
    tensors |= {f"{_MOMENT}{name}": x for name, x in moments.items()}
    with _processes() as alone:
        dcp.save(tensors, checkpoint_id=str(folder / FOLDER), no_dist=alone)
    return scalars


def load_parts(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scalars: dict[str, Any]
) -> None:
    """Put `folder/parts` in place, each process its own part of it."""
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = dict(model.state_dict())
    wanted = {f"{_WEIGHT}{name}": x for name, x in tensors.items()}
    moments = {name: _empty_moment(name, parameters) for name in _moments_in(folder)}
    wanted |= {f"{_MOMENT}{name}": x for name, x in moments.items()}
    # Tensors are read into those that are given, so the weights are in place by now.
    with _processes() as alone:
        dcp.load(wanted, checkpoint_id=str(folder / FOLDER), no_dist=alone)
    put_moments(moments, scalars, model, optimizer)


def load_whole_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of `folder/parts` as one process has them."""
    metadata = dcp.FileSystemReader(str(folder / FOLDER)).read_metadata()
    sizes = {key: entry for key, entry in metadata.state_dict_metadata.items()}
    weights = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        for key, entry in sizes.items()
        if key.startswith(_WEIGHT)
    }
    with _processes(alone=True):
        dcp.load(weights, checkpoint_id=str(folder / FOLDER), no_dist=True)
    return {key.removeprefix(_WEIGHT): x for key, x in weights.items()}


@contextmanager
def _processes(alone: bool | None = None) -> Iterator[bool]:
    """Whether there is one process, and silence about it."""
    alone = not dist.is_initialized() if alone is None else alone
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield alone


def _moments_in(folder: Path) -> list[str]:
    metadata = dcp.FileSystemReader(str(folder / FOLDER)).read_metadata()
    names = sorted(metadata.state_dict_metadata)
    return [key.removeprefix(_MOMENT) for key in names if key.startswith(_MOMENT)]


def _empty_moment(name: str, parameters: dict[str, nn.Parameter]) -> Tensor:
    parameter, _, field = name.rpartition("/")
    if field == "step":
        return torch.zeros((), device=parameters[parameter].device)
    return torch.zeros_like(parameters[parameter])
