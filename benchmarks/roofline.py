"""How fast a step could be: the floor of every operation, and what a model of the card expects.

The floor of an operation is the longer of its FLOPs at the card's matmul ceiling and its bytes at
the card's copy bandwidth. The model puts an efficiency on each kind of operation and adds launches
and copies. Everything it says is an estimate and is labelled so; what was measured stands beside.

    python -m benchmarks.roofline --model L --row C         every operation of one step
    python -m benchmarks.roofline --json FILE               every row, card and size
"""

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from avmae_fast.config import ModelConfig
from benchmarks import harness
from benchmarks.roofline_ops import (
    NAMES,
    Name,
    Op,
    operations,
    parameters,
    stacks,
    tokens_of,
)
from benchmarks.workload import DATASETS, SIZES, model_config

__all__ = ["GPUS", "Gpu", "Prediction", "floor_s", "gpu_of", "model_flops", "predict", "tokens_of"]

LABEL = "model estimate"


@dataclass(frozen=True)
class Gpu:
    """What the model takes a card to sustain; a run measures its own ceilings.

    datasheet: dense bf16 FLOP/s as published. matmul, copy: sustained FLOP/s of a large bf16
    product and bytes/s of a copy. link: bytes/s from page-locked host memory.
    """

    name: str
    pattern: str
    datasheet: float
    matmul: float
    copy: float
    memory: float
    link: float
    hopper: bool


# Sustained rates: H200 as one card gave them; H100 and A100 are that share of their datasheets.
GPUS = (
    Gpu("H200", r"\bH200\b(?! NVL)", 990e12, 790e12, 4.3e12, 143771 * 2**20, 50e9, True),
    Gpu("H100", r"\bH100 80GB HBM3\b", 990e12, 790e12, 3.0e12, 81559 * 2**20, 50e9, True),
    Gpu("A100", r"\bA100.*80GB\b", 312e12, 265e12, 1.78e12, 81920 * 2**20, 25e9, False),
)

# Shares of the ceilings that the model gives to each kind of work, by row where it matters.
_PRODUCT, _PRODUCT_BYTES, _SPLIT_SUM = 0.90, 0.92, 0.92
_TILE_OVERHEAD = 160  # of a product, in steps along its sums: prologue and epilogue of a tile
_PASS: dict[Name, float] = {"A": 0.88, "B": 0.82, "B+": 0.82, "C": 0.88, "C+": 0.88}
_REDUCTION, _COLUMNS, _OPTIMISER = 0.80, 0.60, 0.90
_GAP_S: dict[Name, float] = {"A": 1.5e-6, "B": 1.2e-6, "B+": 1.2e-6, "C": 1.5e-6, "C+": 0.8e-6}


@dataclass(frozen=True)
class _Attention:
    """Useful TFLOP/s over n keys at head_dim 64 on Hopper: `rate * n / (n + half)`, n padded.

    Long sequences follow published H100 figures of these kernels, short ones are extrapolated.
    factors: on the rate, by head_dim.
    """

    forward: tuple[float, float]
    backward: tuple[float, float]
    tile: int
    factors: dict[int, float]


_ATTENTION = {
    "flash 2": _Attention((324, 76), (290, 238), 128, {32: 0.62, 64: 1.0, 80: 0.89}),
    "cuDNN": _Attention((413, 119), (460, 370), 64, {32: 0.62, 64: 1.0, 80: 1.08}),
    "ours": _Attention((403, 95), (310, 238), 64, {32: 0.70, 64: 1.0, 80: 0.90}),
    "ours, goal": _Attention((400, 110), (400, 170), 32, {32: 0.70, 64: 1.0, 80: 1.0}),
}
_KERNELS: dict[Name, tuple[str, ...]] = {
    "A": ("flash 2",),
    "B": ("flash 2",),
    "B+": ("cuDNN", "flash 2"),
    "C": ("ours",),
    "C+": ("ours, goal", "cuDNN"),
}
_AMPERE_ATTENTION = 0.6  # of the Hopper rates, as flash 2's own figures are to each other


def gpu_of(name: str) -> Gpu | None:
    """The card of a driver's name or of a name above; None for any other: nothing is guessed."""
    for gpu in GPUS:
        if name == gpu.name or re.search(gpu.pattern, name):
            return gpu
    return None


