"""Every operation beside its eager meaning, torch.compile of it and the best library.

Forward alone and forward with backward. Each candidate is first held against the meaning in
float64; one that is further off than twice the eager error in the same precision is not timed.
`--write-table` turns the attention rows into the table that `impl="auto"` chooses by.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avmae_kernels.attention_backends import BACKENDS, OWN, TABLE, length_class
from benchmarks import ceilings, harness, results, timing
from benchmarks import device as devices
from benchmarks.attention_cases import CHECKED, attention_cases
from benchmarks.ceilings import dtype_of
from benchmarks.kernel_cases import Call, Case, Inputs, Unavailable, memory_cases
from benchmarks.results import Row
from benchmarks.step_rows import autocast

DIRECTIONS = ("forward", "training")


def measure(args: argparse.Namespace, result: results.Result, deadline: results.Deadline) -> None:
    device = result.device
    if args.write_table is not None and device.type != "cuda":
        raise harness.BenchmarkError("--write-table wants --device cuda: a CPU has one back end")
    torch.manual_seed(0)
    result.extra["matmul_flops_per_s"] = ceilings.matmul_ceiling(device, args.tiny)
    result.extra["copy_bytes_per_s"] = ceilings.copy_ceiling(device, args.tiny)
    cases = []
    if "attention" in args.op or not args.op:
        cases += attention_cases(device, args.tiny)
    if not args.op or set(args.op) - {"attention"}:
        cases += [c for c in memory_cases(device, args.tiny) if not args.op or c.op in args.op]
    if args.shape:
        cases = [c for c in cases if any(text in c.shape for text in args.shape)]
    for case in cases:
        one_case(case, result, deadline, args)
    if args.write_table is not None:
        write_table(args.write_table, result)


def one_case(
    case: Case, result: results.Result, deadline: results.Deadline, args: argparse.Namespace
) -> None:
    """Check every candidate, then time those that passed in turn, in both directions."""
    names = {"op": case.op, "shape": case.shape}
    if deadline.passed():
        result.skip(results.OUT_OF_TIME, **names)
        return
    try:
        errors = _checked(case, result, names, args.no_compile)
        for direction in DIRECTIONS:
            _time(case, direction, list(errors), errors, result, names)
    except Exception as error:
        result.skip(error, **names)
    finally:
        # Torch compiles one function for so many shapes only, then runs it uncompiled.
        torch.compiler.reset()
        devices.release(result.device)


def _checked(
    case: Case, result: results.Result, names: Row, no_compile: bool
) -> dict[str, dict[str, float]]:
    """Errors of the candidates that are right; the others are told off."""
    device = result.device
    inputs = case.make()
    meaning, small = _narrow(case, inputs)
    exact = _results(meaning, _wide(small), device)
    # The yardstick: the meaning in the candidates' own precision.
    plain, _ = _errors(_results(meaning, small, device), exact)
    allowed = 2 * plain + torch.finfo(dtype_of(device)).eps
    found: dict[str, dict[str, float]] = {}
    for name, call in case.calls.items():
        if name == "compiled" and no_compile:
            result.skip("left out by --no-compile", **names, candidate=name)
            continue
        try:
            got = _results(call, inputs, device)
        except Exception as error:
            why = str(error) if isinstance(error, Unavailable) else error
            result.skip(why, **names, candidate=name)
            continue
        relative, largest = _errors([case.part(x) for x in got] if case.part else got, exact)
        if not relative <= allowed:
            why = f"wrong: relative error {relative:.3g}, allowed {allowed:.3g}"
            result.skip(why, **names, candidate=name)
            continue
        found[name] = {"max_error": largest, "relative_error": relative, "allowed": allowed}
    return found


def _narrow(case: Case, inputs: Inputs) -> tuple[Call, Inputs]:
    """The meaning and inputs of the part that is compared, where all would be too much."""
    if case.part is None:
        return case.exact, inputs
    each = min(CHECKED, case.details["each"])
    lengths = [n for n in case.details["lengths"] for _ in range(each)]
    small = tuple(case.part(x.detach()).requires_grad_(x.requires_grad) for x in inputs)
    return partial(case.exact, lengths=lengths), small


def _wide(inputs: Inputs) -> Inputs:
    return tuple(
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in inputs
    )


def _outputs(call: Call, inputs: Inputs, device: torch.device) -> tuple[Tensor, ...]:
    if any(x.dtype == torch.float64 for x in inputs):
        out = call(*inputs)
    else:
        with autocast(device):
            out = call(*inputs)
    return out if isinstance(out, tuple) else (out,)


def _results(call: Call, inputs: Inputs, device: torch.device) -> list[Tensor]:
    """Outputs, then gradients, of one call."""
    outs = _outputs(call, inputs, device)
    leaves = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(outs, leaves, [_grad(out) for out in outs])
    return [x.detach() for x in (*outs, *grads)]


def _grad(out: Tensor) -> Tensor:
    """A gradient for an output: the same small numbers for each row, exact in every dtype."""
    last = out.shape[-1] if out.ndim else 1
    row = (torch.arange(last, device=out.device) % 7 - 3).to(out.dtype)
    return row.expand(out.shape).contiguous() if out.ndim else torch.ones_like(out)


def _errors(got: Iterable[Tensor], exact: Iterable[Tensor]) -> tuple[float, float]:
    """The worst of the outputs' and gradients' |difference| / |exact|, and the largest one."""
    relative = largest = 0.0
    for x, want in zip(got, exact, strict=True):
        difference = x.double() - want
        share = float(difference.norm() / want.norm().clamp_min(1e-30))
        relative = share if math.isnan(share) else max(relative, share)
        largest = max(largest, float(difference.abs().max()))
        if math.isnan(relative):
            break
    return relative, largest


def _time(
    case: Case,
    direction: str,
    names_of_calls: list[str],
    errors: dict[str, dict[str, float]],
    result: results.Result,
    names: Row,
) -> None:
    device = result.device
    sample = case.make()
    sets = timing.sets_beyond_cache(sum(x.numel() * x.element_size() for x in sample), device)
    inputs = [sample, *(case.make() for _ in range(sets - 1))]
    calls = {name: _timed(case.calls[name], inputs, direction, device) for name in names_of_calls}
    fast = device.type == "cuda"
    timings = timing.in_turn(
        calls,
        device,
        sets=sets,
        rounds=4 if fast else 2,
        sample_s=0.03 if fast else 0.001,
        warm_up_s=0.2 if fast else 0.001,
    )
    which = DIRECTIONS.index(direction)
    for name, found in timings.items():
        flops, moved = case.flops[which], case.bytes[which]
        tflops = flops / found.median_s / 1e12 if flops else None
        tb_per_s = moved / found.median_s / 1e12
        result.add(
            **names,
            candidate=name,
            direction=direction,
            us=1e6 * found.median_s,
            us_lower=1e6 * found.lower_quartile_s,
            us_upper=1e6 * found.upper_quartile_s,
            tflops=tflops,
            tb_per_s=tb_per_s,
            share_of_matmul_ceiling=_share(tflops, result.extra["matmul_flops_per_s"]),
            share_of_copy_ceiling=_share(tb_per_s, result.extra["copy_bytes_per_s"]),
            **errors[name],
            **case.details,
        )


def _share(rate: float | None, ceiling: float) -> float | None:
    return None if rate is None else 1e12 * rate / ceiling


def _timed(call: Call, inputs: list[Inputs], direction: str, device: torch.device) -> timing.Call:
    if direction == "forward":

        def forward(i: int) -> None:
            with torch.no_grad():
                _outputs(call, inputs[i], device)

        return forward
    grads: dict[int, list[Tensor]] = {}

    def training(i: int) -> None:
        outs = _outputs(call, inputs[i], device)
        if not grads:
            grads[0] = [_grad(out) for out in outs]
        torch.autograd.grad(outs, [x for x in inputs[i] if x.requires_grad], grads[0])

    return training


def choices(rows: Iterable[Row], arch: int) -> list[dict[str, Any]]:
    """The fastest back end for each (class of length, head_dim, direction).

    Over the lengths of a class it is the one of the least geometric mean, among those that were
    measured, and right, at every length.
    """
    groups: dict[tuple[str, int, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        impl = OWN if row.get("candidate") == "ours" else row.get("candidate")
        if row["op"] != "attention" or impl not in BACKENDS:
            continue
        fixed = row["lengths"][0] if len(row["lengths"]) == 1 else None
        key = (length_class(fixed), row["head_dim"], row["direction"])
        groups.setdefault(key, {}).setdefault(impl, {})[row["shape"]] = row["us"]
    found = []
    for (length, head_dim, direction), by_impl in sorted(groups.items()):
        shapes = set().union(*by_impl.values())
        whole = {impl: us for impl, us in by_impl.items() if us.keys() == shapes}
        if not whole:
            continue
        mean = {i: math.exp(sum(map(math.log, us.values())) / len(us)) for i, us in whole.items()}
        best = min(mean, key=mean.__getitem__)
        entry = {"arch": arch, "length": length, "head_dim": head_dim, "direction": direction}
        found.append({**entry, "impl": best, "us": mean})
    return found


def write_table(path: Path, result: results.Result) -> None:
    """Replace this architecture's choices in the table; those of others stay."""
    major, minor = torch.cuda.get_device_capability(result.device)
    arch = 10 * major + minor
    rows = [row for row in result.rows if row["op"] == "attention"]
    table = json.loads((path if path.exists() else TABLE).read_text())
    kept = [entry for entry in table["choices"] if entry["arch"] != arch]
    versions = harness.environment()["versions"]
    table["measured_on"] = (
        f"{devices.gpu_name(result.device)}, {datetime.now(UTC):%Y-%m-%d}, "
        f"torch {versions['torch']}, triton {versions['triton']}"
    )
    table["note"] = "Written by python -m benchmarks.kernels --op attention --write-table."
    table["choices"] = kept + choices(rows, arch)
    harness.write_json(path, table)
    # The shipped table may live on a machine that keeps nothing; the result is taken home.
    result.extra["attention_table"] = table
    print(f"wrote {path}: {len(table['choices']) - len(kept)} choices for sm_{arch}")


def main(argv: list[str] | None = None) -> int:
    options = results.parser(__doc__ or "")
    options.add_argument("--op", nargs="+", default=[], help="operations to time (default: all)")
    options.add_argument("--shape", nargs="+", default=[], metavar="TEXT",
                         help="only shapes whose name holds one of these")  # fmt: skip
    options.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options.add_argument("--write-table", nargs="?", type=Path, const=TABLE, metavar="FILE",
                         help="write the attention table (default: the shipped one)")  # fmt: skip
    return results.run("kernels", options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
