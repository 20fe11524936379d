"""The largest batch that fits, by bisection."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Largest:
    """batch: the largest that was seen to fit. bracket: it, and the smallest that did not."""

    batch: int
    bracket: tuple[int, int | None]


def largest_batch(
    fits: Callable[[int], bool],
    known: int,
    guess: int,
    stop: Callable[[], bool] = lambda: False,
    closeness: float = 0.02,
) -> Largest:
    """Search the largest batch of a multiple of 8 from `known`, which fits, and a guess.

    Args:
        fits: tries a batch; expensive.
        stop: asked before each try; what is known by then is returned.
        closeness: how far the two ends may stay apart, as a share of the batch; 8 at least.
    """
    low, high = known, None
    probe = max(known + 8, guess // 8 * 8)
    while not stop():
        if fits(probe):
            low = probe
        else:
            high = probe
        gap = max(8, int(closeness * low))
        if high is None:
            probe = low + max(8, low // 8 // 8 * 8)
        elif high - low <= gap:
            break
        else:
            # Near the guess at first, then by halves.
            probe = max(low + 8, (low + high) // 2 // 8 * 8)
            if probe >= high:
                break
    return Largest(low, (low, high))