def floor_s(op: Op, gpu: Gpu) -> float:
    """No kernel does it faster on this card."""
    if op.kind == "copy":
        return op.bytes / gpu.link
    return max(op.flops / gpu.matmul, op.bytes / gpu.copy)


def expected_s(op: Op, gpu: Gpu, name: Name) -> float:
    """What the model expects of row `name`, launches left out."""
    if op.kind == "copy":
        return op.bytes / gpu.link
    if op.kind == "product":
        return max(op.flops / (gpu.matmul * _product_share(op)), op.bytes / (gpu.copy * 0.92))
    if op.kind == "attention":
        least = op.bytes / (gpu.copy * _PRODUCT_BYTES)
        return max(least, op.flops / max(_attention_rate(op, gpu, k) for k in _KERNELS[name]))
    share = {"reduction": _REDUCTION, "columns": _COLUMNS, "optimiser": _OPTIMISER}
    return op.bytes / (gpu.copy * share.get(op.kind, _PASS[name]))


def _product_share(op: Op) -> float:
    """Of the ceiling, which itself is a product whose sums are 8192 long."""
    share = _PRODUCT * op.depth / (op.depth + _TILE_OVERHEAD) * (1 + _TILE_OVERHEAD / 8192)
    # A weight's gradient has too few tiles for the card: its long sums are split.
    return share * (_SPLIT_SUM if op.name.endswith("dW") else 1.0)


