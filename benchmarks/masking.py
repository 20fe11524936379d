"""Time to draw the masks of a clip, on one core, beside NumPy's and torch's `rand().argsort()`.

A clip is the paper's AudioSet clip: 1568 video tokens masked at 0.9 and 496 sound tokens at 0.7.
All three return the same int32 lists (visible and masked ascending, inverse) for a whole batch in
one call, and each baseline is the fastest way to them we found: NumPy sorts the two parts of the
order, torch reads the lists off a boolean mask.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from avmae_kernels import masking
from benchmarks import harness

VIDEO = masking.MaskSpec("random", (8, 14, 14), 0.9)
AUDIO = masking.MaskSpec("random", (62, 8), 0.7)
MODALITIES = {"video": VIDEO, "audio": AUDIO}

Lists = tuple[np.ndarray, np.ndarray, np.ndarray]


def ours(batch: int) -> list[Lists]:
    keys = np.arange(batch, dtype=np.int64)
    masks = [
        masking.sample_masks(spec, keys, seed=0, modality=modality)
        for modality, spec in MODALITIES.items()
    ]
    return [(mask.visible, mask.masked, mask.inverse) for mask in masks]


def numpy_argsort(batch: int) -> list[Lists]:
    generator = np.random.default_rng(0)

    def draw(tokens: int, visible_count: int) -> Lists:
        order = generator.random((batch, tokens), dtype=np.float32).argsort(axis=1)
        order = order.astype(np.int32)
        visible = np.sort(order[:, :visible_count], axis=1)
        masked = np.sort(order[:, visible_count:], axis=1)
        inverse = np.empty_like(order)
        place = np.broadcast_to(np.arange(tokens, dtype=np.int32), order.shape)
        np.put_along_axis(inverse, np.concatenate([visible, masked], 1).astype(np.int64), place, 1)
        return visible, masked, inverse

    return [draw(spec.n_tokens, spec.n_visible) for spec in MODALITIES.values()]


def torch_argsort(batch: int) -> list[Lists]:
    def draw(tokens: int, visible_count: int) -> Lists:
        order = torch.rand(batch, tokens).argsort(dim=1)
        is_masked = torch.ones(batch, tokens, dtype=torch.bool)
        is_masked.scatter_(1, order[:, :visible_count], False)
        visible = (~is_masked).nonzero()[:, 1].view(batch, visible_count).int()
        masked = is_masked.nonzero()[:, 1].view(batch, tokens - visible_count).int()
        masked_so_far = is_masked.cumsum(1, dtype=torch.int32)
        place = torch.arange(tokens, dtype=torch.int32)
        inverse = torch.where(is_masked, visible_count - 1 + masked_so_far, place - masked_so_far)
        return visible.numpy(), masked.numpy(), inverse.numpy()

    return [draw(spec.n_tokens, spec.n_visible) for spec in MODALITIES.values()]


def check(name: str, lists: list[Lists], batch: int) -> None:
    """Whether the lists are masks at all; a fast wrong answer must not become a number."""
    for spec, (visible, masked, inverse) in zip(MODALITIES.values(), lists, strict=True):
        both = np.concatenate([visible, masked], axis=1)
        place = np.broadcast_to(np.arange(spec.n_tokens), (batch, spec.n_tokens))
        correct = (
            visible.shape == (batch, spec.n_visible)
            and all(array.dtype == np.int32 for array in (visible, masked, inverse))
            and (np.diff(visible, axis=1) > 0).all()
            and (np.diff(masked, axis=1) > 0).all()
            and np.array_equal(np.take_along_axis(inverse, both, axis=1), place)
        )
        if not correct:
            raise AssertionError(f"{name} returned no masks of {spec}")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.batch < 1 or args.repeats < 1:
        raise harness.BenchmarkError(
            f"--batch and --repeats want 1 or more, got {args.batch} and {args.repeats}"
        )
    if masking.implementation() is masking.masking_reference:
        raise harness.BenchmarkError(
            "avmae_kernels._C is not built; install a C++17 compiler and reinstall avmae_fast"
        )
    draws: dict[str, Callable[[int], list[Lists]]] = {
        "ours": ours,
        "numpy": numpy_argsort,
        "torch": torch_argsort,
    }
    for name, draw in draws.items():
        check(name, draw(args.batch), args.batch)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timings = harness.time_interleaved(
            {name: partial(draw, args.batch) for name, draw in draws.items()},
            repeats=args.repeats,
        )
    finally:
        torch.set_num_threads(threads)
    us = {name: 1e6 * timing.median_s / args.batch for name, timing in timings.items()}
    result: dict[str, Any] = {
        "us_per_clip": us["ours"],
        "ratio_vs_numpy": us["numpy"] / us["ours"],
        "ratio_vs_torch": us["torch"] / us["ours"],
        "batch": args.batch,
        "repeats": args.repeats,
    }
    for name, timing in timings.items():
        for field, seconds in dataclasses.asdict(timing).items():
            result[f"{name}_us_{field.removesuffix('_s')}"] = 1e6 * seconds / args.batch
    return result


def main(argv: list[str] | None = None) -> int:
    options = harness.parser((__doc__ or "").partition("\n")[0])
    options.add_argument("--batch", type=int, default=64, help="clips a call (default 64)")
    options.add_argument("--repeats", type=int, default=100, help="calls timed (default 100)")
    return harness.run(options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
