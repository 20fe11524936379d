"""What a step leaves on the device, read without waiting for the step in hand."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Read:
    """The values of one step, on the host.

    samples: how many were seen when it was done.
    values: in the order of `TrainStep.names`.
    stop_asked, failed: whether any process was asked to stop, or had no batch to train on.
    """

    step: int
    samples: int
    values: list[float]
    stop_asked: bool = False
    failed: bool = False

    @classmethod
    def of(cls, step: int, samples: int, values: list[float]) -> "Read":
        """From what `TrainStep` returns."""
        *values, stop_asked, failed = values
        return cls(step, samples, values, stop_asked > 0, failed > 0)


class Readback:
    """Hands out the values of step n once step n + 1 has been launched; on a CPU, at once.

    The host so keeps one step ahead of a GPU, which never waits to be told what to do next.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, int, Tensor, Any]] = deque()

    def push(self, step: int, samples: int, values: Tensor) -> list[Read]:
        """Note the values of the step just launched; returns those of the steps before it."""
        if not values.is_cuda:
            return [Read.of(step, samples, values.tolist())]
        before = self.drain()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((step, samples, host, event))
        return before

    def drain(self) -> list[Read]:
        """Wait for every step launched so far; returns what has not been handed out."""
        reads = []
        while self._waiting:
            step, samples, host, event = self._waiting.popleft()
            event.synchronize()
            reads.append(Read.of(step, samples, host.tolist()))
        return reads