def _attention_rate(op: Op, gpu: Gpu, kernel: str) -> float:
    found = _ATTENTION[kernel]
    rate, half = found.backward if op.backward else found.forward
    padded = -(-op.keys // found.tile) * found.tile
    useful = (op.keys / padded) ** 2
    factor = found.factors.get(op.head_dim, 1.0)
    scale = 1e12 if gpu.hopper else 1e12 * _AMPERE_ATTENTION
    return scale * rate * padded / (padded + half) * useful * factor


def model_flops(model: ModelConfig, batch: int) -> float:
    """Useful FLOPs of a step: the minimal exact algorithm, whoever runs it."""
    ops = operations(model, batch, "C+")
    return sum(op.flops for op in ops if op.kind in ("product", "attention"))


@dataclass(frozen=True)
class Prediction:
    """What the model expects of a step; times in ms."""

    label: str
    gpu: str
    model: str
    dataset: str
    row: Name
    batch: int
    ms: float
    clips_per_s: float
    floor_ms: float
    products_and_attention_ms: float
    share_of_matmul_ceiling: float
    peak_bytes: float
    largest_batch: int
    groups_ms: dict[str, float]


def predict(gpu: Gpu, size: str, dataset: str, batch: int, name: Name) -> Prediction:
    """The model's estimate of one row."""
    model = model_config(size, dataset)
    ops = operations(model, batch, name)
    groups: dict[str, float] = {}
    core = copied = 0.0
    for op in ops:
        seconds = expected_s(op, gpu, name)
        if op.kind == "copy":
            copied += seconds
            continue
        key = f"{op.group}: {_PLURAL.get(op.kind, 'other passes')}"
        groups[key] = groups.get(key, 0.0) + 1e3 * seconds
        if op.kind in _PLURAL:
            core += seconds
    groups["launches"] = 1e3 * _GAP_S[name] * sum(op.calls for op in ops)
    seconds = sum(groups.values()) / 1e3
    # Rows with a copy stream wait only for what does not fit under the step before.
    exposed = max(0.0, copied - seconds) if name in ("B+", "C", "C+") else copied
    groups["copy from the host, not hidden"] = 1e3 * exposed
    seconds += exposed
    fixed, a_clip = memory(model, name)
    return Prediction(
        LABEL,
        gpu.name,
        size,
        dataset,
        name,
        batch,
        1e3 * seconds,
        batch / seconds,
        1e3 * sum(floor_s(op, gpu) for op in ops if op.kind != "copy"),
        1e3 * core,
        model_flops(model, batch) / seconds / gpu.matmul,
        fixed + batch * a_clip,
        int((0.95 * gpu.memory - fixed) / a_clip),
        groups,
    )


_PLURAL = {"product": "products", "attention": "attention"}

# Bytes kept for the backward pass, for one element of [tokens, width] and block: residual stream
# twice, LayerNorms' outputs, qkv, attention's output, both sides of the GELU.
_KEPT: dict[Name, float] = {"A": 36, "B": 30, "B+": 30, "C": 24, "C+": 24}
_ALLOCATOR: dict[Name, float] = {"A": 1.08, "B": 1.08, "B+": 1.08, "C": 1.03, "C+": 1.03}


def memory(model: ModelConfig, name: Name) -> tuple[float, float]:
    """Bytes that a row holds whatever the batch, and for each clip."""
    kept = sum(s.stack.width * s.layers * sum(s.lengths) for s in stacks(model)) * _KEPT[name]
    counts = {m: tokens_of(model, m) for m in model.modalities}
    every = sum(t.total * model.input(m).patch_dim for m, t in counts.items())
    masked = sum(t.masked * model.input(m).patch_dim for m, t in counts.items())
    narrow = sum(t.total for t in counts.values()) * model.decoder.width
    around = {"A": 22 * every, "B": 14 * every}.get(name, 2 * every + 6 * masked) + 12 * narrow
    # fp32 weights, gradients and two moments; autocast's bf16 copies; cuBLAS and the driver.
    fixed = 18.0 * parameters(model) + 1.5e9
    return fixed, (kept + around) * _ALLOCATOR[name]


def everything(batch: int = 128) -> list[Prediction]:
    return [
        predict(gpu, size, dataset, batch, name)
        for gpu in GPUS
        for size in SIZES
        for dataset in DATASETS
        for name in NAMES
    ]


def attention_ratio(keys: int, head_dim: int, ours: str, theirs: Iterable[str]) -> float:
    """How much faster the model takes one kernel to be than the best of others, both passes."""

    def seconds(kernel: str) -> float:
        total = 0.0
        for backward, flops in ((False, 4.0), (True, 10.0)):
            op = Op("", "", "attention", keys=keys, head_dim=head_dim, backward=backward)
            total += flops / _attention_rate(op, GPUS[0], kernel)
        return total

    return min(seconds(kernel) for kernel in theirs) / seconds(ours)


def _print_operations(args: argparse.Namespace, gpu: Gpu) -> None:
    name: Name = args.row
    ops = operations(model_config(args.model, args.dataset), args.batch, name)
    print(f"{'':44s} {'calls':>6s} {'TFLOP':>8s} {'GB':>8s} {'floor ms':>9s} {LABEL:>15s}")
    for op in ops:
        print(
            f"{op.group:10s} {op.name:33s} {op.calls:6d} {op.flops / 1e12:8.3f} "
            f"{op.bytes / 1e9:8.3f} {1e3 * floor_s(op, gpu):9.3f} "
            f"{1e3 * expected_s(op, gpu, name):15.3f}"
        )
    found = predict(gpu, args.model, args.dataset, args.batch, name)
    print(f"step: {LABEL} {found.ms:.1f} ms on {gpu.name}, floor {found.floor_ms:.1f} ms; "
          f"{_measured(args, gpu)}")  # fmt: skip


def _measured(args: argparse.Namespace, gpu: Gpu) -> str:
    from benchmarks.tables import results_of

    for result in results_of("step"):
        for row in result["rows"]:
            same = (row["model"], row["dataset"], row["row"], row["batch"]) == (
                args.model,
                args.dataset,
                args.row,
                args.batch,
            )
            if same and gpu_of(result["gpu"]) == gpu:
                return f"measured {row['ms']:.1f} ms"
    return "not measured"


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", choices=SIZES, default="L")
    options.add_argument("--dataset", choices=DATASETS, default="audioset")
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--row", choices=NAMES, default="C")
    options.add_argument("--gpu", default="H200", help="A100, H100, H200 or a driver's name")
    options.add_argument("--json", type=Path, metavar="FILE", help="save every prediction here")
    args = options.parse_args(argv)
    gpu = gpu_of(args.gpu)
    if gpu is None:
        known = ", ".join(g.name for g in GPUS)
        print(f"error: --gpu {args.gpu} is not known: it must be one of {known}", file=sys.stderr)
        return 2
    _print_operations(args, gpu)
    if args.json is not None:
        found: dict[str, Any] = {"benchmark": "roofline", "label": LABEL}
        found |= {"gpus": [asdict(g) for g in GPUS]}
        found["rows"] = [asdict(p) for p in everything(args.batch)]
        try:
            harness.check_writable(args.json)
            harness.write_json(args.json, found)
        except harness.BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
