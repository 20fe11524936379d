"""Several processes that train one model: what torchrun started, and how they agree.

Each process has a GPU, or a CPU with gloo, and its part of every micro-batch. The model is
replicated (DDP) or sharded (FSDP2); both average gradients over processes, so a run's numbers are
those of one process on the same global batch, up to the order of sums.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from avmae_fast.config import ConfigError, TrainConfig
from avmae_fast.models.blocks import Block, Stack

T = TypeVar("T")

# How long a process waits for the others: the first batch of a cold file system takes minutes.
_TIMEOUT = timedelta(minutes=20)


@dataclass(frozen=True)
class World:
    """This process among all that train together.

    rank: number of this process, 0 writes files. size: how many there are.
    local_rank: number of this process on its machine, which is its GPU's.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> "World":
        """What torchrun says in the environment; one process where it says nothing."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if "RANK" not in os.environ:
            return cls()
        return cls(*(int(os.environ[name]) for name in names))

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def require_batch(self, train: TrainConfig) -> None:
        """Raise ConfigError unless every process gets the same share of every micro-batch."""
        if train.batch % (train.accumulate * self.size):
            raise ConfigError(
                f"train.batch = {train.batch} is not valid with {self.size} processes and "
                f"train.accumulate = {train.accumulate}: it must be a multiple of "
                f"{train.accumulate * self.size}"
            )

    def micro_batch(self, train: TrainConfig) -> int:
        """Samples that a process has at a time."""
        return train.batch // (train.accumulate * self.size)

    def arithmetic(self, train: TrainConfig) -> str:
        """How the batch of a step is put together."""
        share = self.micro_batch(train)
        parts = f"{self.size} processes x {train.accumulate} micro-batches x {share}"
        return f"{train.batch} clips a step = {parts}"


@contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """Inside, the processes of a run can talk to each other; one alone needs no group."""
    if world.size == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, _, _ = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    # torchrun keeps one store over its restarts, with the addresses of processes that are gone.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"attempt-{attempt}", store),
        rank=world.rank,
        world_size=world.size,
        timeout=_TIMEOUT,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_first(world: World, function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, on every rank; an error there is everybody's."""
    if world.size == 1:
        return function()
    told: list[Any] = [None, None]
    if world.writes:
        try:
            told[0] = function()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def distribute(model: nn.Module, world: World, parallel: str) -> nn.Module:
    """The model as it is to be called: replicated or sharded over all processes.

    A replicated one is wrapped; a sharded one is changed in place and returned.
    """
    if world.size == 1:
        return model
    if parallel == "fsdp2":
        for module in model.modules():
            if isinstance(module, Block):
                fully_shard(module)
            elif isinstance(module, Stack):
                # A block's parameters are whole while that block runs, and no longer.
                module.passes_bias = False
        fully_shard(model)
        return model
    on_gpu = next(model.parameters()).is_cuda
    device_ids = [torch.cuda.current_device()] if on_gpu else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


@contextmanager
def gradients_stay(module: nn.Module, stay: bool) -> Iterator[None]:
    """Inside, gradients are added up on each process and not averaged over all, if `stay`."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not stay)
        yield
    elif isinstance(module, DistributedDataParallel) and stay:
        with module.no_sync():
            yield
    else:
        yield


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is not sharded; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """A scalar that every process has, in the form that operations with `tensor` need."""
    if not isinstance(tensor, DTensor):
        return value
    from torch.distributed.tensor import Replicate

    mesh = tensor.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def has_peers() -> bool:
    """Whether other processes wait for this one."""
    return dist.is_initialized()


def average(values: Tensor) -> None:
    """Replace values by their mean over all processes; one that is not finite stays so."""
    if has_peers():
        dist.all_reduce(values)
        values /= dist.get_world_size()
