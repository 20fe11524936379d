"""What the card can do at all: bf16 products of the model's shapes, and copies, on random data.

Nothing here is ours: it is what every share of a ceiling is a share of.
"""

import argparse
import sys
from collections.abc import Iterator

import torch

from avmae_fast.config import ModelConfig, StackConfig
from benchmarks import results, timing
from benchmarks.roofline import tokens_of
from benchmarks.workload import SIZES, model_config

_SQUARE, _COPY_BYTES = 8192, 2**31
_TINY_SQUARE, _TINY_COPY_BYTES = 64, 2**16

Shape = tuple[int, int, int]


def dtype_of(device: torch.device) -> torch.dtype:
    """bf16 on a GPU; float32 on a CPU, where bf16 products may be emulated."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def matmul_seconds(device: torch.device, shape: Shape, rounds: int = 4) -> timing.Timing:
    """Seconds of `[M, K] @ [K, N]` through torch, on random normal data."""
    M, N, K = shape
    dtype = dtype_of(device)
    each = (M * K + N * K) * dtype.itemsize
    sets = timing.sets_beyond_cache(each, device)
    shapes = ((M, K), (K, N))
    inputs = [[torch.randn(s, device=device, dtype=dtype) for s in shapes] for _ in range(sets)]
    out = torch.empty(M, N, device=device, dtype=dtype)

    def call(i: int) -> None:
        torch.mm(*inputs[i], out=out)

    sample_s = 0.05 if device.type == "cuda" else 0.001
    return timing.in_turn(
        {"mm": call}, device, sets=sets, rounds=rounds, sample_s=sample_s, warm_up_s=4 * sample_s
    )["mm"]


def matmul_ceiling(device: torch.device, tiny: bool = False) -> float:
    """FLOP/s of a large square product, as this card sustains it now."""
    size = _TINY_SQUARE if tiny else _SQUARE
    return 2.0 * size**3 / matmul_seconds(device, (size, size, size)).median_s


def copy_seconds(device: torch.device, count: int) -> timing.Timing:
    """Seconds of a device-to-device copy of `count` random bytes."""
    sets = timing.sets_beyond_cache(2 * count, device)
    pairs = [
        (torch.randint(0, 256, (count,), dtype=torch.uint8, device=device).view(torch.int32),
         torch.empty(count // 4, dtype=torch.int32, device=device))
        for _ in range(sets)
    ]  # fmt: skip

    def call(i: int) -> None:
        source, target = pairs[i]
        target.copy_(source)

    sample_s = 0.05 if device.type == "cuda" else 0.001
    return timing.in_turn(
        {"copy": call}, device, sets=sets, sample_s=sample_s, warm_up_s=4 * sample_s
    )["copy"]


def copy_ceiling(device: torch.device, tiny: bool = False) -> float:
    """Bytes a second of a large copy, counting bytes read and bytes written."""
    count = _TINY_COPY_BYTES if tiny else _COPY_BYTES
    return 2.0 * count / copy_seconds(device, count).median_s


def stack_products(stack: StackConfig, tokens: int) -> Iterator[tuple[str, Shape]]:
    """The products of one block over `tokens` rows: forward, gradient of input, of weights."""
    D, M = stack.width, stack.mlp
    for name, wide, narrow in (("qkv", 3 * D, D), ("proj", D, D), ("fc1", M, D), ("fc2", D, M)):
        yield f"{name} forward", (tokens, wide, narrow)
        yield f"{name} dX", (tokens, narrow, wide)
        yield f"{name} dW", (wide, narrow, tokens)


def model_products(model: ModelConfig, batch: int) -> Iterator[tuple[str, Shape]]:
    """The products of encoder and decoder blocks at a batch."""
    counts = [tokens_of(model, m) for m in model.modalities]
    for name, shape in stack_products(model.encoder, batch * sum(t.visible for t in counts)):
        yield f"encoder {name}", shape
    for name, shape in stack_products(model.decoder, batch * sum(t.total for t in counts)):
        yield f"decoder {name}", shape


def measure(args: argparse.Namespace, result: results.Result, deadline: results.Deadline) -> None:
    device, tiny = result.device, args.tiny
    result.extra["matmul_flops_per_s"] = matmul_ceiling(device, tiny)
    result.extra["copy_bytes_per_s"] = copy_ceiling(device, tiny)
    print(f"matmul {result.extra['matmul_flops_per_s'] / 1e12:.4g} TFLOP/s  "
          f"copy {result.extra['copy_bytes_per_s'] / 1e12:.4g} TB/s")  # fmt: skip
    batch = 2 if tiny else args.batch
    for size in SIZES[:1] if tiny else SIZES:
        for name, shape in model_products(model_config(size, "audioset", tiny), batch):
            row = {"model": size, "product": name, "shape": list(shape)}
            if deadline.passed():
                result.skip(results.OUT_OF_TIME, **row)
                continue
            try:
                found = matmul_seconds(device, shape, rounds=2)
            except RuntimeError as error:
                result.skip(error, **row)
                continue
            rate = 2.0 * shape[0] * shape[1] * shape[2] / found.median_s
            share = rate / result.extra["matmul_flops_per_s"]
            result.add(**row, ms=1e3 * found.median_s, tflops=rate / 1e12, share_of_ceiling=share)


def main(argv: list[str] | None = None) -> int:
    options = results.parser(__doc__ or "")
    options.add_argument("--batch", type=int, default=128, help="clips a product (default 128)")
    return results.run("ceilings", options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
