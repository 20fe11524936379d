"""Fair timing of rival candidates on one device.

Candidates run in turn, A B .. B A, so that a drift of clocks or temperature hits all alike. A call
gets the number of an input set; sets are rotated so that together they exceed the cache.
Launches are queued without waiting, so a sample is device time where the device is the slower side.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch

from benchmarks import device as devices
from benchmarks.harness import Timing, summary

# Inputs of a call are this much of what must be in flight between two uses of one set.
_BEYOND_CACHE = 3
_MAX_SETS = 16

Call = Callable[[int], object]
T = TypeVar("T")


def sets_beyond_cache(bytes_a_set: int, device: torch.device) -> int:
    """How many input sets must be rotated so that none is still in the cache."""
    cache = devices.l2_bytes(device)
    if cache == 0:
        return 2
    return max(2, min(_MAX_SETS, -(-_BEYOND_CACHE * cache // max(bytes_a_set, 1))))


def in_turn(
    candidates: Mapping[str, Call],
    device: torch.device,
    *,
    sets: int,
    rounds: int = 4,
    sample_s: float = 0.05,
    warm_up_s: float = 0.2,
) -> dict[str, Timing]:
    """Seconds a call of each candidate takes.

    Args:
        candidates: each called with the number of an input set, 0 .. sets - 1.
        rounds: an even number of passes, every other one backwards.
        sample_s, warm_up_s: how long a sample and the calls before the first one last, about.
    """
    calls = {name: _calibrated(call, device, sets, sample_s, warm_up_s)
             for name, call in candidates.items()}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for name in abba(list(candidates), rounds):
        count = calls[name]
        elapsed = devices.elapsed_s(partial(_run, candidates[name], sets, count), device)
        seconds[name].append(elapsed / count)
    return {name: summary(values) for name, values in seconds.items()}


def abba(names: list[T], rounds: int) -> list[T]:
    """The names `rounds` times, every other time backwards."""
    return [name for i in range(rounds) for name in (names if i % 2 == 0 else reversed(names))]


def _run(call: Call, sets: int, count: int) -> None:
    for i in range(count):
        call(i % sets)


def _calibrated(
    call: Call, device: torch.device, sets: int, sample_s: float, warm_up_s: float
) -> int:
    """Warm a candidate up and return how many calls make a sample."""
    _run(call, sets, sets)  # every set once: compilers and library plans see each
    spent, count = 0.0, 1
    while True:
        elapsed = devices.elapsed_s(partial(_run, call, sets, count), device)
        spent += elapsed
        if spent >= warm_up_s or elapsed >= max(sample_s, warm_up_s):
            return max(1, round(sample_s / (elapsed / count)))
        count = max(count + 1, min(4 * count, int(count * sample_s / max(elapsed, 1e-9))))
